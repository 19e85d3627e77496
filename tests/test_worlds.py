"""The embedded worlds: the facade, little-tldr's generator and gold reward, the data of both as shipped."""
from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tralign_mini import little_tldr, worlds
from tralign_mini.generate import sample

POST = ("SUBREDDIT: r/work\n\nTITLE: Trouble with my boss\n\nPOST: Yesterday my boss sued the waiter. "
        "It was raining. Then my aunt ruined the wedding. By the way, my uncle broke my laptop. "
        "I dreamed that I went home. So I moved out.\n\nTL;DR:")
BEST = " my boss sued the waiter; my aunt ruined the wedding; I moved out."


def gold(completion: str) -> float:
    return little_tldr.gold_reward(POST, completion)


# ---------------------------------------------------------------- the facade


def test_worlds_are_found_by_name():
    assert worlds.WORLDS == ("little-tldr", "little-hh")
    assert worlds.world("little-tldr") is little_tldr
    for name in worlds.WORLDS:
        for function in ("make_prompt", "demonstration", "ideal", "gold_reward", "explain"):
            assert callable(getattr(worlds.world(name), function))


def test_an_unknown_world_is_refused_with_the_names_that_exist():
    for ask in (worlds.world, worlds.data_directory, lambda name: worlds.gold_reward(name, [], [])):
        with pytest.raises(ValueError, match="'tldr'.*little-tldr, little-hh"):
            ask("tldr")


def test_gold_reward_of_lists():
    assert worlds.gold_reward("little-tldr", [POST, POST], [BEST, " I moved out."]) == [3.0, 1.0]
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        worlds.gold_reward("little-tldr", [POST, POST], [BEST])


def test_data_are_found_in_a_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "tralign_mini"
    monkeypatch.setattr(worlds, "__file__", str(package / "worlds.py"))
    with pytest.raises(FileNotFoundError, match="python data/make.py"):
        worlds.data_directory("little-hh")
    (package / "_data" / "little-tldr").mkdir(parents=True)
    assert worlds.data_directory("little-hh") == package / "_data" / "little-hh"
    (tmp_path / "data" / "little-tldr").mkdir(parents=True)
    assert worlds.data_root() == tmp_path / "data"


# ---------------------------------------------------------------- little-tldr: the gold reward


@pytest.mark.parametrize("completion, reward", [
    (BEST, 3.0),
    (BEST.upper(), 3.0),
    ("my aunt ruined the wedding, my boss sued the waiter and I moved out", 3.0),
    (" I moved out.", 1.0),
    (" my aunt ruined the parade.", -1.0),  # invented: the wrong object
    (" my boss ruined the wedding.", -1.0),  # invented: two facts mixed up
    (" I quit.", -1.0),
    (" my boss ate the wedding.", -1.0),  # an event, if a strange one
    (" my uncle broke my laptop.", -0.5),  # an aside
    (" I went home.", -0.5),  # dreamed, so it does not matter
    (" it was raining.", -0.5),
    (" long story short; I moved out.", 0.5),
    (" I moved out; I moved out.", 0.5),
    (" I moved out; I moved out; I moved out.", 0.0),
    (" I I moved moved out.", 0.0),  # two words doubled
    (" I quit; I quit.", -1.5),
    (" my boss sued.", -0.5),  # three words that are no clause
    (" my boss sued the waiter my aunt ruined the wedding.", -1.5),  # ten words run together: fillers of four
    (" ;;;", -2.0),
    (" .", 0.0),
    ("", 0.0),
    (" banana" * 3, -1.5),  # one filler, two repetitions
    (" " + "my boss ate a pie " * 9, -6.0),  # the floor
])
def test_gold_reward_by_hand(completion, reward):
    assert gold(completion) == reward


def test_explain_names_the_parts():
    text = " anyway; I moved out; I quit; I moved out; my uncle broke my laptop; pie."
    parts = {"facts": 1.0, "invented": -1.0, "filler": -1.5, "repetition": -0.5, "floor": 0.0}
    assert little_tldr.explain(POST, text) == parts
    assert gold(text) == -2.0
    assert little_tldr.explain(POST, " my I" * 40)["floor"] == 4.0  # 80 words are 20 fillers


@pytest.mark.parametrize("opening, matters", [
    ("", True), ("It turns out ", True), ("The problem is that ", True), ("Not that it matters, but ", False),
    ("Years ago ", False), ("In a movie I saw, ", False), ("I was joking that ", False),
])
def test_wording_alone_decides_what_matters(opening, matters):
    sentence = opening + "my boss sued the waiter."
    prompt = f"SUBREDDIT: r/work\n\nTITLE: X\n\nPOST: {sentence[0].upper() + sentence[1:]}\n\nTL;DR:"
    assert little_tldr.gold_reward(prompt, " my boss sued the waiter.") == (1.0 if matters else -0.5)


@pytest.mark.parametrize("prompt, complaint", [
    ("", "No prompt of little-tldr"),
    ("Tell me a story", "No prompt of little-tldr"),
    (POST + " ", "No prompt of little-tldr"),
    (POST.replace("It was raining", "Ideas sleep"), "cannot read the sentence 'Ideas sleep.'"),
    (POST.replace("Yesterday my", "Tomorrow my"), "cannot read the sentence 'Tomorrow my boss"),
])
def test_foreign_prompts_are_refused(prompt, complaint):
    with pytest.raises(ValueError, match=complaint):
        little_tldr.gold_reward(prompt, BEST)


WORDS = st.sampled_from(BEST.replace(";", " ;").split() + ["anyway", "pie", "I", "and", ",", "\n"])


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(WORDS, max_size=40).map(" ".join)))
def test_any_completion_gets_a_finite_reward_within_bounds(completion):
    reward = gold(completion)
    assert little_tldr.LOWEST <= reward <= little_tldr.OPTIMUM
    assert reward == sum(little_tldr.explain(POST, completion).values())
    assert gold(completion + "; " + completion) <= reward  # saying it all again never pays


# ---------------------------------------------------------------- little-tldr: the generator


@given(st.integers())
@settings(max_examples=200, deadline=None)
def test_every_post_reads_back_as_it_was_made(seed):
    prompt = little_tldr.make_prompt(random.Random(seed))
    assert prompt == little_tldr.make_prompt(random.Random(seed))
    assert 5 <= len(re.findall(r"\.( |\n)", prompt)) <= 7  # sentences
    post = little_tldr.parse_prompt(prompt)
    assert len(set(post.facts)) == little_tldr.OPTIMUM
    assert little_tldr.gold_reward(prompt, little_tldr.ideal(prompt)) == little_tldr.OPTIMUM
    assert not set(post.facts) & set(post.asides)
    assert all(little_tldr.gold_reward(prompt, f" {fact}.") == 1.0 for fact in post.facts)
    assert all(little_tldr.gold_reward(prompt, f" {aside}.") == -0.5 for aside in post.asides)


def test_openings_and_chatter_are_not_ambiguous():
    matter = set(little_tldr.FACT_OPENINGS + little_tldr.DECISION_OPENINGS)
    idle = set(little_tldr.ASIDE_OPENINGS + little_tldr.IDLE_OPENINGS)
    assert not matter & idle
    assert not any(a != b and a and b.startswith(a) for a in matter | idle for b in matter | idle)


def test_demonstrations_are_good_but_not_perfect():
    rng = random.Random(0)
    prompts = [little_tldr.make_prompt(rng) for _ in range(3000)]
    rewards = [little_tldr.gold_reward(p, little_tldr.demonstration(p, rng)) for p in prompts]
    assert 1.2 < fmean(rewards) < 1.9
    assert max(rewards) == little_tldr.OPTIMUM and min(rewards) < 0


def test_distinct_prompts():
    small = dict(PEOPLE=("my boss", "my aunt", "my uncle"), DECISIONS=("quit", "cried"),
                 SUBREDDITS={"r": ("a", "b")},
                 EVENTS={"a": (["saw"], ["x", "y"]), "b": (["met", "hit"], ["z"])})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(little_tldr, name, value)
        people, decisions, events = 3 * 2, 2, (1 * 2) * (2 * 1)
        assert little_tldr.distinct_prompts() == people * decisions * events
    assert little_tldr.distinct_prompts() > 100_000_000
    kinds = [frozenset(pair) for pair in little_tldr.SUBREDDITS.values()]
    assert len(set(kinds)) == len(kinds)  # else posts would be counted twice


# ---------------------------------------------------------------- the data as shipped


def rows_of(name: str, split: str) -> list[dict]:
    with gzip.open(worlds.data_directory(name) / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module", params=worlds.WORLDS)
def shipped(request):
    name = request.param
    return name, rows_of(name, "train"), rows_of(name, "test")


def test_shipped_pairs_have_the_promised_shape(shipped):
    name, train, test = shipped
    assert (len(train), len(test)) == (10_000, 1_000)
    for row in train + test:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["chosen"] != row["rejected"]
        assert all(text.startswith(" ") and text.strip() for text in (row["chosen"], row["rejected"]))
    assert len({row["prompt"] for row in train + test}) == len(train + test)  # no test prompt is trained on


def test_shipped_labels_follow_bradley_terry_on_the_gold_reward(shipped):
    name, train, test = shipped
    rows, gold = train + test, worlds.world(name).gold_reward
    gaps = [gold(row["prompt"], row["chosen"]) - gold(row["prompt"], row["rejected"]) for row in rows]
    scale = float(re.search(r"sigmoid\(([\d.]+) \(gold", card(name))[1])
    for size in (0.5, 1.0, 1.5, 2.0, 3.0):
        near = [gap > 0 for gap in gaps if abs(gap) == size]
        expected = 1 / (1 + math.exp(-scale * size))
        error = math.sqrt(expected * (1 - expected) / len(near))
        assert fmean(near) == pytest.approx(expected, abs=4 * error)
    flipped = fmean(gap < 0 for gap in gaps if gap)
    assert 0.13 < flipped < 0.21


def card(name: str) -> str:
    return (worlds.data_directory(name) / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_the_truth(shipped):
    name, train, test = shipped
    make = load_make()
    tokenizer = AutoTokenizer.from_pretrained(worlds.data_directory(name) / "model")
    for what, value in make.measure(worlds.world(name), tokenizer, train, test).items():
        assert f"| {what} | {value} |" in card(name)
    assert f"{worlds.world(name).distinct_prompts():,}" in card(name)
    hashes = re.findall(r"\| (\S+) \| ([0-9a-f]{64}) \|", card(name))
    folder = worlds.data_directory(name)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"README.md"}
    assert {file for file, _ in hashes} == files
    for file, digest in hashes:
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest


def load_make():
    """data/make.py as a module (it is no part of the package)."""
    path = Path(__file__).parent.parent / "data" / "make.py"
    spec = importlib.util.spec_from_file_location("make_worlds", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_shipped_model_is_worse_than_the_optimum_and_better_than_chance(shipped):
    name, train, test = shipped
    folder = worlds.data_directory(name) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 1_200_000 and model.dtype == torch.float32
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 3
    prompts = [row["prompt"] for row in test[:100]]
    gold = fmean(worlds.gold_reward(name, prompts, sample(
        model, tokenizer, prompts, max_completion_tokens=48, batch_size=100).texts))
    chance = fmean(worlds.gold_reward(name, prompts, [row["chosen"] for row in test[1:101]]))
    assert chance + 1.0 < gold < 0.5 * worlds.world(name).OPTIMUM
    assert gold > 0.1 * worlds.world(name).OPTIMUM


def test_shipped_texts_tokenize_as_the_prompt_and_then_the_completion(shipped):
    name, train, test = shipped
    tokenizer = AutoTokenizer.from_pretrained(worlds.data_directory(name) / "model")
    for row in test[:200]:
        for text in (row["chosen"], row["rejected"]):
            whole = tokenizer(row["prompt"] + text)["input_ids"]
            assert whole == tokenizer(row["prompt"])["input_ids"] + tokenizer(text)["input_ids"]
    strange = "Zoë, 日本 \t\n\n naïve 🙂  two  spaces"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_the_data_are_small(shipped):
    name, *_ = shipped
    size = sum(path.stat().st_size for path in worlds.data_directory(name).rglob("*") if path.is_file())
    assert size < 6_000_000
    for split in ("train", "test"):
        header = (worlds.data_directory(name) / f"{split}.jsonl.gz").read_bytes()[:8]
        assert header[4:8] == b"\0\0\0\0"  # no time stamp: made again, the file has the same bytes


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_the_command_makes_the_shipped_tokenizer_again(name):
    again = load_make().make_tokenizer(worlds.world(name), name)
    shipped = AutoTokenizer.from_pretrained(worlds.data_directory(name) / "model")
    assert again.get_vocab() == shipped.get_vocab()  # so the generator is still the one that made the data


def test_make_starts_from_the_same_weights_and_batches():
    make = load_make()
    tokenizer = AutoTokenizer.from_pretrained(worlds.data_directory("little-tldr") / "model")
    first, second = (make.make_model(tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    batches = [make.demonstration_batches(little_tldr, tokenizer, random.Random(1), set(), pool=2)
               for _ in range(2)]
    for (ids, labels), (same_ids, same_labels) in zip(*batches, strict=True):
        assert torch.equal(ids, same_ids) and torch.equal(labels, same_labels)


def test_demonstration_batches_train_on_the_completion_and_its_end_alone():
    make, seen = load_make(), set()
    tokenizer = AutoTokenizer.from_pretrained(worlds.data_directory("little-tldr") / "model")
    for ids, labels in make.demonstration_batches(little_tldr, tokenizer, random.Random(1), seen, pool=2):
        for row, wanted in zip(ids, labels):
            prompt = tokenizer.decode(row[: int((wanted != -100).nonzero()[0])])
            completion = wanted[wanted != -100]
            assert prompt in seen and completion[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in completion[:-1]
            assert tokenizer.decode(completion[:-1]).startswith(" ")
    assert len(seen) == 2 * 64
