"""What a micro-batch adds to its step: sums that add up, means by hand, and KTO in one pass or in several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_helpers import assert_same_gradients
from helpers import PAD, make_trainer, random_rows, tiny_llama

from tralign_mini.logprobs import completion_logps
from tralign_mini.objective import StepSums, micro_batch_loss
from tralign_mini.recipe import Recipe

PAIR = torch.tensor([[1, 2]])


def accelerator(other=None):
    """One process, or the second of two: its sums, (names, 2), come from elsewhere."""
    def reduce(sums, how):
        assert how == "sum" and sums.dtype == torch.float64
        return sums if other is None else sums + torch.tensor(other, dtype=torch.float64)

    return SimpleNamespace(reduce=reduce, device="cpu")


# ------------------------------------------------------------------------------------------------- StepSums


def test_means_are_over_all_values_and_not_over_micro_batches():
    sums = StepSums()
    sums.add("x", torch.tensor([1.0, 2.0, 3.0]))
    sums.add("x", torch.tensor([10.0]))
    sums.add("y", torch.tensor(7.0))
    assert sums.means(accelerator()) == {"x": 4.0, "y": 7.0}  # 16 / 4, and not (2 + 10) / 2


def test_a_value_can_stand_for_several():
    sums = StepSums()
    sums.add("loss", torch.tensor([6.0, 9.0]), torch.tensor(5))  # sums over 2 and 3 tokens
    sums.add("loss", torch.tensor([3.0]), 1)
    assert sums.means(accelerator()) == {"loss": 3.0}  # 18 / 6


def test_a_mean_without_a_value_is_none_and_the_sums_are_empty_afterwards():
    sums = StepSums()
    sums.add("x", torch.tensor([]))
    sums.add("y", torch.tensor([1.0]))
    assert sums.means(accelerator()) == {"x": None, "y": 1.0}
    sums.add("y", torch.tensor([5.0]))
    assert sums.means(accelerator()) == {"y": 5.0}


def test_means_are_over_all_processes():
    sums = StepSums()
    sums.add("b", torch.tensor([1.0, 2.0]))
    sums.add("a", torch.tensor([]))
    assert sums.means(accelerator([[8.0, 2.0], [9.0, 1.0]])) == {"a": 4.0, "b": 4.0}  # by name: a, then b


def test_sums_carry_no_gradient():
    sums, x = StepSums(), torch.tensor([1.0], requires_grad=True)
    sums.add("x", x * 2)
    assert not sums.sums["x"][0].requires_grad


# ------------------------------------------------------------------------------------------- micro_batch_loss

BATCH = 6
METHODS = {"dpo": {"label_smoothing": 0.1}, "ipo": {"beta": 0.3}, "orpo": {"beta": 0.4},
           "simpo": {"beta": 2.0, "simpo_gamma": 1.0}, "kto": {"desirable_weight": 1.5}, "sft": {}}


def numbers(method, seed=0):
    """A step's (logps, reference_logps, inputs): six pairs, all chosen first, or six completions."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 * BATCH if method in ("dpo", "ipo", "orpo", "simpo") else BATCH
    logps, reference = -3 * torch.rand(2, count, generator=generator) - 0.5
    lengths = torch.tensor([2, 3, 1, 4, 2, 5])
    mask = torch.arange(8) < 3 + lengths[:, None]
    inputs = {"desirable": torch.tensor([True, False, True, True, False, False]), "kl": torch.tensor(0.3),
              "sequences": {"completion_mask": mask & (torch.arange(8) >= 3)}, "step_tokens": lengths.sum()}
    return logps.requires_grad_(), None if method in ("orpo", "simpo", "sft") else reference, inputs


def part(method, logps, reference, inputs, rows):
    """The same for some of the rows."""
    if len(logps) == 2 * BATCH:
        at = [*rows, *(BATCH + row for row in rows)]
    else:
        at, rows = list(rows), list(rows)
        inputs = inputs | {"desirable": inputs["desirable"][rows],
                           "sequences": {"completion_mask": inputs["sequences"]["completion_mask"][rows]}}
    return logps[at], None if reference is None else reference[at], inputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cuts", [[range(2), range(2, 6)], [[5], [0, 3], [4, 2, 1]]], ids=["two", "three"])
def test_micro_batches_add_up_to_the_step(method, cuts):
    """Loss, gradient and every mean, whichever rows stand together."""
    recipe = Recipe(model="none", data="none", method=method, batch_size=BATCH, **METHODS[method])
    logps, reference, inputs = numbers(method)
    whole_sums, sums = StepSums(), StepSums()
    whole = micro_batch_loss(recipe, logps, reference, inputs, whole_sums)
    [expected] = torch.autograd.grad(whole, logps)
    parts = [micro_batch_loss(recipe, *part(method, logps, reference, inputs, rows), sums) for rows in cuts]
    [found] = torch.autograd.grad(sum(parts), logps)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().min() > 0 and whole.ndim == 0
    means = whole_sums.means(accelerator())
    assert sums.means(accelerator()) == pytest.approx(means, rel=1e-6, abs=1e-7)
    assert means["loss"] == pytest.approx(whole.item(), rel=1e-6)


def test_a_step_of_dpo_by_hand():
    recipe = Recipe(model="none", data="none", method="dpo", batch_size=4, beta=0.5)
    logps, reference = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-2.0, -2.0, -1.0, -3.0])
    sums = StepSums()  # chosen -1, -2; rejected -3, -1: log-ratios 1, 0 and -2, 2
    loss = micro_batch_loss(recipe, logps, reference, {}, sums)
    losses = -torch.nn.functional.logsigmoid(0.5 * torch.tensor([3.0, -2.0]))
    assert loss.item() == pytest.approx(losses.sum().item() / 4)  # of the step's four pairs, these are two
    assert sums.means(accelerator()) == pytest.approx({
        "loss": losses.mean().item(), "logps/chosen": -1.5, "logps/rejected": -2.0, "logratio/chosen": 0.5,
        "logratio/rejected": 0.0, "rewards/chosen": 0.25, "rewards/rejected": 0.0, "rewards/margin": 0.25,
        "rewards/accuracy": 0.5})


def test_a_step_of_kto_by_hand():
    recipe = Recipe(model="none", data="none", method="kto", batch_size=4, beta=0.5)
    sums = StepSums()
    inputs = {"desirable": torch.tensor([True, False, True]), "kl": torch.tensor(1.0)}
    ratios = torch.tensor([3.0, -1.0, 1.0])
    loss = micro_batch_loss(recipe, ratios - 5, torch.full((3,), -5.0), inputs, sums)
    losses = 1 - torch.sigmoid(0.5 * torch.tensor([2.0, 2.0, 0.0]))  # desirable r - z0, undesirable z0 - r
    assert loss.item() == pytest.approx(losses.sum().item() / 4)
    means = sums.means(accelerator())
    assert means["loss"] == pytest.approx(losses.mean().item())
    assert (means["logratio/chosen"], means["logratio/rejected"]) == (2, -1)
    assert (means["rewards/chosen"], means["rewards/rejected"]) == (1, -0.5)
    assert (means["logps/chosen"], means["logps/rejected"]) == (-3, -6)


def test_a_step_of_sft_is_a_mean_over_its_tokens():
    recipe = Recipe(model="none", data="none", method="sft", batch_size=4)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    sums = StepSums()
    loss = micro_batch_loss(recipe, torch.tensor([-4.0, -5.0]), None, {
        "sequences": {"completion_mask": mask}, "step_tokens": torch.tensor(12)}, sums)
    assert loss.item() == 9 / 12 and sums.means(accelerator()) == {"loss": 3.0, "logps/chosen": -4.5}


# ---------------------------------------------------------------------------------------- KTO in one pass


def one_step(directory, micro, shared=True, **settings):
    """z0, the loss and the gradients of the first step of a KTO run; and whether it was one pass."""
    rows = random_rows("kto", 24, seed=2)
    models = {"policy": tiny_llama(seed=4).train(), "reference_model": tiny_llama()}
    trainer = make_trainer(directory, method="kto", micro_batch_size=micro, rows=rows, **models, **settings)
    trainer.row_limit *= shared
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 8 // micro, "cpu")
    z0, original = [], trainer._reference_point
    trainer._reference_point = lambda ratios: z0.append(original(ratios)) or z0[-1]
    losses = []
    for batch in batches:
        losses.append(trainer.compute_loss(trainer.model, batch))
        losses[-1].backward()
    found = z0[0] if z0 else batches[0]["kl"]
    gradients = {name: p.grad.clone() for name, p in trainer.policy.named_parameters()}
    return found.item(), sum(losses).item(), gradients, trainer.one_pass


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_kto_with_shared_prompts_equals_kto_without_in_one_pass_or_several(tmp_path, weight):
    z0, loss, gradients, one_pass = one_step(tmp_path, 8, desirable_weight=weight)
    assert one_pass and z0 > 0.1
    for micro, shared in ((8, False), (4, False), (4, True), (1, True)):
        other_z0, other_loss, others, one_pass = one_step(tmp_path, micro, shared, desirable_weight=weight)
        assert not one_pass
        assert other_z0 == pytest.approx(z0, abs=1e-5) and other_loss == pytest.approx(loss, abs=1e-5)
        assert_same_gradients(gradients, others)


def test_one_pass_of_kto_is_one_pass_of_each_model(tmp_path):
    """Matched and mismatched completions share their prompts: the policy and the reference are asked once."""
    trainer = make_trainer(tmp_path, method="kto", reference_model=tiny_llama(), policy=tiny_llama().train())
    [batch], _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    trainer.compute_loss(trainer.model, batch)  # the first time each model is asked what its head does
    calls = []
    for name, model in (("policy", trainer.policy), ("reference", trainer.reference.model)):
        hook = lambda *_, name=name: calls.append((name, torch.is_grad_enabled()))  # noqa: E731
        model.model.register_forward_hook(hook)
    trainer.compute_loss(trainer.model, batch)
    assert calls == [("reference", False), ("policy", True)]


def test_the_reference_shares_prompts_in_a_step_of_several_micro_batches(tmp_path):
    """Of the policy matched and mismatched completions are two passes, of the reference they are one."""
    trainer = make_trainer(tmp_path, method="kto", reference_model=tiny_llama(), policy=tiny_llama().train(),
                           micro_batch_size=4)
    seen = {"policy": [], "reference": []}
    for name, model in (("policy", trainer.policy), ("reference", trainer.reference.model)):
        completion_logps(model, {"input_ids": PAIR, "attention_mask": PAIR > 0, "completion_mask": PAIR > 1})
        model.model.register_forward_pre_hook(
            lambda _, args, inputs, name=name: seen[name].append((inputs["input_ids"] != PAD).sum().item()),
            with_kwargs=True)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, "cpu")
    for batch in batches:
        trainer.compute_loss(trainer.model, batch)
    rows = [trainer.stream[i] for i in range(8)]
    prompts, matched, mismatched = (
        [sum(len(row[name]) for row in part) for part in (rows[:4], rows[4:])]
        for name in ("prompt_ids", "completion_ids", "mismatched_ids"))
    assert seen["policy"] == [p + c for other in (mismatched, matched) for p, c in zip(prompts, other)]
    assert seen["reference"] == [sum(part) for part in zip(prompts, matched, mismatched)]
