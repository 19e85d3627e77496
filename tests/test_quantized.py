"""A 4-bit base: the reference is right, and no reference pass and no evaluation spoils the gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import tiny_llama, tiny_neox
from lora_helpers import average, dense, difference, gradients, logits, norm, shake
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tralign_mini.adapters import add_initial_adapter, guard_4bit, using_initial
from tralign_mini.checkpoint import start_hash
from tralign_mini.reference import AdapterReference, FrozenReference

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 4-bit models here")

ARCHITECTURES = pytest.mark.parametrize("make", [tiny_neox, tiny_llama])  # layers with biases, and without


def four_bit(make, folder, **lora):
    """LoRA on a base that was saved and loaded in NF4; unguarded."""
    make(hidden_size=64).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False} | lora
    policy = get_peft_model(base, LoraConfig(**settings))
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in policy.modules())
    return policy


def dequantised(policy):
    """The same policy on the base's weights as float32."""
    policy = copy.deepcopy(policy)
    for module in list(policy.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, bnb.nn.Linear4bit):
            plain = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            plain.weight.data = weight.float()
            if base.bias is not None:
                plain.bias.data = base.bias.data.float()
            module.base_layer = plain.requires_grad_(False)
    return policy


def bases(policy):
    return {n: w.detach().clone() for n, w in policy.named_parameters() if "lora_" not in n}


@ARCHITECTURES
def test_gradients_are_right_after_a_reference_pass_and_after_an_evaluation(make, tmp_path):
    policy = four_bit(make, tmp_path)
    guard_4bit(policy)
    dense_base = gradients(dequantised(policy))
    before = gradients(policy)
    assert before.keys() == dense_base.keys() and max(g.abs().max() for g in before.values()) > 0.1
    for name in before:
        torch.testing.assert_close(before[name], dense_base[name], rtol=1e-4, atol=1e-5)
    weights = bases(policy)
    reference = AdapterReference(policy)
    add_initial_adapter(policy)
    with reference.using() as module:
        logits(module)
    with using_initial(policy) as module:
        logits(module)
    with torch.no_grad():
        logits(policy.eval())
    reference.update(0.5)
    after = gradients(policy)
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weight, weights[name]) for name, weight in bases(policy).items())


@ARCHITECTURES
def test_the_adapter_reference_equals_the_dense_average_on_the_dequantised_base(make, tmp_path):
    policy = four_bit(make, tmp_path, lora_alpha=5)
    reference = AdapterReference(policy.eval())
    plain = dequantised(policy)
    target = dense(policy)
    for k in range(3):
        shake(policy, seed=k, size=0.1)
        target = average(0.6, dense(policy), target)
        assert reference.update(0.6)["reference/truncation_error"] == 0
    assert norm(difference(dense(policy, "reference"), target)) < 1e-6 * norm(target)
    for name, weight in target.items():
        plain.base_model.model.get_submodule(name).base_layer.weight.data += weight.float()
    moved = logits(policy)
    with reference.using() as module, plain.disable_adapter():
        torch.testing.assert_close(logits(module), logits(plain), rtol=0, atol=1e-3)
        assert (logits(module) - moved).abs().max() > 0.05


@ARCHITECTURES
def test_making_the_reference_guards_the_base_by_itself(make, tmp_path):
    policy = four_bit(make, tmp_path)
    before = gradients(policy)
    reference = AdapterReference(policy)
    with reference.using() as module:
        logits(module)
    after = gradients(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


def spoilt(make, folder):
    """A policy that was evaluated without the guard, and its gradients before."""
    policy = four_bit(make, folder)
    if not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in policy.modules()):
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes does not repack weights here")
    before = gradients(policy)
    with torch.no_grad():
        logits(policy.eval())
    return policy, before


def test_the_trap_without_the_guard_raises_with_biases(tmp_path):
    policy, _ = spoilt(tiny_neox, tmp_path)
    with pytest.raises(RuntimeError):
        gradients(policy)


def test_the_trap_without_the_guard_is_silent_without_biases(tmp_path):
    policy, before = spoilt(tiny_llama, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = gradients(policy)
    assert max((after[name] - before[name]).abs().max() for name in before) > 0.1


def test_a_base_that_was_already_repacked_is_refused(tmp_path):
    policy, _ = spoilt(tiny_llama, tmp_path)
    with pytest.raises(RuntimeError, match="already repacked .*q_proj"):
        guard_4bit(policy)
    with pytest.raises(RuntimeError, match="Load the model again"):
        AdapterReference(policy)


def test_a_4bit_policy_has_no_frozen_copy(tmp_path):
    policy = four_bit(tiny_neox, tmp_path)
    with pytest.raises(ValueError, match="quantised .bitsandbytes."):
        FrozenReference(policy.get_base_model())


def test_the_guard_leaves_other_models_alone():
    model = tiny_neox()
    attributes = [sorted(vars(module)) for module in model.modules()]
    guard_4bit(model)
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def test_the_hash_of_a_start_sees_the_scales_of_4bit_weights(tmp_path):
    def start(folder, factor):
        def make(*args, **settings):
            model = tiny_llama(*args, **settings)
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.mul_(factor)  # the same codes, other scales
            return model

        return start_hash(four_bit(make, tmp_path / folder))

    assert start("one", 1) == start("again", 1) != start("other", 2)
