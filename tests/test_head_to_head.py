"""Two runs on the same prompts, by judges whose verdicts are known by hand; exports as others read them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from judge_helpers import completion, endpoint, longer, make
from test_report import PROMPTS, cells, write_run
from typer.testing import CliRunner

from tralign_mini import metrics, worlds
from tralign_mini.cli import app
from tralign_mini.export_outputs import export_outputs
from tralign_mini.head_to_head import head_to_head
from tralign_mini.judge import GoldJudge, RewardJudge, Verdict
from tralign_mini.llm_judge import CRITERIA


class Script:
    """A judge that says what it is told, prompt by prompt: "a", "b", "tie", or None for a failure."""

    name = "script"

    def __init__(self, winners):
        self.winners, self.asked = winners, []

    def __call__(self, prompts, a, b):
        self.asked.append((prompts, a, b))
        return [Verdict(winner, "because | it is") for winner in self.winners]


@pytest.fixture
def two(tmp_path):
    """Two runs on the same eight prompts."""
    soft = write_run(tmp_path / "soft", reference="soft", alpha=0.6, tau=4, gain=2.0)
    return write_run(tmp_path / "dpo"), soft


def row(result, name):
    return result.table.set_index("").loc[name].tolist()


def change(run, rewrite):
    """Pass the samples of a run through rewrite(number, row)."""
    path = run / "samples.jsonl"
    rows = [rewrite(i, json.loads(line)) for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))
    return run


def test_samples_without_their_texts_do_not_count(two):
    """As of the shipped grid's runs, which keep the texts of some prompts only."""
    for run in two:
        change(run, lambda i, row: row if i < 6 else {"gold_policy": 1.0, "gold_initial": 1.0})
    assert len(head_to_head(*two, judge=Script(["a"] * 6)).verdicts) == 6
    with pytest.raises(ValueError, match="no samples.jsonl with prompts and answers"):
        head_to_head(two[0], change(two[1], lambda i, row: {"gold_policy": 1.0}), judge=Script(["a"] * 6))


def test_rates_by_hand(two):
    result = head_to_head(*two, judge=Script(["a", "a", "a", "b", "tie", "tie", "a", "b"]))
    assert result.names == ("dpo", "soft") and result.win_rate.value == pytest.approx((4 + 1) / 8)
    assert row(result, "wins") == ["4", "2"] and row(result, "ties") == ["2", "2"]
    low, high = result.win_rate[1:]
    assert row(result, "win rate, ties half") == [
        f"0.62 [{low:.2f}, {high:.2f}]", f"0.38 [{1 - high:.2f}, {1 - low:.2f}]"]
    assert row(result, "win rate at equal length") == row(result, "win rate, ties half")  # seven words each
    assert "the judge failed" not in result.table[""].tolist() and not result.warnings


def test_failures_are_counted_apart_and_are_no_ties(two):
    judge = Script(["a", "a", "a", "b", None, None, None, "tie"])
    result = head_to_head(*two, judge=judge)
    assert result.win_rate == metrics.win_rate([1, 1, 1, 0, 0.5], [0, 0, 0, 1, 0.5])
    assert row(result, "ties") == ["1", "1"] and row(result, "the judge failed") == ["3", "3"]
    assert result.warnings == ["The judge failed on 3 of 8 prompts, which count in no rate."]
    with pytest.raises(ValueError, match="no verdict on any of the 8 prompts. because"):
        head_to_head(*two, judge=Script([None] * 8))


def test_a_judge_without_ratings_is_asked_for_none(two):
    with pytest.raises(ValueError, match="'script' gives no ratings"):
        head_to_head(*two, judge=Script(["a"] * 8), rate=True)


def test_swapping_the_runs_mirrors_everything(two):
    winners = ["a", "b", "a", "tie", "a", "a", "b", "a"]
    forth = head_to_head(*two, judge=Script(winners))
    other = [{"a": "b", "b": "a", "tie": "tie"}[name] for name in winners]
    back = head_to_head(*two[::-1], judge=Script(other))
    assert back.win_rate.value == pytest.approx(1 - forth.win_rate.value)
    assert back.table[["soft", "dpo"]].iloc[0].tolist() == forth.table[["soft", "dpo"]].iloc[0].tolist()
    kl = "KL to initial, nats a completion"
    assert row(back, kl) == row(forth, kl)[::-1] == ["4.00", "2.00"]


def test_the_judge_sees_the_policies_answers_to_the_same_prompts(two):
    """The second run has other prompts, too, in another order: each answer stays with its prompt."""
    dpo, soft = two
    change(dpo, lambda i, row: row | {"policy": f"dpo {i}"})
    change(soft, lambda i, row: row | {"policy": f"soft {i}"} | {"prompt": [f"other {i}", PROMPTS[i]][i > 2]})
    lines = (soft / "samples.jsonl").read_text().splitlines()
    (soft / "samples.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    judge = Script(["a"] * 5)
    result = head_to_head(dpo, soft, judge=judge)
    a, b = ([f"{name} {i}" for i in range(3, 8)] for name in ("dpo", "soft"))
    assert judge.asked == [(PROMPTS[3:], a, b)]
    assert "5 prompts" in result.notes[0]
    gold = [i / 10 + 1 + (i % 2) / 10 for i in range(3, 8)]  # and the measures are those of the five
    assert row(result, "gold reward")[0].startswith(f"{np.mean(gold):.2f} [")


def test_one_run_is_judged_against_its_initial_policy(two):
    judge = Script(["a"] * 8)
    result = head_to_head(two[1], judge=judge)
    assert result.names == ("soft", "initial policy")
    assert judge.asked[0][2] == [f"the dog ran {i}" for i in range(8)]
    assert row(result, "KL to initial, nats a completion") == ["4.00", "0.00"]  # 2 * gain
    assert row(result, "KL to initial, nats a token") == ["0.444", "0.000"]  # 4 / 9 tokens
    assert row(result, "KL to reference, nats a completion") == ["2.00", ""]
    assert row(result, "KL to reference, nats a token") == ["0.222", ""]
    assert row(result, "words a completion") == ["7.00", "4.00"]
    assert row(result, "distinct words") == [f"{15 / 72:.2f}", f"{11 / 32:.2f}"]  # a mark is a word, too


def test_equal_length_takes_out_what_length_explains(two):
    """The longer answer wins three times in four whoever gave it; a's are longer in 80 of 100."""
    texts = {"long": "w " * 20, "short": "w " * 10}
    sizes = [("long", "short")] * 80 + [("short", "long")] * 20
    winners = ["a"] * 60 + ["b"] * 20 + ["a"] * 5 + ["b"] * 15
    for run, side in zip(two, (0, 1)):
        write_run(run, prompts=[f"p{i}" for i in range(100)])
        change(run, lambda i, row, side=side: row | {"policy": texts[sizes[i][side]]})
    result = head_to_head(*two, judge=Script(winners))
    assert result.win_rate.value == 0.65
    assert result.length_controlled.value == pytest.approx(0.5, abs=1e-3)


def test_runs_that_differ_in_their_task_are_named(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", max_completion_tokens=20)
    assert head_to_head(a, b, judge=Script(["a"] * 8)).warnings == [
        "a and b differ in max_completion_tokens (512, 20)."]


@pytest.mark.parametrize("spoil, said", [
    (lambda run: (run / "samples.jsonl").unlink(), "soft has no samples.jsonl with prompts and answers"),
    (lambda run: change(run, lambda i, row: {"gold_policy": 1.0}), "soft has no samples.jsonl with prompts"),
    (lambda run: change(run, lambda i, row: row | {"prompt": f"other {i}"}), "sampled on different prompts"),
])
def test_runs_that_cannot_be_compared(two, spoil, said):
    spoil(two[1])
    with pytest.raises(ValueError, match=said):
        head_to_head(*two, judge=Script(["a"] * 8))


def test_the_page_shows_table_samples_and_verdicts(two, tmp_path):
    result = head_to_head(*two, judge=Script(["a", "b", "tie", None, "a", "a", "a", "a"]))
    page = result.save(tmp_path / "judged")
    text = page.read_text()
    assert page.name == "dpo-against-soft.md"
    assert text.startswith("# dpo against soft\n\n> **Warning.** The judge failed on 1 of 8 prompts")
    assert cells(text, "wins") == ["wins", "5", "1"]
    assert "| dpo | soft |" in text and "dog 0 ran off \\| \\`then\\` slept" in text
    prompts = text.split("### Prompt")[1:]
    for part, said in zip(prompts, ("dpo wins:", "soft wins:", "Tie:", "No verdict:")):
        assert f"**{said}** because \\| it is" in part
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["winner"] for row in rows][:4] == ["a", "b", "tie", None] and rows[2]["prompt"] == PROMPTS[2]
    assert rows[2]["a"] == "dog 2 ran off | `then` slept"


def test_the_gold_judge_agrees_with_the_samples_own_gold(tmp_path):
    world = worlds.world("little-hh")
    prompts = [world.make_prompt(random.Random(i)) for i in range(10)]
    run = write_run(tmp_path / "run", data="little-hh", model="little-hh", prompts=prompts)
    golds = {}
    for who, make_text in (("initial", lambda prompt: world.demonstration(prompt, random.Random(1))),
                           ("policy", lambda prompt: world.ideal(prompt))):
        texts = [make_text(prompt) for prompt in prompts]
        golds[who] = worlds.gold_reward("little-hh", prompts, texts)
        change(run, lambda i, row, who=who, texts=texts: row | {who: texts[i]})
    result = head_to_head(run, judge=GoldJudge("little-hh"))
    assert result.win_rate == metrics.win_rate(golds["policy"], golds["initial"])


def test_a_language_model_is_asked_rates_and_reports(two, tmp_path):
    change(two[0], lambda i, row: row | {"policy": "a much longer answer" if i % 2 else "x"})
    change(two[1], lambda i, row: row | {"policy": "an answer"})

    def reply(question, number):
        if "<answer>" not in question:
            return longer(question, number)
        return completion(json.dumps(dict.fromkeys(CRITERIA, 8 if "longer" in question else 4)))

    with endpoint(reply) as server:
        result = head_to_head(*two, judge=make(server, tmp_path), rate=True)
    assert row(result, "wins") == ["4", "4"]
    assert row(result, "helpfulness, 1 to 10")[0].startswith("6.00 [")
    assert row(result, "level of detail, 1 to 10")[1] == "4.00 [4.00, 4.00]"
    # of 64 pairs of ratings, half are 8 against 4, the others 4 against 4
    assert row(result, "probability of improvement, mean rating")[0].startswith("0.75 [")
    assert "on 0 the judge contradicted itself" in result.notes[1]
    assert "what it read first 8 times, what it read second 8 times" in result.notes[1]
    # 8 pairs in both orders; of the answers to be rated, each is one question, as the prompts differ
    assert "32 requests" in result.notes[2] and "0 failed." in result.notes[2]


def test_a_judge_that_favours_what_it_reads_first_is_told_on(two, tmp_path):
    change(two[1], lambda i, row: row | {"policy": "another"})
    with endpoint(lambda question, number: completion('{"reason": "x", "winner": "A"}')) as server:
        result = head_to_head(*two, judge=make(server, tmp_path))
    assert row(result, "ties") == ["8", "8"]
    assert "on 8 the judge contradicted itself: ties. It chose what it read first 16 times" in result.notes[1]


def test_the_reward_judge_gets_prompts_and_answers(two):
    class Length:
        def score(self, prompts, completions):
            assert prompts == PROMPTS
            return [float(len(text)) for text in completions]

    change(two[1], lambda i, row: row | {"policy": "x"})
    assert row(head_to_head(*two, judge=RewardJudge(Length())), "wins") == ["8", "0"]


# -- exports --


def test_alpaca_eval_file_by_hand(two, tmp_path):
    path = export_outputs(two[0], tmp_path / "out", format="alpaca_eval")
    rows = json.loads(path.read_text())
    assert path.name == "dpo.json" and len(rows) == 8
    output = "dog 1 ran off | `then` slept"
    assert rows[1] == {
        "instruction": PROMPTS[1], "output": output, "generator": "dpo", "dataset": "little-tldr"}
    path = export_outputs(two[0], tmp_path / "out", format="alpaca_eval", who="initial")
    assert json.loads(path.read_text())[0]["output"] == "the dog ran 0"
    assert json.loads(path.read_text())[0]["generator"] == path.stem == "dpo-initial"


def test_a_run_on_a_file_is_about_the_world_that_its_prompts_come_from(tmp_path):
    run = write_run(tmp_path / "noisy", data="pairs.jsonl", eval_data="little-tldr")
    path = export_outputs(run, tmp_path / "out", format="alpaca_eval")
    assert {row["dataset"] for row in json.loads(path.read_text())} == {"little-tldr"}
    done = CliRunner().invoke(app, ["evaluate", str(run), "--judge", "gold"])
    assert "No prompt of little-tldr" in str(done.exception)  # that world's judge was asked; these are none


def test_alpaca_eval_reads_the_file_with_its_own_code(two, tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils", reason="alpaca_eval is not installed")
    path = export_outputs(two[0], tmp_path, format="alpaca_eval")
    frame = utils.load_or_convert_to_dataframe(path)
    assert frame["output"].tolist() == [f"dog {i} ran off | `then` slept" for i in range(8)]
    assert frame["instruction"].tolist() == PROMPTS and utils.get_generator_name(None, frame) == "dpo"


def test_arena_hard_files_by_hand(two, tmp_path):
    """The keys that its gen_answer.py writes and its gen_judgment.py reads, but for the metadata of style."""
    chat = [{"role": "user", "content": "Hello?"}]
    change(two[0], lambda i, row: row | {"prompt": chat} if i == 0 else row)
    path = export_outputs(two[0], tmp_path / "bench", format="arena-hard", generator="mine")
    assert path == tmp_path / "bench" / "model_answer" / "mine.jsonl"
    questions, answers = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "bench" / "question.jsonl", path))
    assert [row["uid"] for row in answers] == [row["uid"] for row in questions] and len(answers) == 8
    assert len({row["uid"] for row in answers}) == len({row["ans_id"] for row in answers}) == 8
    assert set(questions[0]) == {"uid", "category", "subcategory", "prompt"}
    assert questions[0]["prompt"] == "user: Hello?"
    assert set(answers[1]) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert answers[1]["model"] == "mine"
    said = {"role": "assistant", "content": {"answer": "dog 1 ran off | `then` slept"}}
    assert answers[1]["messages"] == [{"role": "user", "content": PROMPTS[1]}, said]
    other = export_outputs(two[0], tmp_path / "bench", format="arena-hard", who="initial")
    assert other.parent == path.parent and json.loads(other.read_text().splitlines()[0])["uid"] == (
        answers[0]["uid"])


@pytest.mark.parametrize("settings, said", [
    ({"format": "csv"}, "no format 'csv'"), ({"run": "none"}, "none is not there"),
    ({"generator": "me/model"}, "generator='me/model' is also the name of a file: leave out the /"),
    ({"generator": "../model", "format": "arena-hard"}, "leave out the /")])
def test_exports_that_cannot_be(two, tmp_path, settings, said):
    settings = {"run": two[0], "folder": tmp_path / "out", "format": "alpaca_eval"} | settings
    with pytest.raises(ValueError, match=said):
        export_outputs(**settings)
    assert not (tmp_path / "out").exists()
