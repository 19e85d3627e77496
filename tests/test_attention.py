"""Attention piece by piece: the same numbers and gradients as with the mask, and less of it computed."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from engine_helpers import (
    FAMILIES,
    assert_same_gradients,
    build,
    gradients_of,
    groups,
    random_groups,
    sequences_of,
    weighted,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tralign_mini import attention
from tralign_mini.data import collate
from tralign_mini.logprobs import completion_logps, plain_completion_logps
from tralign_mini.packing import fill, group_length, lay_out
from tralign_mini.sharing import row_limit

model_of = functools.cache(lambda family, **config: build(family, attn_implementation="sdpa", **config))
each_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Gemma2"])  # eager only
with_a_patch = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def seen(monkeypatch):
    """Piece by piece in tiny models, too; (queries, keys) of each piece that was attended to that way."""
    monkeypatch.setattr(attention, "LEAST_WIDTH", 0)
    monkeypatch.setattr(attention, "PIECE", 5)
    seen, sdpa = [], attention.sdpa_attention_forward

    def spy(module, query, key, value, mask, **options):
        if mask is not None:  # it is where one token is tried (logprobs._is_all_there_is)
            seen.append((query.shape[2], key.shape[2]))
        return sdpa(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return seen


@each_family
@with_a_patch
@given(groups=groups, rows=st.integers(1, 4), pad=st.integers(0, 63))
def test_equal_to_whole_sequences_in_value_and_gradient(seen, family, groups, rows, pad):
    model = model_of(family)
    bins = [list(range(row, len(groups), rows)) for row in range(min(rows, len(groups)))]
    seen.clear()
    found = completion_logps(model, lay_out(groups, pad, bins))
    assert sum(queries for queries, _ in seen) == 2 * sum(map(group_length, groups))  # in both layers
    assert max(seen)[0] <= 5
    expected = plain_completion_logps(model, collate(sequences_of(groups), 0))
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=1e-5)
    if expected.abs().max() > 0:
        assert_same_gradients(gradients_of(model, weighted(found)), gradients_of(model, weighted(expected)))


def test_with_gradient_checkpointing(seen):
    groups, model = random_groups(5), build("GPTNeoX", attn_implementation="sdpa")
    batch = lay_out(groups, 0, [[0, 3], [1, 2, 4]])
    expected = gradients_of(model, weighted(completion_logps(model, batch)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = seen.copy()
    seen.clear()
    found = gradients_of(model, weighted(completion_logps(model, batch)))
    assert_same_gradients(found, expected)
    assert sorted(seen) == sorted(forward + forward)  # again for the gradient


def test_a_prompt_alone_and_empty_completions(seen):
    groups = [([3, 4], [[], []]), ([5], [[6], []]), ([7, 8, 9], [[], [10, 11]])]
    model = model_of("Llama")
    expected = plain_completion_logps(model, collate(sequences_of(groups), 0))
    torch.testing.assert_close(completion_logps(model, lay_out(groups, 0, [[0, 1, 2]])), expected)


def test_what_the_mask_rules_out_is_not_computed(seen):
    groups = [([3] * 9, [[4] * 2, [5] * 3]), ([6] * 5, [[7], [8] * 2])]  # 14 and 8 tokens
    completion_logps(model_of("GPTNeoX"), lay_out(groups, 0, [[0, 1]]))
    assert seen == [(4, 4), (5, 9), (5, 14), (4, 4), (4, 8)] * 2  # not 22 of 22


def test_windows_that_overlap_add_their_gradients():
    tensor = torch.arange(6.0).view(1, 1, 6, 1).requires_grad_()
    first, second = attention._Windows.apply(tensor, [(0, 0, 2), (0, 0, 5)])
    assert first.flatten().tolist() == [0, 1] and second.flatten().tolist() == [0, 1, 2, 3, 4]
    (first.sum() + 10 * second.sum()).backward()
    assert tensor.grad.flatten().tolist() == [11, 11, 10, 10, 10, 0]


def test_masks_that_know_no_groups_are_used_as_they_are(seen):
    batch = lay_out(random_groups(3), 0, [[0, 1, 2]])
    found = completion_logps(model_of("GPTNeoX"), batch)
    seen.clear()
    width = batch["input_ids"].shape[1]
    del batch["spans"]
    torch.testing.assert_close(completion_logps(model_of("GPTNeoX"), batch), found)
    assert seen == [(width, width)] * 2


def test_where_it_is_used():
    wide = {"hidden_size": 256, "intermediate_size": 64}
    assert attention.by_group(build("GPTNeoX", attn_implementation="sdpa", **wide))
    assert not attention.by_group(build("GPTNeoX", attn_implementation="eager", **wide))
    assert not attention.by_group(build("GPTNeoX", attn_implementation="sdpa"))
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    model = build("GPTNeoX", attn_implementation="sdpa", **wide)
    model.parameters = lambda: iter([on_gpu])
    assert not attention.by_group(model)


def test_rows_are_long_and_hold_little_padding(seen):
    assert row_limit(model_of("GPTNeoX"), random_groups(4), 0) == 2048
    assert fill([400, 480, 350, 500], 0, 2048) == [[0, 1, 2, 3]]
    assert sorted(fill([400, 480, 350, 500], 0, 900)) == [[0, 1], [2, 3]]
    assert sorted(fill([600, 300, 300], 0, 600)) == [[0], [1, 2]]
