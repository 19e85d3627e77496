"""The reference for full fine-tuning: a float32 copy that moves by the formula and by nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_llama, tiny_neox
from lora_helpers import adapted, average, logits

from tralign_mini.reference import FrozenReference, make_reference


def test_the_frozen_copy_is_float32_in_eval_mode_and_does_not_follow_by_itself():
    policy = tiny_neox(hidden_dropout=0.5, attention_dropout=0.5).bfloat16().train()
    reference = FrozenReference(policy)
    with reference.using() as module:
        assert module is not policy and not torch.is_grad_enabled()
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        before = logits(module)
        policy.get_input_embeddings().weight.data.mul_(2)
        assert torch.equal(logits(module), before)
    assert torch.is_grad_enabled() and policy.training
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}


def test_the_frozen_copy_moves_by_the_formula():
    policy, other = tiny_neox(seed=0), tiny_neox(seed=1)
    reference = FrozenReference(policy)
    expected = {name: weight.clone() for name, weight in policy.named_parameters()}
    policy.load_state_dict(other.state_dict())
    for alpha in (0.1, 0.6):
        assert reference.update(alpha) == {}
        expected = average(alpha, dict(other.named_parameters()), expected)
    for name, weight in reference.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)
    reference.update(1.0)
    moved = dict(policy.named_parameters())
    assert all(torch.equal(weight, moved[name]) for name, weight in reference.model.named_parameters())
    assert reference.updates == 3


@pytest.mark.parametrize("tie", [False, True])
def test_the_frozen_copy_comes_back_to_the_bit(tmp_path, tie):
    reference = FrozenReference(tiny_llama(seed=0, tie_word_embeddings=tie))
    reference.policy.load_state_dict(tiny_llama(seed=1, tie_word_embeddings=tie).state_dict())
    reference.update(0.3)
    reference.save(tmp_path)
    resumed = FrozenReference(tiny_llama(seed=2, tie_word_embeddings=tie))
    resumed.load(tmp_path)
    left, right = reference.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left) and resumed.updates == 1
    with reference.using() as one, resumed.using() as other:
        assert torch.equal(logits(one), logits(other))


def test_the_right_kind_of_reference_is_made():
    assert isinstance(make_reference(tiny_neox()), FrozenReference)
    assert make_reference(adapted(), rank=3).rank == 3
    with pytest.raises(ValueError, match="no adapter"):
        make_reference(tiny_neox(), rank=3)
    with pytest.raises(ValueError, match="AdapterReference"):
        FrozenReference(adapted())
