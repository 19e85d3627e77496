"""Attention group by group: the same numbers and gradients as with the mask, and less of it computed."""

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
from tralign_mini.packing import fill, lay_out
from tralign_mini.sharing import row_limit

model_of = functools.cache(lambda family, **config: build(family, attn_implementation="sdpa", **config))
each_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Gemma2"])  # eager only
with_a_patch = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def rows_seen(monkeypatch):
    """Group by group in tiny models, too; the groups of each row that was attended to that way."""
    monkeypatch.setattr(attention, "LEAST_WIDTH", 0)
    seen, in_row = [], attention._attend_in_row

    def spy(module, query, key, value, mask, groups, **options):
        seen.append(groups)
        return in_row(module, query, key, value, mask, groups, **options)

    monkeypatch.setattr(attention, "_attend_in_row", spy)
    return seen


@each_family
@with_a_patch
@given(groups=groups, rows=st.integers(1, 4), pad=st.integers(0, 63))
def test_equal_to_whole_sequences_in_value_and_gradient(rows_seen, family, groups, rows, pad):
    model = model_of(family)
    bins = [list(range(row, len(groups), rows)) for row in range(min(rows, len(groups)))]
    rows_seen.clear()
    found = completion_logps(model, lay_out(groups, pad, bins))
    sizes = [[(len(groups[i][0]), sum(map(len, [groups[i][0], *groups[i][1]]))) for i in row] for row in bins]
    assert rows_seen == sizes * 2  # in both layers
    expected = plain_completion_logps(model, collate(sequences_of(groups), 0))
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=1e-5)
    if expected.abs().max() > 0:
        assert_same_gradients(gradients_of(model, weighted(found)), gradients_of(model, weighted(expected)))


def test_with_gradient_checkpointing(rows_seen):
    groups, model = random_groups(5), build("GPTNeoX", attn_implementation="sdpa")
    batch = lay_out(groups, 0, [[0, 3], [1, 2, 4]])
    expected = gradients_of(model, weighted(completion_logps(model, batch)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rows_seen.clear()
    found = gradients_of(model, weighted(completion_logps(model, batch)))
    assert_same_gradients(found, expected)
    assert len(rows_seen) == 2 * 2 * 2  # rows, layers, forward and again for the gradient


def test_a_prompt_alone_and_empty_completions(rows_seen):
    groups = [([3, 4], [[], []]), ([5], [[6], []]), ([7, 8, 9], [[], [10, 11]])]
    model = model_of("Llama")
    expected = plain_completion_logps(model, collate(sequences_of(groups), 0))
    torch.testing.assert_close(completion_logps(model, lay_out(groups, 0, [[0, 1, 2]])), expected)


def test_what_the_mask_rules_out_is_not_computed(rows_seen, monkeypatch):
    scores, sdpa = [], attention.sdpa_attention_forward

    def counted(module, query, key, value, mask, **options):
        scores.append((query.shape[2] * key.shape[2], mask is None))
        return sdpa(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    groups = [([3] * 9, [[4] * 2, [5] * 3]), ([6] * 5, [[7], [8] * 2])]
    completion_logps(model_of("GPTNeoX"), lay_out(groups, 0, [[0, 1]]))
    assert scores == [(9 * 9, True), (5 * 14, False), (5 * 5, True), (3 * 8, False)] * 2


def test_masks_that_know_no_groups_are_used_as_they_are(rows_seen):
    batch = lay_out(random_groups(3), 0, [[0, 1, 2]])
    found = completion_logps(model_of("GPTNeoX"), batch)
    rows_seen.clear()
    del batch["spans"]
    torch.testing.assert_close(completion_logps(model_of("GPTNeoX"), batch), found)
    assert not rows_seen


def test_where_it_is_used():
    wide = {"hidden_size": 256, "intermediate_size": 64}
    assert attention.by_group(build("GPTNeoX", attn_implementation="sdpa", **wide))
    assert not attention.by_group(build("GPTNeoX", attn_implementation="eager", **wide))
    assert not attention.by_group(build("GPTNeoX", attn_implementation="sdpa"))
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    model = build("GPTNeoX", attn_implementation="sdpa", **wide)
    model.parameters = lambda: iter([on_gpu])
    assert not attention.by_group(model)


def test_rows_are_long_and_hold_little_padding(rows_seen):
    assert row_limit(model_of("GPTNeoX"), random_groups(4), 0) == 2048
    assert fill([400, 480, 350, 500], 0, 2048) == [[0, 1, 2, 3]]
    assert sorted(fill([400, 480, 350, 500], 0, 900)) == [[0, 1], [2, 3]]
    assert sorted(fill([600, 300, 300], 0, 600)) == [[0], [1, 2]]
