"""Which rows an optimizer step holds, and how a micro-batch of them becomes tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import EOS, PAD, make_trainer, random_rows, unpacked
from hypothesis import given
from hypothesis import strategies as st

from tralign_mini.batches import StepStream, collate_rows
from tralign_mini.recipe import Recipe


def recipe(method="dpo", **settings):
    return Recipe(**{"model": "none", "data": "none", "method": method, "batch_size": 4} | settings)


def test_every_epoch_holds_each_row_once_in_an_order_of_its_own():
    rows = random_rows("dpo", 12)
    stream = StepStream(rows, recipe(), steps=6)
    epochs = [[rows.index(stream[i]) for i in range(start, start + 12)] for start in (0, 12)]
    assert len(stream) == 24
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_a_step_may_cross_the_end_of_an_epoch_and_loses_no_row():
    rows = random_rows("dpo", 6)
    stream = StepStream(rows, recipe(), steps=3)  # 12 rows: exactly two epochs, the second step is in both
    assert Counter(rows.index(stream[i]) for i in range(12)) == dict.fromkeys(range(6), 2)


def test_the_order_depends_on_the_seed_alone():
    rows = random_rows("dpo", 12)

    def order(**settings):
        return list(StepStream(rows, recipe(**settings), steps=3).order)

    assert order(seed=1) == order(seed=1, micro_batch_size=1)
    assert order(seed=1) != order(seed=2)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_optimizer_step_holds_the_same_rows_however_it_is_cut(method, tmp_path):
    def steps(micro):
        trainer = make_trainer(tmp_path, method=method, micro_batch_size=micro)
        loader, found = iter(trainer.get_train_dataloader()), []
        for _ in range(4):
            batches = [next(loader) for _ in range(8 // micro)]
            found.append(
                Counter(
                    (tuple(prompt), tuple(completion))
                    for batch in batches
                    for name in batch.keys() & {"sequences", "mismatched"}
                    for prompt, completion in unpacked(batch[name])
                )
            )
        return found

    whole = steps(8)
    assert sum(whole[0].values()) == 16  # 8 pairs, or 8 completions and 8 mismatched ones
    assert steps(4) == steps(2) == steps(1) == whole


@given(st.lists(st.integers(0, 3), min_size=8, max_size=16), st.integers(0, 99))
def test_a_mismatched_completion_is_of_another_prompt_of_the_same_step(prompts, seed):
    rows = [{"prompt_ids": [p], "completion_ids": [i], "label": True} for i, p in enumerate(prompts)]
    settings = recipe("kto", seed=seed)
    try:
        stream = StepStream(rows, settings, steps=2)
    except ValueError:  # refused: then a step really has a single prompt
        order = StepStream(rows, recipe("sft", seed=seed), steps=2).order
        assert min(len({prompts[i] for i in order[start : start + 4]}) for start in (0, 4)) == 1
        return
    for start in (0, 4):
        members = {stream[i]["completion_ids"][0] for i in range(start, start + 4)}
        for i in range(start, start + 4):
            [other] = stream[i]["mismatched_ids"]
            assert other in members
            assert prompts[other] != stream[i]["prompt_ids"][0]


def test_different_prompts_use_each_completion_once():
    rows = random_rows("kto", 8)
    stream = StepStream(rows, recipe("kto"), steps=2)
    for start in (0, 4):
        step = [stream[i] for i in range(start, start + 4)]
        assert sorted(r["mismatched_ids"] for r in step) == sorted(r["completion_ids"] for r in step)


def test_kto_refuses_a_step_with_a_single_prompt_and_says_which():
    rows = random_rows("kto", 8, prompts=1)
    with pytest.raises(ValueError, match=r"optimizer step 1 holds a single prompt.*batch_size"):
        StepStream(rows, recipe("kto"), steps=2)
    StepStream(rows, recipe("sft"), steps=2)  # no reference point, no need


def test_the_stream_itself_is_not_changed_by_what_is_added_for_kto():
    rows = random_rows("kto", 8)
    stream = StepStream(rows, recipe("kto"), steps=2)
    assert "mismatched_ids" in stream[0]
    assert not any("mismatched_ids" in row for row in rows)


def test_the_hash_knows_every_token_and_the_order():
    rows = random_rows("dpo", 8)
    changed = [*rows[:-1], rows[-1] | {"chosen_ids": [9, EOS]}]
    hashes = [StepStream(r, recipe(), steps=2).hash() for r in (rows, list(rows), changed, rows[::-1])]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_pairs_are_collated_chosen_first_then_rejected():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, EOS], "rejected_ids": [8]},
        {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11, 12, EOS]},
    ]
    batch = collate_rows(rows, "dpo", PAD)
    assert batch.keys() == {"sequences"}
    expected = [([5, 6], [7, EOS]), ([9], [10]), ([5, 6], [8]), ([9], [11, 12, EOS])]
    assert unpacked(batch["sequences"]) == expected


def test_with_a_limit_the_same_completions_share_their_prompts():
    rows = random_rows("dpo", 6)
    plain = collate_rows(rows, "dpo", PAD)["sequences"]
    shared = collate_rows(rows, "dpo", PAD, hidden_size=32, limit=40)["sequences"]
    assert "position_ids" in shared and "position_ids" not in plain
    assert unpacked(shared) == unpacked(plain)


def test_reference_log_probs_of_a_row_follow_its_completions():
    rows = [row | {"reference_logps": [-i, -10 - i]} for i, row in enumerate(random_rows("dpo", 3))]
    assert collate_rows(rows, "dpo", PAD)["reference_logps"].tolist() == [0, -1, -2, -10, -11, -12]


def test_kto_rows_are_collated_with_their_labels_and_mismatched_completions():
    rows = [
        {"prompt_ids": [5], "completion_ids": [7, EOS], "label": True, "mismatched_ids": [8]},
        {"prompt_ids": [9], "completion_ids": [8], "label": False, "mismatched_ids": [7, EOS]},
    ]
    batch = collate_rows(rows, "kto", PAD)
    assert unpacked(batch["sequences"]) == [([5], [7, EOS]), ([9], [8])]
    assert unpacked(batch["mismatched"]) == [([5], [8]), ([9], [7, EOS])]
    shared = collate_rows(rows, "kto", PAD, hidden_size=32, limit=40)
    assert unpacked(shared["sequences"]) == unpacked(batch["sequences"]) + unpacked(batch["mismatched"])
    assert "mismatched" not in shared
    assert batch["desirable"].tolist() == [True, False] and batch["desirable"].dtype == torch.bool


def test_demonstrations_are_collated_as_they_are():
    batch = collate_rows([{"prompt_ids": [5], "completion_ids": [7, EOS]}], "sft", PAD)
    assert batch.keys() == {"sequences"}
    assert unpacked(batch["sequences"]) == [([5], [7, EOS])]
