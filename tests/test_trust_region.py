"""The moving reference: when it moves, that it moves by the predicted amount, what it refuses to move."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import tiny_llama, tiny_neox
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tralign_mini.trust_region import TrustRegion, update_reference


class Small(nn.Module):
    """One of everything: weights, tied weights, float, integer and bool buffers, a non-persistent buffer."""

    def __init__(self, fill: float, tie: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(3, 2, dtype=dtype)
        self.head = nn.Linear(2, 3, bias=False, dtype=dtype)
        self.inner = nn.Sequential(nn.Linear(2, 2, dtype=dtype))
        if tie:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(fill)
        self.register_buffer("mean", torch.full((2,), fill, dtype=dtype))
        self.register_buffer("hidden", torch.full((2,), fill, dtype=dtype), persistent=False)
        self.register_buffer("count", torch.tensor(int(fill)))
        self.register_buffer("mask", torch.tensor([fill > 1, True]))


def values(module):
    """Every number of the module by name, copied."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_floats_are(module, expected, **tolerance):
    for name, value in values(module).items():
        if value.is_floating_point():
            wanted = torch.full_like(value, expected)
            torch.testing.assert_close(value, wanted, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def perturbed(module, seed=1, scale=0.1):
    """A copy with other weights: the policy after some training."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


# ---------------------------------------------------------------------------------------------- TrustRegion


def test_due_at_every_multiple_of_tau_and_never_at_zero():
    assert [step for step in range(13) if TrustRegion(0.6, 4).is_due(step)] == [4, 8, 12]
    assert [step for step in range(4) if TrustRegion.soft(0.6).is_due(step)] == [1, 2, 3]
    assert [step for step in range(1000) if TrustRegion.hard(512).is_due(step)] == [512]
    assert not any(TrustRegion.fixed().is_due(step) for step in range(1000))


def test_the_three_kinds():
    assert TrustRegion.soft(0.6) == TrustRegion(0.6, 1)
    assert TrustRegion.soft(0.6, tau=512) == TrustRegion(alpha=0.6, tau=512)
    assert TrustRegion.hard(512) == TrustRegion(1.0, 512)
    regions = TrustRegion.soft(0.6, 16), TrustRegion.hard(16), TrustRegion.fixed(), TrustRegion(1, 16)
    assert [region.kind for region in regions] == ["soft", "hard", "fixed", "hard"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        regions[0].alpha = 0.7


@given(tau=st.integers(1, 50), steps=st.integers(0, 300), alpha=st.floats(0, 1, exclude_min=True))
def test_updates_counts_the_due_steps(tau, steps, alpha):
    region = TrustRegion(alpha, tau)
    assert region.updates(steps) == sum(region.is_due(step) for step in range(steps + 1))
    assert TrustRegion.fixed().updates(steps) == 0


@pytest.mark.parametrize("alpha", [0, -0.1, 1.0001, float("nan"), float("inf"), "0.5", None, True])
def test_alpha_outside_its_range_is_refused(alpha):
    for use in (lambda: TrustRegion(alpha, 4), lambda: update_reference(Small(0), Small(1), alpha)):
        with pytest.raises(ValueError, match=r"alpha = .*weight of the policy.*\(0, 1\].*fixed\(\)"):
            use()


@pytest.mark.parametrize("tau", [0, -4, 2.5, 4.0, float("nan"), "4", None, True])
def test_tau_that_is_no_period_is_refused(tau):
    with pytest.raises(ValueError, match=r"tau = .*optimizer steps.*whole number >= 1"):
        TrustRegion(0.5, tau)


# ----------------------------------------------------------------------------------------- update_reference


def test_one_update_by_hand():
    """From 0 towards 4 with alpha = 1/4: 1/4 * 4 + 3/4 * 0 = 1. The weight belongs to the *policy*."""
    reference, policy = Small(0.0), Small(4.0)
    update_reference(reference, policy, 0.25)
    assert_floats_are(reference, 1.0, rtol=0, atol=0)
    assert_floats_are(policy, 4.0, rtol=0, atol=0)
    assert reference.count == 4 and reference.mask.tolist() == [True, True]  # copied: no average of a counter


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(1e-3, 1), k=st.integers(1, 30), start=st.floats(-3, 3), end=st.floats(-3, 3))
def test_k_updates_towards_a_still_policy_follow_the_formula(alpha, k, start, end):
    """reference_k = (1 - alpha)^k reference_0 + (1 - (1 - alpha)^k) policy."""
    reference, policy = Small(start), Small(end)
    for _ in range(k):
        update_reference(reference, policy, alpha)
    stay = (1 - alpha) ** k
    assert_floats_are(reference, stay * start + (1 - stay) * end, rtol=1e-5, atol=1e-5)


def test_k_updates_towards_a_moving_policy_follow_the_formula():
    """reference_k = (1 - alpha)^k reference_0 + sum over i of alpha (1 - alpha)^(k - i) policy_i."""
    alpha, reference = 0.3, tiny_neox()
    policies = [perturbed(reference, seed) for seed in range(5)]
    expected = {name: 0.7**5 * value.double() for name, value in values(reference).items()}
    for i, policy in enumerate(policies, start=1):
        update_reference(reference, policy, alpha)
        for name, value in values(policy).items():
            expected[name] += alpha * 0.7 ** (5 - i) * value.double()
    for name, value in values(reference).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)


def test_tiny_steps_add_up_in_float32():
    """1,000 updates with alpha = 1e-4 go 1 - (1 - 1e-4)^1000 = 9.5 % of the way, from 1 to 1.01: not lost."""
    reference, policy = Small(1.0), Small(1.01)
    for _ in range(1000):
        update_reference(reference, policy, 1e-4)
    way = (reference.embed.weight.double() - 1) / 0.01
    torch.testing.assert_close(way, torch.full_like(way, 1 - (1 - 1e-4) ** 1000), rtol=0.02, atol=0)


@pytest.mark.parametrize("build", [tiny_neox, tiny_llama])
def test_alpha_one_copies_to_the_bit(build):
    reference, policy = build(), perturbed(build())
    update_reference(reference, policy, 1.0)
    for name, value in values(policy).items():
        assert torch.equal(values(reference)[name], value), name
    prompt = torch.arange(3, 13)[None]
    assert torch.equal(reference(input_ids=prompt).logits, policy(input_ids=prompt).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_alpha_one_copies_any_dtype(dtype):
    reference, policy = Small(0.0, dtype=dtype), Small(0.1, dtype=dtype)
    update_reference(reference, policy, 1)
    for name, value in values(policy).items():
        assert torch.equal(values(reference)[name], value) and value.dtype == values(reference)[name].dtype


def test_tied_weights_move_once():
    """Moved twice, 0 -> 4 with alpha = 1/4 would end at 1.75. The tie itself survives, too."""
    reference, policy = Small(0.0), Small(4.0)
    update_reference(reference, policy, 0.25)
    assert reference.head.weight is reference.embed.weight
    assert reference.head.weight.unique().tolist() == [1.0]

    llama, trained = tiny_llama(tie_word_embeddings=True), tiny_llama(1, tie_word_embeddings=True)
    expected = 0.75 * llama.lm_head.weight.detach() + 0.25 * trained.lm_head.weight.detach()
    update_reference(llama, trained, 0.25)
    assert llama.lm_head.weight.data_ptr() == llama.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(llama.lm_head.weight.detach(), expected)


def test_memory_shared_by_two_tensors_moves_once():
    """Two buffers that are different Python objects over one memory, as some rotary embeddings keep them."""
    reference, policy = Small(0.0), Small(4.0)
    for module in (reference, policy):
        module.register_buffer("alias", module.mean.view(2), persistent=False)
        assert module.alias is not module.mean
    update_reference(reference, policy, 0.25)
    assert reference.mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_of_a_mask_stay_and_the_rest_of_the_buffer_moves(dtype):
    """-inf + alpha * (-inf - -inf) is NaN: an attention mask kept as a buffer would spoil the reference."""
    reference, policy = Small(0.0), Small(4.0, dtype=dtype)
    reference.register_buffer("bias", torch.tensor([0.0, -torch.inf, torch.inf, 2.0]))
    policy.register_buffer("bias", torch.tensor([0.0, -torch.inf, torch.inf, 4.0], dtype=dtype))
    update_reference(reference, policy, 0.25)
    assert reference.bias.tolist() == [0.0, -torch.inf, torch.inf, 2.5]
    assert reference.mean.tolist() == [1.0, 1.0] and reference.embed.weight.unique().tolist() == [1.0]


def test_an_untied_reference_follows_a_tied_policy_but_not_the_reverse():
    untied = Small(0.0, tie=False)
    update_reference(untied, Small(4.0, tie=True), 0.25)
    assert_floats_are(untied, 1.0)
    tied = Small(0.0, tie=True)
    with pytest.raises(ValueError, match="ties head.weight to embed.weight and the policy does not"):
        update_reference(tied, Small(4.0, tie=False), 0.25)
    assert_floats_are(tied, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_policy_moves_a_float32_reference_in_float32(dtype):
    reference, policy = Small(1.0), Small(1.0625, dtype=dtype)
    for _ in range(50):
        update_reference(reference, policy, 0.01)
    assert_floats_are(reference, 1 + 0.0625 * (1 - 0.99**50), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_reference_is_refused_because_it_would_stand_still(dtype):
    reference, policy = Small(1.0, dtype=dtype), Small(1.004, dtype=dtype)
    with pytest.raises(ValueError, match=r"16 bits lose small steps .*reference.float\(\)"):
        update_reference(reference, policy, 0.01)
    assert_floats_are(reference, 1.0, rtol=0, atol=0)
    # the reason: what the refused arithmetic does
    stored = reference.embed.weight.detach().clone()
    for _ in range(50):
        stored = torch.lerp(stored.float(), policy.embed.weight.detach().float(), 0.01).to(dtype)
    assert torch.equal(stored, reference.embed.weight)


def test_no_gradient_is_recorded_and_flags_and_mode_stay():
    reference, policy = tiny_neox().train(), perturbed(tiny_neox())
    policy.requires_grad_(True)
    reference.requires_grad_(True)
    update_reference(reference, policy, 0.5)
    for parameter in reference.parameters():
        assert parameter.requires_grad and parameter.is_leaf and parameter.grad is None
    assert reference.training and not policy.training


def test_the_same_tensors_are_moved_in_place():
    reference = tiny_neox()
    before = {name: parameter.data_ptr() for name, parameter in reference.named_parameters()}
    update_reference(reference, perturbed(reference), 0.5)
    assert before == {name: parameter.data_ptr() for name, parameter in reference.named_parameters()}


def test_the_whole_way_with_a_trust_region_and_an_optimizer():
    """Six steps of SGD, an update every two: the reference is the recursion over the policy's own path."""
    region, reference = TrustRegion(0.6, 2), tiny_neox()
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    expected, tokens = values(reference), torch.arange(3, 23)[None]
    for step in range(1, 7):
        policy(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if region.is_due(step):
            update_reference(reference, policy, region.alpha)
            expected = {name: 0.4 * value + 0.6 * values(policy)[name] for name, value in expected.items()}
    assert region.updates(6) == 3
    for name, value in values(reference).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(reference.lm_head.weight, tiny_neox().lm_head.weight)


# ------------------------------------------------------------------------------------------------- refusals


def refused(reference, policy, match, alpha=0.5):
    """`update_reference` refuses with a message that matches, and nothing in the reference changed."""
    before = values(reference)
    with pytest.raises(ValueError, match=match):
        update_reference(reference, policy, alpha)
    for name, value in values(reference).items():
        assert value.is_meta or torch.equal(value, before[name]), name


def test_the_same_module_or_shared_memory_is_refused():
    module = Small(1.0)
    refused(module, module, "shares its memory.*follow every gradient step.*deepcopy")
    sharing = Small(0.0)
    sharing.inner[0].bias.data = module.inner[0].bias.data
    refused(sharing, module, "inner.0.bias of the reference shares its memory")
    refused(copy.copy(module), module, "shares its memory")


def test_other_names_are_refused_and_the_first_few_named():
    policy = Small(1.0)
    policy.extra = nn.Linear(2, 2)
    refused(Small(0.0), policy, r"2 tensors: extra.weight missing and \(2, 2\), extra.bias missing")
    wrapped = nn.ModuleDict({"module": Small(1.0)})
    refused(Small(0.0), wrapped, r"16 tensors: embed.weight \(3, 2\) and missing, head.weight .*DDP")
    without_hidden = Small(1.0)
    del without_hidden.hidden
    refused(Small(0.0), without_hidden, r"hidden \(2,\) and missing")


def test_other_shapes_are_refused_before_anything_moves():
    policy = Small(1.0)
    policy.inner[0].weight = nn.Parameter(torch.ones(1, 2))  # would broadcast
    refused(Small(0.0), policy, r"inner.0.weight \(2, 2\) and \(1, 2\)")
    refused(tiny_neox(), tiny_neox(vocab_size=65), r"\(64, 32\) and \(65, 32\)")


def test_a_16_bit_tensor_at_the_end_leaves_the_rest_untouched():
    reference = Small(0.0)
    reference.inner[0].bias.data = reference.inner[0].bias.data.bfloat16()
    refused(reference, Small(1.0), "the reference stores inner.0.bias in torch.bfloat16 and alpha = 0.5")


class Params4bit(nn.Parameter):
    """bitsandbytes' class by name; its codes may be stored as bfloat16 (`bnb_4bit_quant_storage`)."""


@pytest.mark.parametrize("codes", [nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False),
                                   Params4bit(torch.zeros(2, 2, dtype=torch.bfloat16), requires_grad=False)])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_quantized_weights_are_refused(codes, alpha):
    reference, policy = Small(0.0), Small(1.0)
    reference.inner[0].weight, policy.inner[0].weight = codes, copy.deepcopy(codes)
    refused(reference, policy, "inner.0.weight is quantized.*adapter reference", alpha)
    refused(Small(0.0), policy, "inner.0.weight is quantized", alpha)


def test_real_4_bit_weights_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layers = [bitsandbytes.nn.Linear4bit(64, 64, bias=False) for _ in range(2)]
    reference, policy = (nn.Sequential(layer).to("cpu") for layer in layers)
    refused(reference, policy, "0.weight is quantized .*adapter reference")


def test_weights_that_are_not_here_are_refused():
    with torch.device("meta"):
        absent = Small(1.0)
    refused(Small(0.0), absent, "embed.weight has no memory of its own here.*meta device")
