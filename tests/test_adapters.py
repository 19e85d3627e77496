"""Adapters side by side: every refusal says why, and switching leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_neox
from lora_helpers import adapted, dense, difference, logits, lora_layers, norm, shake, tokens, two_linears
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoftQConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from torch import nn

from tralign_mini.adapters import add_initial_adapter, refuse_unaverageable, using_initial
from tralign_mini.reference import AdapterReference, make_reference

REFUSED = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "IA3": IA3Config(task_type="CAUSAL_LM"),
    "ADALORA": AdaLoraConfig(total_step=10),
    "use_dora": LoraConfig(use_dora=True),
    "bias='all'": LoraConfig(bias="all"),
    "bias='lora_only'": LoraConfig(bias="lora_only"),
    "lora_bias": LoraConfig(lora_bias=True),
    "modules_to_save": LoraConfig(modules_to_save=["lm_head"]),
    "trainable_token_indices": LoraConfig(trainable_token_indices=[1, 2]),
    "target_parameters": LoraConfig(target_parameters=["experts.gate_up_proj"]),
    "layer_replication": LoraConfig(layer_replication=[(0, 2), (1, 2)]),
    "use_qalora": LoraConfig(use_qalora=True),
    "alora_invocation_tokens": LoraConfig(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "velora_config": LoraConfig(velora_config=VeloraConfig()),
    "use_bdlora": LoraConfig(use_bdlora=BdLoraConfig()),
    "kasa_config": LoraConfig(kasa_config=KasaConfig()),
    "init_lora_weights='loftq'": LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig()),
} | {f"init_lora_weights='{name}'": LoraConfig(init_lora_weights=name)
     for name in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "lora_ga", "mica")}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_more_than_a_product_of_factors_is_refused_by_name(named):
    with pytest.raises(ValueError, match="silently leave out") as refusal:
        refuse_unaverageable(REFUSED[named])
    assert named in str(refusal.value) and "plain LoraConfig" in str(refusal.value)


@pytest.mark.parametrize("lora", [
    {}, {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
    {"use_rslora": True, "lora_dropout": 0.1, "fan_in_fan_out": True},
    {"rank_pattern": {"dense": 2}, "alpha_pattern": {"dense": 2}, "layers_to_transform": [1]},
])
def test_plain_lora_is_accepted(lora):
    refuse_unaverageable(LoraConfig(**lora))


@pytest.mark.parametrize("lora, message", [
    ({"use_dora": True}, "DoRA"),
    ({"bias": "all"}, "biases"),
    ({"modules_to_save": ["embed_in"]}, "trained in full"),
    ({"target_modules": ["dense", "embed_in"]}, "embed_in is a Embedding with LoRA"),
])
def test_a_reference_of_such_a_policy_is_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        make_reference(adapted(**lora))


def test_other_policies_that_an_average_of_adapters_would_misread_are_refused():
    convolution = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "first": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="conv is a Conv1d with LoRA"):
        make_reference(adapted(convolution, target_modules=["conv", "first"]))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        make_reference(get_peft_model(tiny_neox(), REFUSED["PROMPT_TUNING"]))
    with pytest.raises(ValueError, match="active adapter is 'mine'"):
        make_reference(get_peft_model(tiny_neox(), LoraConfig(), adapter_name="mine"))
    policy = adapted()
    policy.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="1 parameters beside the adapter.*embed_in"):
        make_reference(policy)


# --- switching


def everything(policy) -> tuple:
    """All that switching could leave changed."""
    return (policy.active_adapter, policy.base_model.active_adapters,
            [(name, weight.requires_grad) for name, weight in policy.named_parameters()],
            [(name, module.training) for name, module in policy.named_modules()],
            [(list(layer.active_adapters), layer.disable_adapters) for layer in lora_layers(policy).values()],
            torch.is_grad_enabled())


def in_the_middle_of_training():
    """A policy in a state that is easy to lose: mixed modes, one frozen factor, dropout."""
    policy = adapted(lora_dropout=0.5)
    reference = AdapterReference(policy)
    add_initial_adapter(policy)
    policy.train()
    layers = list(lora_layers(policy).values())
    layers[0].eval()
    layers[1].lora_A["default"].weight.requires_grad_(False)
    shake(policy, seed=0)
    return policy, reference


@pytest.mark.parametrize("which", ["reference", "initial", "base"])
def test_switching_leaves_nothing_behind_not_even_after_an_error(which):
    policy, reference = in_the_middle_of_training()
    if which == "base":
        policy.delete_adapter("initial")
    using = reference.using if which == "reference" else lambda: using_initial(policy)
    before = everything(policy)
    with using() as module:
        assert not torch.is_grad_enabled() and not any(m.training for m in module.modules())
        active = {tuple(layer.active_adapters) for layer in lora_layers(policy).values()}
        assert which == "base" or active == {(which,)}
    assert everything(policy) == before
    with pytest.raises(KeyError), using():
        raise KeyError
    assert everything(policy) == before


def test_making_a_reference_leaves_the_policy_as_it_was():
    policy = adapted(lora_dropout=0.5).train()
    list(lora_layers(policy).values())[1].lora_A["default"].weight.requires_grad_(False)
    before, weights = everything(policy), dense(policy)
    reference = AdapterReference(policy)
    add_initial_adapter(policy)
    after = everything(policy)
    old = dict(before[2])
    assert {name: flag for name, flag in after[2] if name in old} == old
    assert not any(flag for name, flag in after[2] if name not in old)
    assert (after[:2], after[4:]) == (before[:2], before[4:]) and policy.training
    assert norm(difference(dense(policy), weights)) == 0 and reference.updates == 0


def test_dropout_acts_on_the_policy_and_never_on_the_reference():
    policy, reference = in_the_middle_of_training()
    assert not torch.equal(logits(policy), logits(policy))
    with reference.using() as module:
        assert torch.equal(logits(module), logits(module))
    assert not torch.equal(logits(policy), logits(policy))


def test_a_reference_is_not_to_be_had_while_adapters_are_off():
    policy, reference = in_the_middle_of_training()
    with policy.disable_adapter(), pytest.raises(RuntimeError, match="switched off"), reference.using():
        pass
    with reference.using() as module:
        assert module is policy


# --- the initial policy


def test_the_initial_policy_is_a_frozen_copy_if_training_began_from_an_adapter():
    policy = adapted(lora_alpha=5, rank_pattern={"dense": 4}).eval()
    start, weights = logits(policy), dense(policy)
    add_initial_adapter(policy)
    reference = AdapterReference(policy)
    for k in range(3):
        shake(policy, seed=k)
        reference.update(1.0)
    with using_initial(policy) as module:
        torch.testing.assert_close(logits(module), start, rtol=0, atol=1e-5)
    assert norm(difference(dense(policy, "initial"), weights)) < 1e-6 * norm(weights)
    assert not any(w.requires_grad for n, w in policy.named_parameters() if ".initial." in n)
    assert (logits(policy) - start).abs().max() > 0.1


def test_the_initial_policy_is_the_base_if_training_began_there():
    base = tiny_neox()
    start = logits(base)
    policy = adapted(base, init_lora_weights=True).eval()
    add_initial_adapter(policy)
    assert list(policy.peft_config) == ["default"]
    shake(policy, seed=0)
    with using_initial(policy) as module:
        assert torch.equal(logits(module), start)
    assert (logits(policy) - start).abs().max() > 0.1


def test_training_goes_on_after_the_initial_policy_was_asked():
    policy = adapted().train()
    add_initial_adapter(policy)
    with using_initial(policy) as module:
        logits(module)
    policy(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {name for name, weight in policy.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in policy.named_parameters() if ".default." in name}


def test_names_that_end_alike_are_told_apart():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "outer": nn.ModuleDict({"first": nn.Linear(2, 2)})})
    policy = adapted(model, target_modules="first")  # a string matches in full: outer.first is not meant
    AdapterReference(policy)
    assert list(lora_layers(policy)) == ["first"]
    assert len(lora_layers(adapted(two_linears(), target_modules=["first"]))) == 1
