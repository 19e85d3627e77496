"""Exercises as learners write them: right ones pass in three spellings, each usual mistake is named."""

from __future__ import annotations

import copy
import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tralign_mini as tr
from tralign_mini import exercises
from tralign_mini.logprobs import plain_completion_logps

# All functions are written here anew, as learners would: none comes from the package's table of mistakes.


# Implicit reward.

def reward(policy_logps, reference_logps, beta):
    return beta * (policy_logps - reference_logps)


def reward_keyword_only(policy_logps, reference_logps, *, beta=0.1):
    return beta * policy_logps - beta * reference_logps


def reward_in_a_loop(p, r, beta):
    return torch.stack([beta * (x - y) for x, y in zip(p, r)])


# Paired losses.

def dpo_by_margin(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * ((pc - rc) - (pr - rr)))


def dpo_by_softplus(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                    reference_rejected_logps, *, beta):
    policy_margin = policy_chosen_logps - policy_rejected_logps
    reference_margin = reference_chosen_logps - reference_rejected_logps
    return F.softplus(beta * (reference_margin - policy_margin))


def dpo_by_logaddexp(*logps, **settings):
    margin = settings["beta"] * (logps[0] - logps[2] - logps[1] + logps[3])
    return torch.logaddexp(torch.zeros_like(margin), -margin)


def ipo_by_margin(pc, pr, rc, rr, beta):
    return (pc - rc - pr + rr - 1 / (2 * beta)) ** 2


def ipo_by_mse(pc, pr, rc, rr, *, beta):
    margin = (pc - pr) - (rc - rr)
    return F.mse_loss(margin, torch.full_like(margin, 0.5 / beta), reduction="none")


def ipo_scaled(pc, pr, rc, rr, beta):
    return (beta * (pc - rc) - beta * (pr - rr) - 0.5).square() / beta**2


# KTO.

def kto_by_where(p, r, desirable, kl, beta):
    ratio = p - r
    value = torch.where(desirable, torch.sigmoid(beta * (ratio - kl)), torch.sigmoid(beta * (kl - ratio)))
    return 1 - value


def kto_by_sign(policy_logps, reference_logps, desirable, kl, *, beta):
    sign = desirable.float() * 2 - 1
    return torch.sigmoid(beta * sign * (kl - (policy_logps - reference_logps)))


def kto_by_parts(p, r, desirable, kl, beta):
    losses = torch.empty_like(p)
    losses[desirable] = torch.sigmoid(beta * (kl - p + r))[desirable]
    losses[~desirable] = torch.sigmoid(beta * (p - r - kl))[~desirable]
    return losses


def z0_by_index(logratios):
    n = len(logratios)
    partners = (torch.arange(n) + 1) % n
    return logratios[torch.arange(n), partners].mean().clamp(min=0).detach()


def z0_by_roll(logratios):
    with torch.no_grad():
        return torch.relu(torch.roll(logratios, 1, dims=0).diagonal().mean())


def z0_off_diagonal(logratios):
    n = len(logratios)
    return max(0.0, (logratios.sum() - logratios.trace()).item() / (n * n - n))


# Log-probs.

def logps_by_gather(logits, batch):
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (token_logps * batch["completion_mask"][:, 1:]).sum(-1)


def logps_by_cross_entropy(logits, batch):
    targets = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)[:, 1:]
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(-1)


def logps_in_loops(logits, batch):
    rows = []
    for row in range(len(logits)):
        places = batch["completion_mask"][row].nonzero().flatten().tolist()
        rows.append(sum(logits[row, t - 1].log_softmax(-1)[batch["input_ids"][row, t]] for t in places))
    return torch.stack(rows)


def logps_of_the_package(logits, batch):
    return plain_completion_logps(lambda **_: SimpleNamespace(logits=logits), batch)


# The reference's update, and training with it.

def update_by_lerp(reference, policy, alpha):
    with torch.no_grad():
        for r, p in zip(reference.parameters(), policy.parameters()):
            r.lerp_(p, alpha)


@torch.no_grad()
def update_by_mul_add(reference, policy, alpha):
    for r, p in zip(reference.parameters(), policy.parameters()):
        r.mul_(1 - alpha).add_(p, alpha=alpha)
    return reference


def update_by_state_dict(reference, policy, alpha):
    old, new = reference.state_dict(), policy.state_dict()
    reference.load_state_dict({name: alpha * new[name] + (1 - alpha) * old[name] for name in old})


def update_by_data(reference, policy, alpha):
    for r, p in zip(reference.parameters(), policy.parameters()):
        r.data = alpha * p.data + (1 - alpha) * r.data


def training_loop(policy, reference, optimizer, logps, *, steps, alpha, tau, beta):
    for step in range(1, steps + 1):
        with torch.no_grad():
            reference_chosen, reference_rejected = logps(reference)
        chosen, rejected = logps(policy)
        loss = tr.dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=beta).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % tau == 0:
            tr.update_reference(reference, policy, alpha)


def training_with_trust_region(policy, reference, optimizer, logps, steps, alpha, tau, beta):
    reference.requires_grad_(False)
    region, step = tr.TrustRegion(alpha, tau), 0
    while step < steps:
        optimizer.zero_grad(set_to_none=False)
        dpo_by_margin(*logps(policy), *logps(reference), beta).mean().backward()
        optimizer.step()
        step += 1
        if region.is_due(step):
            update_by_mul_add(reference, policy, alpha)


def training_from_zero(policy, reference, optimizer, logps, **settings):
    for i in range(settings["steps"]):
        constants = [x.detach() for x in logps(reference)]
        loss = dpo_by_softplus(*logps(policy), *constants, beta=settings["beta"]).sum() / len(constants[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (i + 1) % settings["tau"] == 0:
            update_by_lerp(reference, policy, settings["alpha"])


# Adapters and KL.

def average_stacked(B, A, B_ref, A_ref, alpha):
    return torch.cat([alpha * B, (1 - alpha) * B_ref], dim=1), torch.cat([A, A_ref], dim=0)


def average_scaling_a(B, A, B_ref, A_ref, *, alpha):
    return torch.hstack([B_ref, B]), torch.vstack([(1 - alpha) * A_ref, alpha * A])


def average_by_svd(B, A, B_ref, A_ref, *, alpha):
    U, S, Vh = torch.linalg.svd(alpha * B @ A + (1 - alpha) * B_ref @ A_ref, full_matrices=False)
    rank = B.shape[1] + B_ref.shape[1]
    return U[:, :rank] * S[:rank], Vh[:rank]


def kl_mean(policy, other, completions, sample, logps):
    own = sample(policy)
    return (logps(policy, own) - logps(other, own)).mean()


def kl_number(policy, other, completions, sample, logps):
    own = sample(policy)
    return (logps(policy, own).mean() - logps(other, own).mean()).item()


def kl_loop(policy, other, _, sample, logps):
    ratios = [logps(policy, y[None]) - logps(other, y[None]) for y in sample(policy)]
    return sum(ratios).sum() / len(ratios)


# PPO, MPO's second stage.

def advantages_backwards(rewards, values, *, lam, after_the_end=0.0, further=1.0, next_value=None):
    found, following = [], 0.0
    next_value = after_the_end if next_value is None else next_value
    for reward, value in zip(rewards.flip(0), values.flip(0)):
        following = reward + further * next_value - value + lam * following
        found.append(following)
        next_value = value
    return torch.stack(found).flip(0)


def advantages_by_sum(rewards, values, lam):
    delta = rewards + torch.cat([values[1:], torch.zeros(1)]) - values
    powers = [lam ** k for k in range(len(delta))]
    return torch.stack([sum(p * d for p, d in zip(powers, delta[t:])) for t in range(len(delta))])


def clipped_by_minimum(logps, old_logps, advantages, *, clip):
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_by_where(logps, old, advantages, clip):
    ratio = torch.exp(logps) / torch.exp(old)
    stopped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return -torch.where(stopped, (1 + clip * advantages.sign()) * advantages, ratio * advantages)


# A judge, asked twice.

def orders_by_where(first, second):
    return torch.where(first + second == 1, first, 0.5)


def orders_in_a_loop(first, second):
    return torch.tensor([x if x == 1 - y else 0.5 for x, y in zip(first.tolist(), second.tolist())])


RIGHT = {
    "implicit_reward": [reward, reward_keyword_only, reward_in_a_loop],
    "dpo_loss": [dpo_by_margin, dpo_by_softplus, dpo_by_logaddexp, tr.dpo_loss],
    "ipo_loss": [ipo_by_margin, ipo_by_mse, ipo_scaled, tr.ipo_loss],
    "kto_loss": [kto_by_where, kto_by_sign, kto_by_parts, tr.kto_loss],
    "reference_point": [z0_by_index, z0_by_roll, z0_off_diagonal],
    "completion_logps": [logps_by_gather, logps_by_cross_entropy, logps_in_loops, logps_of_the_package],
    "update_reference": [update_by_lerp, update_by_mul_add, update_by_state_dict, update_by_data,
                         tr.update_reference],
    "training": [training_loop, training_with_trust_region, training_from_zero],
    "average_adapters": [average_stacked, average_scaling_a, average_by_svd],
    "kl_estimate": [kl_mean, kl_number, kl_loop],
    "advantages": [advantages_backwards, advantages_by_sum],
    "clipped_loss": [clipped_by_minimum, clipped_by_where],
    "both_orders": [orders_by_where, orders_in_a_loop],
}


def margin(pc, pr, rc, rr):
    return (pc - pr) - (rc - rr)


def token_scores(logits, batch):
    return logits[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]


def token_logps(logits, batch):
    return token_scores(logits.log_softmax(-1), batch)


# (exercise, what the message has to say, what the learner wrote)
WRONG = [
    ("implicit_reward", "the sign is flipped", lambda p, r, beta: beta * (r - p)),
    ("implicit_reward", "beta is forgotten", lambda p, r, beta: p - r),
    ("implicit_reward", "the reference is not subtracted", lambda p, r, beta: beta * p),

    ("dpo_loss", "the sign is flipped", lambda pc, pr, rc, rr, beta: dpo_by_margin(pr, pc, rr, rc, beta)),
    ("dpo_loss", "the sign is flipped", lambda pc, pr, rc, rr, beta: dpo_by_margin(rc, rr, pc, pr, beta)),
    ("dpo_loss", "beta is forgotten", lambda *logps, beta: -F.logsigmoid(margin(*logps))),
    ("dpo_loss", "the reference is not subtracted",
     lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr))),
    ("dpo_loss", "the minus in front is forgotten", lambda *logps, beta: F.logsigmoid(beta * margin(*logps))),
    ("dpo_loss", "beta stands outside", lambda *logps, beta: -beta * F.logsigmoid(margin(*logps))),
    ("dpo_loss", "the log is missing", lambda *logps, beta: 1 - torch.sigmoid(beta * margin(*logps))),

    ("ipo_loss", "the sign is flipped", lambda *logps, beta: (margin(*logps) + 1 / (2 * beta)) ** 2),
    ("ipo_loss", "beta is forgotten", lambda *logps, beta: (margin(*logps) - 0.5) ** 2),
    ("ipo_loss", "the reference is not subtracted", lambda pc, pr, rc, rr, beta: (pc - pr - 0.5 / beta) ** 2),
    ("ipo_loss", "the target is 1 / beta", lambda *logps, beta: (margin(*logps) - 1 / beta) ** 2),
    ("ipo_loss", "the target is beta / 2", lambda *logps, beta: (margin(*logps) - beta / 2) ** 2),
    ("ipo_loss", "this is DPO's loss", dpo_by_softplus),

    ("kto_loss", "the sign is flipped", lambda p, r, d, kl, beta: kto_by_sign(p, r, ~d, kl, beta=beta)),
    ("kto_loss", "beta is forgotten", lambda p, r, d, kl, beta: kto_by_where(p, r, d, kl, 1)),
    ("kto_loss", "the reference is not subtracted",
     lambda p, r, d, kl, beta: kto_by_where(p, 0, d, kl, beta)),
    ("kto_loss", "z0 is forgotten", lambda p, r, d, kl, beta: kto_by_where(p, r, d, 0, beta)),
    ("kto_loss", "every completion counts as desirable",
     lambda p, r, d, kl, beta: 1 - torch.sigmoid(beta * (p - r - kl))),
    ("kto_loss", "the value is taken for the loss",
     lambda p, r, d, kl, beta: torch.sigmoid(beta * torch.where(d, 1, -1) * (p - r - kl))),

    ("reference_point", "z0 comes from matched pairs", lambda x: x.diagonal().mean().clamp(min=0).detach()),
    ("reference_point", "z0 comes from matched pairs", lambda x: x.diag().roll(1).mean().relu().detach()),
    ("reference_point", "z0 comes from matched pairs", lambda x: x.diag().mean().item()),
    ("reference_point", "matched pairs are in the mean, too", lambda x: x.mean().clamp(min=0).detach()),
    ("reference_point", "each row is clamped", lambda x: x.roll(-1, 1).diagonal().relu().mean().detach()),
    ("reference_point", "each row is clamped",
     lambda x: x[~torch.eye(len(x), dtype=torch.bool)].relu().mean().detach()),
    ("reference_point", "it is not clamped at 0", lambda x: x.roll(1, 1).diagonal().mean().detach()),
    ("reference_point", "it carries a gradient", lambda x: x.roll(1, 1).diagonal().mean().clamp(min=0)),

    ("completion_logps", "prompt tokens are counted. ",
     lambda logits, batch: logps_by_gather(logits, batch | {"completion_mask": batch["attention_mask"]})),
    ("completion_logps", "prompt tokens are counted, and padding",
     lambda logits, batch: token_logps(logits, batch).sum(-1)),
    ("completion_logps", "the mean is taken for the sum",
     lambda logits, batch: logps_by_gather(logits, batch) / batch["completion_mask"].sum(-1)),
    ("completion_logps", "the shift by one is forgotten", lambda logits, batch: (batch["completion_mask"]
     * logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None])[..., 0]).sum(-1)),
    ("completion_logps", "the mask is not shifted along",
     lambda logits, batch: (token_logps(logits, batch) * batch["completion_mask"][:, :-1]).sum(-1)),
    ("completion_logps", "EOS is left out", lambda logits, batch: logps_by_gather(
        logits, batch | {"completion_mask": batch["completion_mask"] & (batch["input_ids"] != 1)})),
    ("completion_logps", "the softmax is forgotten",
     lambda logits, batch: (token_scores(logits, batch) * batch["completion_mask"][:, 1:]).sum(-1)),

    ("update_reference", "alpha and 1 - alpha are swapped",
     lambda reference, policy, alpha: update_by_lerp(reference, policy, 1 - alpha)),
]


def update_by_name(reference, policy, alpha):
    for r, p in zip(reference.parameters(), policy.parameters()):
        r = alpha * p + (1 - alpha) * r


def update_by_copy(reference, policy, alpha):
    reference = copy.deepcopy(policy)
    return reference


def update_by_new_parameters(reference, policy, alpha):
    reference.weight = nn.Parameter(alpha * policy.weight.data + (1 - alpha) * reference.weight.data)


def update_with_graph(reference, policy, alpha):
    for r, p in zip(reference.parameters(), policy.parameters()):
        r.mul_(1 - alpha).add_(alpha * p)


def update_sharing_memory(reference, policy, alpha):
    for r, p in zip(reference.parameters(), policy.parameters()):
        r.data = p.data if alpha == 1 else alpha * p.data + (1 - alpha) * r.data


@torch.no_grad()
def update_adding(reference, policy, alpha):
    for r, p in zip(reference.parameters(), policy.parameters()):
        r.add_(alpha * p)


WRONG += [
    ("update_reference", "nothing moves", update_by_name),
    ("update_reference", "nothing moves", lambda reference, policy, alpha: None),
    ("update_reference", "The reference is replaced, not moved in place", update_by_copy),
    ("update_reference", "The reference is replaced, not moved in place", update_by_new_parameters),
    ("update_reference", "The gradient is tracked", update_with_graph),
    ("update_reference", "share their memory", update_sharing_memory),
    ("update_reference", "The policy is moved", lambda r, p, alpha: update_by_data(p, r, alpha)),
    ("update_reference", "1 - alpha is forgotten", update_adding),
]


def trained(policy, reference, optimizer, logps, *, steps, alpha, tau, beta, order, first=1, detach=True,
            zero=True):
    """A learner's loop. `order`: where the update of the reference stands."""
    for step in range(first, first + steps):
        due = step % tau == 0
        if order == "start" and due:
            tr.update_reference(reference, policy, alpha)
        with torch.set_grad_enabled(not detach):
            constants = logps(reference)
        if zero:
            optimizer.zero_grad()
        dpo_by_margin(*logps(policy), *constants, beta).mean().backward()
        if order == "middle" and due:
            tr.update_reference(reference, policy, alpha)
        optimizer.step()
        if order == "end" and due:
            tr.update_reference(reference, policy, alpha)


WRONG += [("training", text, functools.partial(trained, **how)) for text, how in [
    ("the reference moves before the optimizer step", {"order": "middle"}),
    ("the reference moves before the optimizer step", {"order": "start"}),
    ("there is an update at step 0", {"order": "end", "first": 0}),
    ("there is an update at step 0", {"order": "start", "first": 0}),
    ("there is an update at step 0", {"order": "middle", "first": 0}),
    ("Gradient flows through the reference", {"order": "end", "detach": False}),
    ("zero_grad() is forgotten", {"order": "end", "zero": False}),
]] + [
    ("training", "alpha and 1 - alpha are swapped", lambda *models, alpha, **rest: training_loop(
        *models, alpha=1 - alpha, **rest)),
    ("training", "nothing moves", lambda *models, **settings: None),
    ("training", "the reference never moves", functools.partial(trained, order="nowhere")),

    ("average_adapters", "A and B are averaged one by one", lambda B, A, B_ref, A_ref, alpha: (
        alpha * B + (1 - alpha) * B_ref, alpha * A + (1 - alpha) * A_ref)),
    ("average_adapters", "alpha and 1 - alpha are swapped",
     lambda B, A, B_ref, A_ref, alpha: average_stacked(B_ref, A_ref, B, A, alpha)),
    ("average_adapters", "alpha is squared", lambda B, A, B_ref, A_ref, alpha: (
        torch.cat([alpha * B, (1 - alpha) * B_ref], 1), torch.cat([alpha * A, (1 - alpha) * A_ref]))),

    ("kl_estimate", "it is the log-ratio on the training completions",
     lambda policy, other, data, sample, logps: kl_mean(policy, other, None, lambda model: data, logps)),
    ("kl_estimate", "the sign is flipped", lambda *arguments: -kl_mean(*arguments)),
    ("kl_estimate", "the samples are the other model's",
     lambda policy, other, data, sample, logps: kl_mean(policy, other, None, lambda _: sample(other), logps)),
    ("kl_estimate", "it is KL(other || policy)", lambda policy, other, *rest: kl_mean(other, policy, *rest)),
    ("kl_estimate", "the sum is taken for the mean",
     lambda policy, other, data, sample, logps: (
         logps(policy, sample(policy)) - logps(other, sample(policy))).sum().item()),
]


def ratios(logps, old, clip):
    ratio = (logps - old).exp()
    return ratio, ratio.clamp(1 - clip, 1 + clip)


WRONG += [
    ("advantages", "lam is forgotten", lambda r, v, lam: advantages_by_sum(r, v, 1.0)),
    ("advantages", "only the next step counts", lambda r, v, lam: advantages_by_sum(r, v, 0.0)),
    ("advantages", "after the last token its own value comes once more",
     lambda r, v, lam: advantages_backwards(r, v, lam=lam, after_the_end=v[-1])),
    ("advantages", "the next value is left out",
     lambda r, v, lam: advantages_backwards(r, v, lam=lam, further=0)),
    ("advantages", "the values are added", lambda r, v, lam: advantages_by_sum(r, v, lam) + v),
    ("advantages", "it walks forwards", lambda r, v, lam: functools.reduce(
        lambda found, delta: torch.cat([found, (delta + lam * found[-1])[None]]),
        (r + torch.cat([v[1:], torch.zeros(1)]) - v)[1:], (r[:1] + v[1:2] - v[:1]))),

    ("clipped_loss", "the sign is flipped", lambda *x, clip: -clipped_by_minimum(*x, clip=clip)),
    ("clipped_loss", "nothing is clipped", lambda new, o, a, clip: -ratios(new, o, clip)[0] * a),
    ("clipped_loss", "the ratio is clipped always", lambda new, o, a, clip: -ratios(new, o, clip)[1] * a),
    ("clipped_loss", "the larger of the two counts",
     lambda new, o, a, clip: torch.minimum(*(-x * a for x in ratios(new, o, clip)))),
    ("clipped_loss", "clip is taken for 0.2", lambda *x, clip: clipped_by_where(*x, 0.2)),
    ("clipped_loss", "the ratio is a difference of logs", lambda new, o, a, clip: torch.maximum(
        (o - new) * a, -(new - o).clamp(1 - clip, 1 + clip) * a)),

    ("both_orders", "the second verdict is not mirrored",
     lambda first, second: torch.where(first == second, first, 0.5)),
    ("both_orders", "the two are averaged", lambda first, second: torch.stack([first, 1 - second]).mean(0)),
    ("both_orders", "only the first order counts", lambda first, second: first.clone()),
    ("both_orders", "a contradiction is a loss",
     lambda first, second: torch.where(first + second == 1, first, 0.0)),
]


def verdict(name, function, capsys) -> tuple[bool, str]:
    """What the check returns, and the one line that it prints."""
    capsys.readouterr()
    solved = getattr(exercises, f"check_{name}")(function)
    printed = capsys.readouterr().out
    assert printed.endswith("\n") and printed.count("\n") == 1
    assert printed.startswith(f"{name}: right! " if solved else f"{name}: not yet. ")
    return solved, printed


@pytest.mark.parametrize("name, function", [(name, f) for name in RIGHT for f in RIGHT[name]])
def test_right_solutions_pass_however_they_are_written(name, function, capsys):
    solved, printed = verdict(name, function, capsys)
    assert solved is True, printed


@pytest.mark.parametrize("name, text, function", WRONG)
def test_each_usual_mistake_is_called_by_its_name(name, text, function, capsys):
    solved, printed = verdict(name, function, capsys)
    assert solved is False
    assert text in printed


def raising(*arguments, **keywords):
    raise KeyError("chosen")


def dpo_changed(change):
    return lambda *logps, beta: change(dpo_by_margin(*logps, beta))


def with_backward(losses):
    losses.mean().backward()
    return losses


# (exercise, what the message has to say, what the learner passed)
BROKEN = [
    ("dpo_loss", "It returns NoneType, where a floating-point tensor of shape (2,) is asked for. Is it still",
     dpo_changed(lambda x: None)),
    ("dpo_loss", "It returns float, where a floating-point tensor of shape (2,) is asked for. Numbers carry",
     dpo_changed(lambda x: x.mean().item())),
    ("dpo_loss", "It returns list, where a floating-point tensor of shape (2,) is asked for. Numbers carry",
     dpo_changed(lambda x: x.tolist())),
    ("dpo_loss", "It returns ndarray, where", dpo_changed(lambda x: x.detach().numpy())),
    ("dpo_loss", "It returns tuple, where", lambda *logps, beta: tuple(tr.dpo_loss(*logps, beta=beta))),
    ("dpo_loss", "It returns torch.int64, shape (2,), where", dpo_changed(lambda x: x.long())),
    ("dpo_loss", "shape (), where a floating-point tensor of shape (2,) is asked for. Leave out .mean()",
     dpo_changed(lambda x: x.mean())),
    ("dpo_loss", "shape (2, 1), where", dpo_changed(lambda x: x[:, None])),
    ("dpo_loss", "NaN or infinity", lambda *logps, beta: -torch.log(torch.sigmoid(beta * margin(*logps)))),
    ("dpo_loss", "NaN or infinity", lambda *logps, beta: torch.log(1 + torch.exp(-beta * margin(*logps)))),
    ("dpo_loss", "NaN or infinity", dpo_changed(lambda x: x * float("nan"))),
    ("dpo_loss", "carry no gradient", dpo_changed(lambda x: x.detach())),
    ("dpo_loss", "carry no gradient", torch.no_grad()(dpo_by_margin)),
    ("dpo_loss", "their gradient cannot be taken: Trying to backward", dpo_changed(with_backward)),
    ("dpo_loss", "not their gradient",
     lambda pc, pr, rc, rr, beta: dpo_by_margin(pc, pr.detach(), rc, rr, beta)),
    ("dpo_loss", "It raises KeyError: 'chosen'.", raising),
    ("dpo_loss", "It raises TypeError: ", lambda chosen, rejected: chosen - rejected),
    ("dpo_loss", "Pass a function of the docstring's signature.", lambda chosen, rejected: chosen - rejected),
    ("dpo_loss", "Pass a function of the docstring's signature.", torch.zeros(2)),
    ("dpo_loss", "It raises ValueError: beta = -", lambda *logps, beta: tr.dpo_loss(*logps, beta=-beta)),
    ("dpo_loss", "Test it: where policy and reference agree", dpo_changed(lambda x: 2 * x)),
    ("reference_point", "shape (4,), where one number is asked for", lambda x: x.roll(1, 1).diagonal()),
    ("reference_point", "It returns NoneType, where one number", lambda x: None),
    ("completion_logps", "carry no gradient", lambda logits, batch: logps_by_gather(logits.detach(), batch)),
    ("completion_logps", "shape (), where", lambda logits, batch: logps_by_gather(logits, batch).sum()),
    ("update_reference", "Is the update under torch.no_grad()?",
     lambda r, p, alpha: [x.requires_grad_().mul_(1 - alpha) for x in r.parameters()]),
    ("training", "Test it: alpha = tau = 1", lambda *args, tau, **rest: training_loop(*args, tau=4, **rest)),
    ("training", "It raises TypeError: ", lambda policy, reference, optimizer, logps: None),
    ("average_adapters", "It returns Tensor; asked are", lambda B, A, B_ref, A_ref, alpha: B @ A),
    ("average_adapters", "It returns NoneType; asked are", lambda B, A, B_ref, A_ref, alpha: None),
    ("average_adapters", "It returns [(5, 6), (6, 6)]; asked are", lambda B, A, B_ref, A_ref, alpha: (
        alpha * B @ A + (1 - alpha) * B_ref @ A_ref, torch.eye(6))),
    ("average_adapters", "It returns [(), ()]; asked are", lambda B, A, B_ref, A_ref, alpha: (1.0, None)),
]


@pytest.mark.parametrize("name, text, function", BROKEN)
def test_whatever_else_is_wrong_has_a_message_of_its_own(name, text, function, capsys):
    solved, printed = verdict(name, function, capsys)
    assert solved is False
    assert text in printed


@pytest.mark.parametrize("name", RIGHT)
def test_an_exercise_that_is_still_open_is_not_solved(name, capsys):
    solved, printed = verdict(name, lambda *arguments, **keywords: ..., capsys)
    assert solved is False


@pytest.mark.parametrize("name", RIGHT)
def test_planted_mistakes_differ_from_each_other_and_from_the_truth(name, capsys, monkeypatch):
    """Else a right function could be refused, or a mistake get the name of another."""
    tables = []
    monkeypatch.setattr(exercises, "grade", lambda *table, **more: tables.append((table, more)))
    getattr(exercises, f"check_{name}")(None)
    monkeypatch.undo()
    (_, _, rights, _, mistakes, *_), _ = tables[0]
    for right in rights:
        assert verdict(name, right, capsys)[0], right
    for text, wrong in mistakes:
        solved, printed = verdict(name, wrong, capsys)
        assert not solved and printed.endswith(f"Exactly that comes out if {text}\n"), text
        tested = [said for exercise, said, _ in WRONG if exercise == name and said in text]
        assert tested, f"no learner makes this mistake: {text}"


def test_every_check_is_tested_and_states_its_signature():
    checks = [name for name in vars(exercises) if name.startswith("check_")]
    assert checks == [f"check_{name}" for name in RIGHT]
    for name in RIGHT:
        doc = getattr(exercises, f"check_{name}").__doc__
        assert doc.startswith(f"`{name}("), name


def test_a_check_leaves_the_random_state_alone_and_a_function_its_inputs(capsys):
    def in_place(policy_logps, reference_logps, beta):
        reference_logps.mul_(-1)
        return beta * (policy_logps + reference_logps)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert verdict("implicit_reward", in_place, capsys)[0]
    assert verdict("implicit_reward", in_place, capsys)[0]
    for name, functions in RIGHT.items():
        verdict(name, functions[0], capsys)
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_check_works_where_gradients_are_switched_off(capsys):
    with torch.no_grad():
        assert verdict("dpo_loss", dpo_by_margin, capsys)[0]
        assert not verdict("dpo_loss", torch.no_grad()(dpo_by_margin), capsys)[0]


def test_an_interruption_by_the_learner_is_not_swallowed():
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exercises.check_dpo_loss(interrupted)
