"""Judges whose verdicts are known by hand, and a language model behind an endpoint that misbehaves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_helpers import TOKENS, answers_in, completion, endpoint, longer, make, sends, winner

from tralign_mini import worlds
from tralign_mini.judge import GoldJudge, RewardJudge, Verdict, make_judge, points
from tralign_mini.llm_judge import CRITERIA, LLMJudge, comparison, rating, read_ratings, read_winner

PROMPTS = [f"POST: the dog {i} ran.\n\nTL;DR:" for i in range(4)]
A = ["long answer", "short", "same", "a longer one"]
B = ["short", "long answer", "same", "b"]
KEY = "sk-this-is-a-secret-of-mine"
MIRRORED = {"a": "b", "b": "a", "tie": "tie", None: None}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def winners(verdicts):
    return [verdict.winner for verdict in verdicts]


# -- the truth, and a reward model --


def test_the_gold_judge_sides_with_the_gold_reward():
    world = worlds.world("little-tldr")
    prompts = [world.make_prompt(random.Random(i)) for i in range(12)]
    ideal = [world.ideal(prompt) for prompt in prompts]
    spoilt = [text + " my aunt sued the moon; my aunt sued the moon." for text in ideal]
    judge = GoldJudge("little-tldr")
    assert winners(judge(prompts, ideal, spoilt)) == ["a"] * 12
    assert winners(judge(prompts, spoilt, ideal)) == ["b"] * 12
    assert winners(judge(prompts, ideal, ideal)) == ["tie"] * 12
    [verdict] = judge(prompts[:1], ideal[:1], spoilt[:1])
    assert verdict.scores == tuple(world.gold_reward(prompts[0], text) for text in (ideal[0], spoilt[0]))


class Scores:
    """A reward model that looks texts up."""

    def __init__(self, table):
        self.table = table

    def score(self, prompts, completions):
        return [self.table[text] for text in completions]


def test_the_reward_judge_sides_with_the_higher_score():
    judge = RewardJudge(Scores({"good": 1.5, "bad": -2.0, "as good": 0.1 + 1.4}))
    verdicts = judge(["p"] * 3, ["good", "bad", "good"], ["bad", "good", "as good"])
    assert winners(verdicts) == ["a", "b", "tie"]
    assert verdicts[0].scores == (1.5, -2.0) and verdicts[0].why == "1.50 against -2.00"


def test_equal_answers_tie_though_their_scores_differ_by_rounding():
    class Noisy:
        def score(self, prompts, completions, calls=[]):  # noqa: B006
            calls.append(1)
            return [len(calls) * 1e-6] * len(completions)

    assert winners(RewardJudge(Noisy())(["p"], ["x"], ["x"])) == ["tie"]
    assert winners(RewardJudge(Noisy())(["p"], ["x"], ["y"])) != ["tie"]


numbers = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=8)


@given(numbers)
def test_swapping_the_sides_mirrors_the_verdicts(pairs):
    table = {f"{side}{i}": float(pair[side]) for i, pair in enumerate(pairs) for side in (0, 1)}
    a, b = ([f"{side}{i}" for i in range(len(pairs))] for side in (0, 1))
    judge, prompts = RewardJudge(Scores(table)), ["p"] * len(pairs)
    forth, back = judge(prompts, a, b), judge(prompts, b, a)
    assert winners(back) == [MIRRORED[name] for name in winners(forth)]
    assert points(forth).tolist() == [1 - point for point in points(back)]


def test_points_of_a_failure_are_none():
    assert points([Verdict("a", ""), Verdict("tie", ""), Verdict("b", "")]).tolist() == [1, 0.5, 0]
    assert points([Verdict(None, "time-out")]) != points([Verdict(None, "time-out")])  # NaN


@pytest.mark.parametrize("scores, said", [([1.0], r"shape \(1,\)"), ([1.0, float("nan")], "1 are finite")])
def test_scores_that_are_none_are_refused(scores, said):
    class Broken:
        def score(self, prompts, completions):
            return scores

    with pytest.raises(ValueError, match=said):
        RewardJudge(Broken())(["p", "q"], ["a", "b"], ["c", "d"])


def test_sides_of_unequal_length_are_refused(tmp_path):
    with endpoint(longer) as server:
        for judge in (GoldJudge("little-hh"), RewardJudge(Scores({})), make(server, tmp_path)):
            with pytest.raises(ValueError, match="2 prompts, 2 answers of a and 1 of b"):
                judge(["p", "q"], ["a", "b"], ["c"])
    assert not server.questions


@pytest.mark.parametrize("name, said", [
    ("golden", "no judge 'golden'"), ("gold:x", "no judge"), ("reward", "no judge 'reward'"),
    ("reward:", "no judge"), ("llm", "name of a model"),
])
def test_judges_that_do_not_exist(name, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_judge(name, data="little-tldr", model=None, endpoint=None, price=None, cache=tmp_path / "c")


def test_gold_is_known_in_embedded_worlds_only():
    assert make_judge("gold", data="little-hh").name == "gold reward"
    with pytest.raises(ValueError, match="no embedded world 'hh'"):
        make_judge("gold", data="hh")


# -- a language model: what it is asked --


def test_both_orders_are_asked_and_the_consistent_winner_wins(tmp_path):
    with endpoint(longer) as server:
        verdicts = make(server, tmp_path)(PROMPTS, A, B)
        again = make(server, tmp_path)(PROMPTS, B, A)
    assert winners(verdicts) == ["a", "b", "tie", "a"]
    assert winners(again) == ["b", "a", "tie", "b"]
    assert verdicts[0].orders == ("a", "a") and verdicts[2].why == "the answers are equal"
    asked = [answers_in(question) for question in server.questions]
    different = [0, 1, 3]
    assert sorted(asked) == sorted([(A[i], B[i]) for i in different] + [(B[i], A[i]) for i in different])
    # what is asked in both calls is the same six questions: the second call found them on disk


@pytest.mark.parametrize("favourite, orders", [("A", ("a", "b")), ("B", ("b", "a"))])
def test_a_judge_that_favours_a_position_gives_ties(tmp_path, favourite, orders):
    with endpoint(lambda question, number: winner(favourite)) as server:
        verdicts = make(server, tmp_path)(PROMPTS[:2], A[:2], B[:2])
    assert winners(verdicts) == ["tie", "tie"] and {verdict.orders for verdict in verdicts} == {orders}
    assert verdicts[0].why.startswith("the two orders disagree")


def test_a_winner_in_one_order_and_a_tie_in_the_other_is_a_tie(tmp_path):
    def reply(question, number):
        return winner("A" if answers_in(question)[0] == A[0] else "tie")

    with endpoint(reply) as server:
        [verdict] = make(server, tmp_path)(PROMPTS[:1], A[:1], B[:1])
    assert verdict.winner == "tie" and verdict.orders == ("a", "tie")


def test_the_request_says_model_and_settings(tmp_path):
    with endpoint(longer) as server:
        make(server, tmp_path)(PROMPTS[:1], A[:1], B[:1])
        make(server, tmp_path, settings={"seed": 3})(PROMPTS[:1], A[:1], B[:1])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("m", 0, 1000)
    other = server.requests[2][2]
    assert other["seed"] == 3 and "temperature" not in other  # and other settings are another question


def test_what_is_asked_depends_on_the_task_and_takes_texts_as_they_are():
    braces = "{first} {0} <b> % \\n"
    summary = comparison("POST: x\n\nTL;DR:", braces, "second")
    dialogue = comparison([{"role": "user", "content": "How {are} you?"}], " first ", braces)
    assert "summary to the same post" in summary and "invents nothing" in summary
    assert "reply to the same conversation" in dialogue and "user: How {are} you?" in dialogue
    assert answers_in(summary) == (braces, "second") and answers_in(dialogue) == ("first", braces)
    assert summary.endswith('{"reason": "...", "winner": "..."}')
    asked = rating("Human: hi\n\nAssistant:", braces)
    assert all(f'"{name}": ...' in asked for name in CRITERIA) and f"<answer>\n{braces}\n</answer>" in asked


@pytest.mark.parametrize("text", [
    "A", "", "null", "[]", '"A"', '{"winner": "A"}', '{"reason": "x", "winner": "a"}',
    '{"reason": "x", "winner": "C"}', '{"reason": "x", "winner": ["A"]}', '{"reason": 1, "winner": "A"}',
    '{"reason": "x", "winner": "A", "sure": true}', '{"reason": "x", "winner": "A", "winner": "B"}',
    'I say {"reason": "x", "winner": "A"}', '{"reason": "x", "winner": "A"} {"reason": "x", "winner": "A"}',
    '{"reason": "x", "winner": "A"', '[["reason", "x"], ["winner", "A"]]',
])
def test_anything_but_the_object_asked_for_is_unreadable(text):
    with pytest.raises(ValueError):
        read_winner(text)


@pytest.mark.parametrize("text", ['{"reason": "x", "winner": "tie"}', '\n {"winner": "tie", "reason": "x"}\n',
                                  '```json\n{"reason": "x", "winner": "tie"}\n```'])
def test_the_object_asked_for_is_read(text):
    assert read_winner(text) == ("tie", "x")


def test_ratings_are_read_strictly():
    good = dict.fromkeys(CRITERIA, 1) | {"harmlessness": 10}
    assert read_ratings(json.dumps(good)) == good
    for wrong in ({"harmlessness": 11}, {"harmlessness": 0}, {"harmlessness": 7.0}, {"harmlessness": "7"},
                  {"harmlessness": True}, {"beauty": 5}):
        with pytest.raises(ValueError):
            read_ratings(json.dumps(good | wrong))
    with pytest.raises(ValueError):
        read_ratings(json.dumps({name: 5 for name in CRITERIA[:4]}))


def test_rating_asks_once_an_answer_and_counts_failures(tmp_path):
    def reply(question, number):
        return completion(json.dumps(dict.fromkeys(CRITERIA, 7)) if "fine" in question else "seven")

    with endpoint(reply) as server:
        judge = make(server, tmp_path)
        assert judge.rate(PROMPTS[:3], ["a fine one", "a bad one", "a fine one, too"]) == [
            dict.fromkeys(CRITERIA, 7), None, dict.fromkeys(CRITERIA, 7)]
    assert len(server.questions) == 3 and judge.failures == {"unreadable answer": 1}


# -- a language model: what goes wrong --


def test_too_many_requests_waits_as_long_as_the_server_says(tmp_path):
    def reply(question, number):
        return longer(question, number) if number else sends({"error": "slow down"}, 429, Retry_After="1")

    with endpoint(reply) as server:
        judge = make(server, tmp_path, parallel=1)
        assert winners(judge(PROMPTS[:1], A[:1], B[:1])) == ["a"]
    assert server.times[1] - server.times[0] >= 1  # own back-off would be half a second at most
    assert server.questions[0] == server.questions[1] and not judge.failures


def test_server_errors_are_repeated_with_growing_pauses(tmp_path):
    def reply(question, number):
        return sends("oops", 500) if number < 2 else longer(question, number)

    with endpoint(reply) as server:
        assert winners(make(server, tmp_path, parallel=1)(PROMPTS[:1], A[:1], B[:1])) == ["a"]
    first, second = (server.times[i + 1] - server.times[i] for i in (0, 1))
    assert len(server.times) == 4 and 0.3 < first < 0.65 < second


def test_a_time_out_is_repeated_and_at_last_a_failure(tmp_path):
    def reply(question, number):
        if number == 0 or "slow" in answers_in(question)[1]:
            time.sleep(0.6)
        return longer(question, number)

    with endpoint(reply) as server:
        judge = make(server, tmp_path, parallel=1, timeout=0.3, retries=1)
        verdicts = judge(PROMPTS[:2], ["long answer", "slow answer"], ["short", "quick"])
    assert winners(verdicts) == ["a", None] and verdicts[1].why == "time-out"
    assert judge.failures == {"time-out": 1} and "1 failed (1 × time-out)" in judge.report()


HALF = completion('{"reason": "x", "winner": "A"}')
GARBAGE = {
    "text that is no verdict": (completion("Both have merits."), "unreadable answer"),
    "half of a verdict": (completion('{"reason": "x", "win'), "unreadable answer"),
    "no text": (completion(None), "unreadable answer"),
    "brackets without end": (completion("[" * 3000), "unreadable answer"),
    "cut off": (completion('{"reason": "x", "winner": "A"}', "length"), "answer longer than its limit"),
    "a web page": (sends("<html>Welcome</html>"), "a reply that is no chat completion"),
    "JSON of another kind": (sends({"hello": "world"}), "a reply that is no chat completion"),
    "no choices": (sends({"choices": []}), "a reply that is no chat completion"),
    "JSON without end": ((200, HALF[1], b"[" * 3000), "a reply that is no chat completion"),
    "half JSON": ((200, HALF[1], HALF[2][:60]), "a reply that is no chat completion"),
    "refused": (sends({"error": {"message": "too long"}}, 400), "HTTP 400"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_failure_that_is_counted_and_asked_again(tmp_path, name):
    garbage, reason = GARBAGE[name]
    broken = True

    def reply(question, number):
        return garbage if broken and B[1] in answers_in(question)[:1] else longer(question, number)

    with endpoint(reply) as server:
        judge = make(server, tmp_path)
        verdicts = judge(PROMPTS[:2], A[:2], B[:2])  # two of the four questions begin so
        failed = [verdict for verdict in verdicts if verdict.winner is None]
        assert failed and all(verdict.why.startswith(reason) for verdict in failed)
        assert set(judge.failures) == {reason} and "tie" not in winners(verdicts)
        assert reason in judge.report()
        before, broken = len(server.questions), False
        again = make(server, tmp_path)
        assert winners(again(PROMPTS[:2], A[:2], B[:2])) == ["a", "b"] and not again.failures
    assert len(server.questions) - before == judge.failures.total()  # nothing else was asked again


REFUSALS = [(401, "refuses the key in OPENAI_API_KEY .401"), (403, "refuses the key"),
            (404, "does not know the model 'm', or its address should end in /v1"),
            (429, "goes on refusing .*What was answered is kept")]


@pytest.mark.parametrize("status, said", REFUSALS)
def test_what_would_last_stops_the_judge(tmp_path, status, said):
    broken = True

    def reply(question, number):
        error = {"error": {"message": f"no, not with {KEY}"}}
        refuses = broken and number >= 3
        return sends(error, status, x_should_retry="false") if refuses else longer(question, number)

    with endpoint(reply) as server:
        with pytest.raises(ValueError, match=said) as caught:
            make(server, tmp_path, parallel=1)(PROMPTS, A, B)
        assert KEY not in str(caught.value) and caught.value.__suppress_context__  # nor in a traceback
        assert len(server.questions) <= 5  # one more may have been under way
        broken = False
        judge = make(server, tmp_path)
        assert winners(judge(PROMPTS, A, B)) == ["a", "b", "tie", "a"]
    assert judge.kept >= 3 and judge.asked + judge.kept == 6


def test_nobody_at_the_address(tmp_path):
    with endpoint(longer) as server:
        judge = make(server, tmp_path, retries=0)
    with pytest.raises(ValueError, match=rf"{server.url}/? cannot be reached .*refused"):
        judge(PROMPTS, A, B)


def test_an_endpoint_that_never_answers_is_given_up(tmp_path):
    prompts = [f"p{i}" for i in range(40)]
    with endpoint(lambda question, number: sends({"error": "temperature is not supported"}, 400)) as server:
        with pytest.raises(ValueError, match="10 requests .* not one answer: HTTP 400.*temperature"):
            make(server, tmp_path, parallel=1)(prompts, ["x"] * 40, ["y"] * 40)
    assert len(server.questions) < 20


def test_a_model_that_answers_nonsense_is_not_given_up(tmp_path):
    prompts = [f"p{i}" for i in range(12)]
    with endpoint(lambda question, number: completion("hm")) as server:
        judge = make(server, tmp_path)
        assert winners(judge(prompts, ["x"] * 12, ["y"] * 12)) == [None] * 12
    assert judge.failures == {"unreadable answer": 24} and not (tmp_path / "answers.jsonl").exists()


# -- a language model: what is kept, and what it costs --


def test_answers_are_kept_under_model_and_texts(tmp_path):
    with endpoint(longer) as server:
        make(server, tmp_path)(PROMPTS, A, B)
        assert len(server.questions) == 6
        judge = make(server, tmp_path)
        assert winners(judge(PROMPTS, A, B)) == ["a", "b", "tie", "a"] and len(server.questions) == 6
        assert (judge.asked, judge.kept, judge.tokens) == (0, 6, [0, 0])
        LLMJudge("other", endpoint=server.url, cache=tmp_path / "answers.jsonl")(PROMPTS, A, B)
        assert len(server.questions) == 12
        make(server, tmp_path)(["another\n\nTL;DR:", *PROMPTS[1:]], A, B)
        assert len(server.questions) == 14
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 14 and rows[0]["tokens"] == list(TOKENS)


def test_two_servers_that_call_their_model_the_same_are_two_judges(tmp_path):
    with endpoint(longer) as server, endpoint(lambda question, number: winner("tie")) as other:
        for at, said in ((server, "a"), (other, "tie"), (server, "a")):
            assert winners(make(at, tmp_path)(PROMPTS[:1], A[:1], B[:1])) == [said]
    assert len(server.questions) == len(other.questions) == 2


def test_the_same_question_is_asked_once(tmp_path):
    with endpoint(longer) as server:
        assert winners(make(server, tmp_path)(["p"] * 5, ["long one"] * 5, ["b"] * 5)) == ["a"] * 5
    assert len(server.questions) == 2


def test_cost_is_tokens_and_with_a_price_dollars(tmp_path):
    with endpoint(longer) as server:
        judge = make(server, tmp_path, price=(2.5, 10.0))
        judge(PROMPTS, A, B)
        assert judge.tokens == [600, 42]  # six requests
        assert "6 requests, 0 more answered from answers.jsonl; 600 tokens read, 42 written" in judge.report()
        assert "0.0019 $; 0 failed." in judge.report()  # 600 * 2.5e-6 + 42 * 10e-6 = 0.00192
        assert "$" not in make(server, tmp_path).report()


def test_an_answer_without_a_count_of_its_tokens_is_an_answer(tmp_path):
    usages = [{}, {"prompt_tokens": None, "completion_tokens": None}, {"prompt_tokens": 5}, None]

    def reply(question, number):
        return sends(json.loads(longer(question, number)[2]) | {"usage": usages[number]})

    with endpoint(reply) as server:
        judge = make(server, tmp_path, parallel=1)
        assert winners(judge(PROMPTS[:2], A[:2], B[:2])) == ["a", "b"]
        assert judge.tokens == [5, 0] and not judge.failures
        assert winners(make(server, tmp_path)(PROMPTS[:2], A[:2], B[:2])) == ["a", "b"]  # all were kept


PROGRAM = """
import sys
from tralign_mini.llm_judge import LLMJudge
LLMJudge("m", endpoint=sys.argv[1], cache=sys.argv[2], parallel=1)(
    [f"p{i}" for i in range(8)], ["long answer"] * 8, ["short"] * 8)
"""


def test_a_killed_judge_goes_on_where_it_stopped(tmp_path):
    def reply(question, number):
        if number == 5:
            process.kill()
        return longer(question, number)

    cache, prompts = tmp_path / "answers.jsonl", [f"p{i}" for i in range(8)]
    with endpoint(reply) as server:
        command = [sys.executable, "-c", PROGRAM, server.url, str(cache)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        assert process.wait(60) < 0 and len(cache.read_text().splitlines()) == 5
        with cache.open("a") as file:
            file.write('{"key": "half of a li')
        judge = make(server, tmp_path)
        assert winners(judge(prompts, ["long answer"] * 8, ["short"] * 8)) == ["a"] * 8
        assert (judge.asked, judge.kept) == (11, 5) and len(server.questions) == 6 + 11
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 16


@pytest.mark.parametrize("line, said", [
    ("nonsense", "not JSON"), ('{"key": "x"}', "no key or no answer"), ("[1]", "no key or no answer"),
    ('{"answer": "y"}', "no key"), ('{"key": "x", "answer": null}', "no answer"),
])
def test_a_damaged_file_of_answers_is_refused_and_left_as_it_is(tmp_path, line, said):
    text = f'{{"key": "x", "answer": "y"}}\n{line}\n{{"half of a li'
    (tmp_path / "answers.jsonl").write_text(text)
    with endpoint(longer) as server, pytest.raises(ValueError, match=f"answers.jsonl, line 2 .*{said}"):
        make(server, tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == text


# -- the key, and what is missing --


def test_the_key_is_nowhere_even_if_the_endpoint_repeats_it(tmp_path, capsys):
    def reply(question, number):
        if A[1] in answers_in(question) and number:
            return sends({"error": {"message": f"bad key {KEY}"}}, 400)
        return winner("A", f"your key is {KEY}, half a pair is \ud83d")

    with endpoint(reply) as server:
        judge = make(server, tmp_path)
        verdicts = judge(PROMPTS, A, B)
    everything = repr(verdicts) + judge.report() + "".join(capsys.readouterr())
    everything += "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in everything and "your key is ***" in everything and "bad key ***" in everything


def test_a_key_from_a_file_may_end_in_a_line_break_but_not_have_one_within(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")
    with endpoint(longer) as server:
        make(server, tmp_path)(PROMPTS[:1], A[:1], B[:1])
        assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
        for bad in (f"{KEY}\r{KEY}", f"{KEY}é"):
            monkeypatch.setenv("OPENAI_API_KEY", bad)
            with pytest.raises(ValueError, match="a character that is in no key") as caught:
                make(server, tmp_path)(PROMPTS, A, B)
            assert KEY not in str(caught.value)


def test_the_key_is_nowhere_even_if_it_is_in_the_address(tmp_path):
    with endpoint(longer) as server:
        server.url += f"/{KEY}"
        judge = make(server, tmp_path, retries=0)
    with pytest.raises(ValueError, match=r"/v1/\*\*\*/ cannot be reached") as caught:
        judge(PROMPTS, A, B)
    assert KEY not in str(caught.value)


def test_without_a_key_a_local_endpoint_is_enough(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with endpoint(longer) as server:
        assert winners(make(server, tmp_path)(PROMPTS[:1], A[:1], B[:1])) == ["a"]
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        LLMJudge("gpt", cache=tmp_path / "answers.jsonl")


def test_without_the_package_one_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'tralign-mini\[judge\]'"):
        LLMJudge("gpt", cache=tmp_path / "answers.jsonl")
