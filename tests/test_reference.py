"""The reference policy: that it is the average it claims to be, and reports truly where it is not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import VOCAB, tiny_llama, tiny_neox
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import (
    adapted,
    average,
    dense,
    difference,
    logits,
    lora_layers,
    norm,
    shake,
    tokens,
    two_linears,
)
from transformers import GPT2Config, GPT2LMHeadModel

from tralign_mini.reference import AdapterReference, FrozenReference


def tiny_gpt2():
    """Its linear layers are Conv1D: weights stored (in, out)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config = GPT2Config(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


SETTINGS = {
    "plain": {},
    "scaling": {"lora_alpha": 5, "r": 3},
    "rslora": {"lora_alpha": 5, "r": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"dense": 4}, "alpha_pattern": {"dense_h_to_4h": 7}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["dense", "query_key_value"]},
}


# --- an adapter as the reference: it is the policy at the start, and the merged dense average later


@pytest.mark.parametrize("lora", SETTINGS.values(), ids=SETTINGS.keys())
def test_it_starts_as_a_copy_of_the_policy_on_the_same_layers(lora):
    policy = adapted(**lora).eval()
    reference = AdapterReference(policy)
    layers = lora_layers(policy)
    assert layers and all(set(layer.lora_A) == {"default", "reference"} for layer in layers.values())
    assert {layer.scaling["reference"] for layer in layers.values()} == {1.0}
    assert norm(difference(dense(policy, "reference"), dense(policy))) < 1e-6 * norm(dense(policy))
    expected = logits(policy)  # not inside: there the policy's module *is* the reference
    with reference.using() as module:
        torch.testing.assert_close(logits(module), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama, tiny_gpt2])
def test_it_equals_the_merged_dense_reference(make):
    base = make()
    policy = adapted(copy.deepcopy(base)).eval()
    reference = AdapterReference(policy)
    target = dense(policy)
    for k in range(5):  # two more than the rank holds exactly
        shake(policy, seed=k, size=0.1 * 0.5**k)
        target = average(0.4, dense(policy), target)
        numbers = reference.update(0.4)
    assert numbers["reference/truncation_error"] > 0
    merged = copy.deepcopy(base)
    for name, delta in dense(policy, "reference").items():
        weight = merged.get_submodule(name).weight
        weight.data += (delta.T if make is tiny_gpt2 else delta).float()
    assert (logits(policy) - logits(merged)).abs().max() > 0.05  # or the comparison would show nothing
    with reference.using() as module:
        torch.testing.assert_close(logits(module), logits(merged), rtol=0, atol=5e-5)
    assert norm(difference(dense(policy, "reference"), target)) < 0.05 * norm(target)


def test_an_adapter_without_effect_uses_no_rank(tmp_path):
    policy = adapted(init_lora_weights=True)
    reference = AdapterReference(policy, rank=2)
    assert norm(dense(policy, "reference")) == 0
    assert set(reference.update(0.5).values()) == {0.0}  # 0/0 is 0
    reference.save(tmp_path)
    assert set(json.loads((tmp_path / "reference.json").read_text())["used"].values()) == {0}
    shake(policy, seed=0)
    assert reference.update(0.5)["reference/truncation_error"] == 0
    half = {name: weight / 2 for name, weight in dense(policy).items()}
    assert norm(difference(dense(policy, "reference"), half)) < 1e-6 * norm(half)


# --- the soft update


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rank=st.integers(1, 3), alphas=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=3),
       lora_alpha=st.integers(1, 40), use_rslora=st.booleans(),
       ranks=st.dictionaries(st.sampled_from(["first", "second"]), st.integers(1, 4), max_size=1),
       scalings=st.dictionaries(st.sampled_from(["first", "second"]), st.integers(1, 40), max_size=1),
       seed=st.integers(0, 1000))
def test_it_is_the_dense_average_while_the_rank_holds_it(
    rank, alphas, lora_alpha, use_rslora, ranks, scalings, seed
):
    policy = adapted(two_linears(), seed=seed, target_modules=["first", "second"], r=rank,
                     lora_alpha=lora_alpha, use_rslora=use_rslora, rank_pattern=ranks, alpha_pattern=scalings)
    reference = AdapterReference(policy)
    target = dense(policy)
    for k, alpha in enumerate(alphas):
        shake(policy, seed=seed + k)
        target = average(alpha, dense(policy), target)
        numbers = reference.update(alpha)
        assert set(numbers.values()) == {0.0}
        for name, weight in dense(policy, "reference").items():
            assert (weight - target[name]).norm() <= 1e-5 * target[name].norm()


def test_averaging_the_factors_one_by_one_is_another_point():
    policy, alpha = adapted(two_linears(), target_modules=["first", "second"], r=2, lora_alpha=2), 0.3
    reference = AdapterReference(policy)
    before = {n: (m.lora_B["default"].weight.detach().clone(), m.lora_A["default"].weight.detach().clone())
              for n, m in lora_layers(policy).items()}
    shake(policy, seed=1)
    reference.update(alpha)
    for name, layer in lora_layers(policy).items():
        (B_ref, A_ref), B, A = before[name], layer.lora_B["default"].weight, layer.lora_A["default"].weight
        one_by_one = (alpha * B + (1 - alpha) * B_ref) @ (alpha * A + (1 - alpha) * A_ref)
        off_by = -alpha * (1 - alpha) * (B - B_ref) @ (A - A_ref)
        right = dense(policy, "reference")[name].float()
        torch.testing.assert_close(one_by_one, right + off_by, rtol=0, atol=1e-6)
        assert off_by.norm() > 0.05 * right.norm()


# --- beyond its rank: the best product there is, and true error numbers


def cut_exactly(weight: torch.Tensor, rank: int) -> float:
    """Eckart and Young: what no matrix of this rank can avoid."""
    return torch.linalg.svdvals(weight)[rank:].norm().item()


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.9])
def test_one_truncation_is_the_best_of_its_rank_and_reported_truly(alpha):
    policy = adapted(r=3, lora_alpha=5, rank_pattern={"query_key_value": 2})
    reference = AdapterReference(policy, rank=4)
    old = dense(policy, "reference")
    shake(policy, seed=1)
    target = average(alpha, dense(policy), old)
    numbers = reference.update(alpha)
    errors, moves = {}, {}
    for name, weight in dense(policy, "reference").items():
        errors[name] = (weight - target[name]).norm().item()
        moves[name] = (target[name] - old[name]).norm().item()
        best = cut_exactly(target[name], rank=4)
        assert errors[name] == pytest.approx(best, rel=1e-5, abs=1e-6 * target[name].norm().item())
    pooled = sum(e**2 for e in errors.values()) ** 0.5 / sum(m**2 for m in moves.values()) ** 0.5
    worst = max(errors[name] / moves[name] for name in errors)
    assert numbers["reference/truncation_error"] == pytest.approx(pooled, rel=1e-4) and pooled > 0
    assert numbers["reference/truncation_error_worst"] == pytest.approx(worst, rel=1e-4) and worst > pooled
    assert numbers["reference/error_bound"] == numbers["reference/truncation_error"]
    assert numbers["reference/error_bound_worst"] == numbers["reference/truncation_error_worst"]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(alpha=st.floats(0.01, 0.99), size=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_the_bound_holds_for_the_error_of_all_updates_together(alpha, size, seed):
    policy = adapted(two_linears(), target_modules=["first", "second"], r=1, lora_alpha=3)
    reference = AdapterReference(policy, rank=2)
    exact = dense(policy)
    for k in range(8):
        shake(policy, seed=seed + k, size=size)
        old = dense(policy, "reference")
        target = average(alpha, dense(policy), old)
        exact = average(alpha, dense(policy), exact)
        numbers = reference.update(alpha)
        move, new = norm(difference(target, old)), dense(policy, "reference")
        rounding = 1e-6 * norm(new)
        bound = numbers["reference/error_bound"] * move
        assert norm(difference(new, exact)) <= bound + rounding
        assert norm(difference(new, target)) == pytest.approx(
            numbers["reference/truncation_error"] * move, rel=1e-3, abs=rounding)
        worst = max((new[n] - exact[n]).norm().item() / (target[n] - old[n]).norm().item() for n in new)
        assert worst <= numbers["reference/error_bound_worst"] * (1 + 1e-3) + rounding / move
    assert bound > 0


def test_the_bound_follows_its_recursion_and_ends_with_a_hard_update():
    policy = adapted(two_linears(), target_modules=["first", "second"], r=2)
    reference, alpha, bounds = AdapterReference(policy, rank=2), 0.2, {"first": 0.0, "second": 0.0}
    for k in range(4):
        shake(policy, seed=k)
        old = dense(policy, "reference")
        target = average(alpha, dense(policy), old)
        numbers = reference.update(alpha)
        bounds = {n: (1 - alpha) * e + cut_exactly(target[n], rank=2) for n, e in bounds.items()}
        moves = {n: (target[n] - old[n]).norm().item() for n in target}
        pooled = sum(e**2 for e in bounds.values()) ** 0.5 / sum(m**2 for m in moves.values()) ** 0.5
        assert numbers["reference/error_bound"] == pytest.approx(pooled, rel=1e-4)
        worst = max(bounds[n] / moves[n] for n in bounds)
        assert numbers["reference/error_bound_worst"] == pytest.approx(worst, rel=1e-4)
    assert numbers["reference/error_bound"] > numbers["reference/truncation_error"] > 0
    assert set(reference.update(1.0).values()) == {0.0}
    assert norm(difference(dense(policy, "reference"), dense(policy))) < 1e-6 * norm(dense(policy))


def test_a_policy_that_stands_on_the_reference_gives_finite_errors():
    policy, alpha = adapted(two_linears(), target_modules=["first", "second"], r=2, lora_alpha=2), 0.4
    reference = AdapterReference(policy, rank=2)
    old = dense(policy, "reference")
    shake(policy, seed=0)
    move = alpha * norm(difference(dense(policy), old))
    error = reference.update(alpha)["reference/error_bound"] * move
    for layer in lora_layers(policy).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.data.copy_(factor["reference"].weight)
    numbers = reference.update(alpha)  # moves by nothing: relative to float32's resolution of the policy
    resolution = 1e-7 * norm(dense(policy))
    assert numbers["reference/error_bound"] == pytest.approx((1 - alpha) * error / resolution, rel=1e-3)
    assert numbers["reference/truncation_error"] < 1e-3


def test_rank_that_is_not_needed_is_freed(tmp_path):
    policy = adapted(r=2)
    reference = AdapterReference(policy, rank=4)
    for _ in range(2):  # the policy stands still: 4 stacked columns, then 6, whose product still has rank 2
        numbers = reference.update(0.5)
    reference.save(tmp_path)
    assert set(json.loads((tmp_path / "reference.json").read_text())["used"].values()) == {2}
    assert numbers["reference/truncation_error"] < 1e-3  # of an update of norm 0
    assert norm(difference(dense(policy, "reference"), dense(policy))) < 1e-6 * norm(dense(policy))
    shake(policy, seed=0)
    assert reference.update(0.5)["reference/truncation_error"] == 0  # fits again


def test_a_hard_update_copies_the_factors():
    policy = adapted(r=2, lora_alpha=4)
    reference = AdapterReference(policy)
    for k in range(4):
        shake(policy, seed=k)
        reference.update(0.5)
    reference.update(1.0)
    for layer in lora_layers(policy).values():
        B, A = layer.lora_B["reference"].weight, layer.lora_A["reference"].weight
        assert torch.equal(B[:, :2], 2 * layer.lora_B["default"].weight)
        assert torch.equal(A[:2], layer.lora_A["default"].weight)
        assert not B[:, 2:].any() and not A[2:].any()
    target = dense(policy)
    for k in range(3):  # the copy left room for three more
        shake(policy, seed=10 + k)
        target = average(0.3, dense(policy), target)
        assert reference.update(0.3)["reference/error_bound"] == 0
    assert norm(difference(dense(policy, "reference"), target)) < 1e-6 * norm(target)


@pytest.mark.parametrize("alpha", [0, -0.1, 1.5, float("nan"), None])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        AdapterReference(adapted()).update(alpha)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_policy_that_diverged_is_not_followed(alpha):
    policy = adapted()
    reference = AdapterReference(policy)
    before = dense(policy, "reference")
    shake(policy, seed=0)
    list(lora_layers(policy).values())[-1].lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="embed_out|lm_head|dense_4h_to_h"):
        reference.update(alpha)
    assert norm(difference(dense(policy, "reference"), before)) == 0 and reference.updates == 0


# --- one base model, never touched; gradients and random numbers as without a reference


def test_the_base_is_shared_and_never_changes():
    base = tiny_neox()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    storages = {weight.data_ptr() for weight in base.parameters()}
    policy = adapted(base, r=2)
    own = {id(weight) for weight in policy.parameters()}
    reference = AdapterReference(policy, rank=5)
    added = [weight for weight in policy.parameters() if id(weight) not in own]
    expected = sum(5 * (m.in_features + m.out_features) for m in lora_layers(policy).values())
    assert sum(weight.numel() for weight in added) == expected
    assert {weight.dtype for weight in added} == {torch.float32} and not any(w.requires_grad for w in added)
    for k in range(4):
        shake(policy, seed=k)
        reference.update(0.5)
        with reference.using() as module:
            logits(module)
            assert module is policy
    state = policy.base_model.model.state_dict()
    after = {name.replace(".base_layer", ""): w for name, w in state.items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {w.data_ptr() for n, w in policy.named_parameters() if "lora_" not in n} == storages


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_pass_does_not_change_the_gradient(checkpointing):
    def with_reference(passes: bool):
        policy = adapted()
        if checkpointing:
            policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        reference = AdapterReference(policy)
        shake(policy, seed=0)
        policy.train()
        loss = policy(input_ids=tokens(), labels=tokens()).loss
        if passes:  # between forward and backward, as in training
            with reference.using() as module:
                logits(module)
            reference.update(0.5)
        loss.backward()
        return {n: w.grad for n, w in policy.named_parameters() if w.grad is not None}

    plain, beside = with_reference(False), with_reference(True)
    assert plain.keys() == beside.keys() and all(".default." in name for name in plain)
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


def test_making_a_reference_draws_no_random_numbers():
    policy = adapted()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    AdapterReference(policy)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_policy_of_any_dtype_has_a_float32_reference_that_may_not_be_cast(dtype):
    policy = adapted(tiny_neox().to(dtype)).to(dtype)
    reference = AdapterReference(policy.eval())
    shake(policy, seed=0)
    target = average(0.5, dense(policy), dense(policy, "reference"))
    reference.update(0.5)
    assert {m.lora_A["reference"].weight.dtype for m in lora_layers(policy).values()} == {torch.float32}
    assert norm(difference(dense(policy, "reference"), target)) < 1e-6 * norm(target)
    reference.update(1.0)
    expected = logits(policy)
    with reference.using() as module:
        torch.testing.assert_close(logits(module), expected, rtol=0.05, atol=0.1)
    policy.bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        reference.update(0.5)


def test_the_rank_has_to_hold_the_policy_and_the_name_has_to_be_free():
    policy = adapted(r=2, rank_pattern={"dense": 5})
    with pytest.raises(ValueError, match="rank=4.*is 5"):
        AdapterReference(policy, rank=4)
    assert AdapterReference(policy).rank == 20
    with pytest.raises(ValueError, match="already has an adapter 'reference'"):
        AdapterReference(policy)


# --- saving and loading


def a_run(policy, reference, steps) -> list[dict]:
    return [(shake(policy, seed=k, size=0.1), reference.update(0.3))[1] for k in steps]


def test_an_adapter_reference_comes_back_to_the_bit_and_goes_on_equally(tmp_path):
    policy = adapted()
    reference = AdapterReference(policy)
    a_run(policy, reference, range(5))
    reference.save(tmp_path)
    saved = [weight.clone() for name, weight in policy.named_parameters() if ".default." in name]
    straight = a_run(policy, reference, range(5, 8))

    again = adapted(seed=7)
    resumed = AdapterReference(again)
    for weight in (weight for name, weight in again.named_parameters() if ".default." in name):
        weight.data.copy_(saved.pop(0))
    resumed.load(tmp_path)
    assert resumed.updates == 5
    assert a_run(again, resumed, range(5, 8)) == straight and straight[-1]["reference/error_bound"] > 0
    left, right = dense(policy, "reference"), dense(again, "reference")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("make, message", [
    (lambda: AdapterReference(adapted(), rank=4), "rank is 8 there, 4 here"),
    (lambda: AdapterReference(adapted(target_modules=["dense"])), "lora_.* there, missing here"),
    (lambda: AdapterReference(adapted(tiny_neox(num_hidden_layers=3))), "layers.2.* is missing there"),
    (lambda: AdapterReference(adapted(tiny_neox(intermediate_size=48))), r"\(8, 64\).* there, .*\(8, 48\)"),
    (lambda: FrozenReference(tiny_neox()), "does not fit"),
])
def test_a_saved_reference_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, make, message):
    AdapterReference(adapted()).save(tmp_path)
    other = make()
    before = {name: tensor.clone() for name, tensor in other._tensors().items()}
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other._tensors().items())


@pytest.mark.parametrize("name", ["reference.json", "reference.safetensors"])
def test_a_damaged_reference_is_named_and_changes_nothing(tmp_path, name):
    reference = FrozenReference(tiny_neox())
    reference.save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2])
    before = {key: tensor.clone() for key, tensor in reference._tensors().items()}
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read.*older checkpoint"):
        reference.load(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in reference._tensors().items())


def test_a_folder_without_a_reference_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no saved reference"):
        FrozenReference(tiny_neox()).load(tmp_path / "nowhere")
