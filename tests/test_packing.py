"""Packed rows: a pair written out by hand, every group in one row, and how much padding and work is left."""

from __future__ import annotations

import math
import random

import pytest
import torch
from engine_helpers import groups
from helpers import EOS, random_rows, unpacked
from hypothesis import assume, given
from hypothesis import strategies as st

from tralign_mini.batches import StepStream, collate_rows, group_of
from tralign_mini.packing import fill, group_length, lay_out, pack
from tralign_mini.recipe import Recipe
from tralign_mini.sharing import PACKED

# ------------------------------------------------------------------------------------- two pairs by hand

PAIRS = [([3, 4, 5], [[10, 11], [12]]), ([6], [[20], [21, 22, 23]])]


def test_two_pairs_one_behind_the_other():
    batch = lay_out(PAIRS, 9, [[0, 1]])
    expected = {
        "input_ids": [[3, 4, 5, 10, 11, 12, 6, 20, 21, 22, 23]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]],
        "group": [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]],
        "branch": [[0, 0, 0, 1, 1, 2, 0, 1, 2, 2, 2]],
        # chosen 0, chosen 1, rejected 0, rejected 1; a prompt's last token predicts the first of each
        "source": [[2, 3, 0], [6, 0, 0], [2, 0, 0], [6, 8, 9]],
        "target": [[10, 11, 0], [20, 0, 0], [12, 0, 0], [21, 22, 23]],
        "counted": [[True, True, False], [True, False, False], [True, False, False], [True, True, True]],
        "last": [4, 7, 5, 10],
        "spans": [[0, 6], [0, 5]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_two_pairs_in_a_row_each():
    batch = lay_out(PAIRS, 9, [[1], [0]])
    expected = {
        "input_ids": [[6, 20, 21, 22, 23, 9], [3, 4, 5, 10, 11, 12]],
        "position_ids": [[0, 1, 1, 2, 3, 0], [0, 1, 2, 3, 4, 3]],
        "group": [[1, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0]],
        "branch": [[0, 1, 2, 2, 2, 0], [0, 0, 0, 1, 1, 2]],
        "source": [[8, 9, 0], [0, 0, 0], [8, 0, 0], [0, 2, 3]],
        "target": [[10, 11, 0], [20, 0, 0], [12, 0, 0], [21, 22, 23]],
        "counted": [[True, True, False], [True, False, False], [True, False, False], [True, True, True]],
        "last": [10, 1, 11, 4],
        "spans": [[0, 5], [1, 6]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert batch["input_ids"].dtype == batch["source"].dtype == torch.int64


def test_pack_is_the_layout_of_the_rows_that_fill_chooses():
    for limit, rows in ((1, [[0], [1]]), (11, [[0, 1]])):
        batch, expected = pack(PAIRS, 9, hidden_size=10**6, limit=limit), lay_out(PAIRS, 9, rows)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@given(groups, st.randoms(use_true_random=False))
def test_what_is_scored_are_the_completions_in_their_order_whatever_the_rows(groups, rng):
    """All first completions, then all second ones; each target is predicted by the token before it."""
    assume(any(ids for _, completions in groups for ids in completions))
    numbers = rng.sample(range(len(groups)), len(groups))
    cut = rng.randint(0, len(groups) - 1)
    batch = lay_out(groups, 0, [part for part in (numbers[:cut], numbers[cut:]) if part])
    expected = [(prompt, completions[k]) for k in (0, 1) for prompt, completions in groups]
    found = unpacked(batch)
    for (prompt, completion), (own, ids), counted in zip(found, expected, batch["counted"], strict=True):
        assert completion == ids
        assert prompt == own or not counted.any()
    ids, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    for (_, completion), last in zip(expected, batch["last"], strict=True):
        assert ids[last] == completion[-1] if completion else last == 0
    for (prompt, completion), source in zip(expected, batch["source"], strict=True):
        before = [*prompt, *completion][len(prompt) - 1 : -1] if completion else []
        assert ids[source[: len(completion)]].tolist() == before
        expected_positions = list(range(len(prompt) - 1, len(prompt) - 1 + len(completion)))
        assert positions[source[: len(completion)]].tolist() == expected_positions
    length = sum(map(group_length, groups))
    assert (batch["group"] >= 0).sum() == length and not batch["branch"][batch["group"] < 0].any()


def test_completions_without_a_token_score_nothing():
    batch = lay_out([([3, 4], [[], []])], 0, [[0]])
    assert batch["input_ids"].tolist() == [[3, 4]] and batch["counted"].shape == (2, 0)


def test_three_completions_share_a_prompt_too():
    batch = lay_out([([3], [[4], [5, 6], [7]])], 0, [[0]])
    assert batch["branch"].tolist() == [[0, 1, 2, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 1, 2, 1]]
    assert [completion for _, completion in unpacked(batch)] == [[4], [5, 6], [7]]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="nothing predicts the first token.*at least one"):
        pack([([3], [[4], [5]]), ([], [[4], [5]])], 0, hidden_size=8, limit=8)


# ------------------------------------------------------------------------------------------ which rows


def work(lengths, hidden_size):
    """Of rows with these lengths, padded to the longest: a transformer's products and its attention."""
    return len(lengths) * max(lengths) * (6 * hidden_size + max(lengths))


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=24)


@given(lengths, st.integers(1, 4096), st.integers(1, 900))
def test_every_group_stands_in_one_row_and_no_shared_row_exceeds_the_limit(lengths, hidden_size, limit):
    rows = fill(lengths, hidden_size, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and row for row in rows)
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= limit for row in rows)
    assert rows == fill(list(lengths), hidden_size, limit)


@given(lengths, st.integers(1, 4096), st.integers(1, 900))
def test_the_work_is_never_more_than_with_a_row_each(lengths, hidden_size, limit):
    totals = [sum(lengths[i] for i in row) for row in fill(lengths, hidden_size, limit)]
    assert work(totals, hidden_size) <= work(lengths, hidden_size)


def test_the_least_work_is_found_by_hand():
    # A row each: 3 of 60, half of two is padding. Two rows, [60] and [30, 30]: 2 of 60, all full
    assert sorted(fill([30, 60, 30], 1, 60)) == [[0, 2], [1]]
    # One row of 120 has as many tokens, and twice the attention
    assert sorted(fill([30, 60, 30], 10**6, 900)) == [[0, 2], [1]]
    # [50, 40]: one row of 90 instead of two of 50. 90 (6h + 90) < 100 (6h + 50) where h > 51.7
    assert fill([50, 40], 51, 900) == [[0], [1]]
    assert fill([50, 40], 52, 900) == [[0, 1]]
    assert fill([50, 40], 52, 89) == [[0], [1]]


def test_a_group_beyond_the_limit_stands_alone():
    assert sorted(fill([600, 290, 290], 512, 512)) == [[0], [1], [2]]  # 580 is over the limit
    assert sorted(fill([600, 200, 200, 200], 512, 512)) == [[0], [1, 3], [2]]


# HH-like and TL;DR-like: tokens of prompts and of completions, log-normal, cut at the recipes' limits
SHAPES = {"hh": ((125, 0.8), (45, 0.9), 512, 512), "tldr": ((350, 0.35), (40, 0.4), 512, 64)}


def realistic_rows(shape, count, seed=0):
    (prompt, spread), (completion, more), prompt_limit, completion_limit = SHAPES[shape]
    rng = random.Random(seed)

    def length(median, sigma, limit):
        return max(2, min(limit, round(median * math.exp(sigma * rng.gauss(0, 1)))))

    return [{"prompt_ids": [3] * length(prompt, spread, prompt_limit),
             "chosen_ids": [4] * length(completion, more, completion_limit),
             "rejected_ids": [5] * length(completion, more, completion_limit)} for _ in range(count)]


@pytest.mark.parametrize("hidden_size", [512, 2048])
@pytest.mark.parametrize("micro", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_stays_under_a_tenth_on_realistic_lengths(shape, micro, hidden_size):
    """Over an epoch of steps of 64 pairs, by length within a step, in micro-batches as in training."""
    rows = realistic_rows(shape, 1024)
    longest = max(group_length(group_of(row)) for row in rows)
    stream = StepStream(rows, Recipe(model="none", data="none", batch_size=64), steps=16)
    real = stored = plain = shared_work = plain_work = 0
    for first in range(0, len(stream), micro):
        groups = [group_of(stream[i]) for i in range(first, first + micro)]
        bins = fill([group_length(group) for group in groups], hidden_size, max(PACKED, longest))
        real += sum(map(group_length, groups))
        totals = [sum(group_length(groups[i]) for i in row) for row in bins]
        whole = 2 * micro * [max(len(p) + len(ids) for p, completions in groups for ids in completions)]
        stored, shared_work = stored + len(bins) * max(totals), shared_work + work(totals, hidden_size)
        plain, plain_work = plain + sum(whole), plain_work + work(whole, hidden_size)
    assert 1 - real / stored < 0.1
    assert plain / stored > {"hh": 1.4, "tldr": 1.6}[shape]  # tokens of the two whole sequences a pair
    assert plain_work / shared_work > 1.7


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rows_of_a_batch_are_those_of_fill(shape):
    rows = realistic_rows(shape, 8)
    batch = collate_rows(rows, "dpo", 0, hidden_size=512, limit=1100)["sequences"]
    bins = fill([group_length(group_of(row)) for row in rows], 512, 1100)
    found = [[i for i in range(8) if (row == i).any()] for row in batch["group"]]
    assert found == bins


def test_a_batch_is_the_same_every_time():
    rows = random_rows("dpo", 16)
    one, other = (collate_rows(rows, "dpo", EOS, hidden_size=32, limit=40)["sequences"] for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
