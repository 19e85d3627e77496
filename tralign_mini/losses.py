"""Preference losses: log-probabilities of a batch in, one loss per example out.

With a reference policy (fixed or moving: arXiv 2404.09656 keeps these losses and moves the reference):
DPO (arXiv 2305.18290), IPO (arXiv 2310.12036), KTO (arXiv 2402.01306).
Without one, as a contrast: ORPO (arXiv 2403.07691), SimPO (arXiv 2405.14734).
Of a reward model and not of a policy: Bradley-Terry.

Every `*_logps` is a tensor of shape (batch,): log p(completion | prompt), one number per completion. All
arithmetic is float32. Finite inputs give finite losses and gradients (up to 1e18: IPO squares its margin).
Gradients flow through the policy's log-probs; the reference's come from a pass without gradient.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F


class PreferenceLoss(NamedTuple):
    """What every loss returns: float32 tensors of shape (batch,); the rewards are for logging only.

    Minimise the mean of `losses`. The rewards carry no gradient. KTO is unpaired: its rewards are of shape
    (n_desirable,) and (n_undesirable,).
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
             beta, label_smoothing=0.0) -> PreferenceLoss:
    """DPO: -log sigmoid(beta h), where h is the margin between the log-ratios of chosen and rejected.

    Log-probs (batch,), *summed* over the completion's tokens. `label_smoothing` is the assumed share of
    flipped labels, in [0, 0.5) (conservative DPO). ValueError for other values or shapes, beta <= 0.
    """
    beta = _positive("beta", beta)
    label_smoothing = _number("label_smoothing", label_smoothing, lambda share: 0 <= share < 0.5,
                              "the share of labels assumed to be flipped, in [0, 0.5)")
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    logits = beta * (chosen_logratios - rejected_logratios)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing)  # arXiv 2305.18290, eq. 7
    losses = losses - F.logsigmoid(-logits) * label_smoothing  # the same for a flipped label
    return _with_rewards(losses, beta * chosen_logratios, beta * rejected_logratios)


def ipo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
             beta) -> PreferenceLoss:
    """IPO: (h - 1 / (2 beta))^2, a regression of the margin h onto a finite target; beta is the paper's tau.

    Log-probs (batch,): *summed* in the paper's eq. 17, *length-averaged* in TRL, LLaMA-Factory and HALOs; the
    same beta means something else in each. ValueError for other shapes, beta <= 0.
    """
    beta = _positive("beta", beta)
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2  # arXiv 2310.12036, eq. 17
    return _with_rewards(losses, beta * chosen_logratios, beta * rejected_logratios)


def kto_loss(policy_logps, reference_logps, desirable, kl, *, beta, desirable_weight=1.0,
             undesirable_weight=1.0) -> PreferenceLoss:
    """KTO: w (1 - sigmoid(beta (log-ratio - kl))) of a desirable completion, mirrored for an undesirable one.

    policy_logps, reference_logps: (batch,), summed over tokens; desirable: bool (batch,); kl: the reference
    point z0, a scalar >= 0 without gradient: the mean log-ratio over *mismatched* pairs, clamped at 0. The
    weights are the paper's lambda_D and lambda_U. `losses` is in the batch's order. ValueError for other
    shapes, beta or a weight <= 0, a kl that is negative or carries gradient.
    """
    beta = _positive("beta", beta)
    desirable_weight = _positive("desirable_weight", desirable_weight)
    undesirable_weight = _positive("undesirable_weight", undesirable_weight)
    policy_logps, reference_logps = _checked(policy_logps=policy_logps, reference_logps=reference_logps)
    is_mask = isinstance(desirable, torch.Tensor) and desirable.dtype == torch.bool
    if not is_mask or desirable.shape != policy_logps.shape:
        raise ValueError(f"desirable is {_describe(desirable)}, but it has to be a bool tensor of shape "
                         f"{tuple(policy_logps.shape)}: True where the completion is desirable.")
    kl = _reference_point(kl)
    logratios = policy_logps - reference_logps
    # arXiv 2402.01306: lambda_y - v(x, y); 1 - sigmoid(x) = sigmoid(-x), precise in the tail
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(-beta * (logratios - kl)),
                         undesirable_weight * torch.sigmoid(-beta * (kl - logratios)))
    return _with_rewards(losses, beta * logratios[desirable], beta * logratios[~desirable])


def orpo_loss(policy_chosen_logps, policy_rejected_logps, *, beta) -> PreferenceLoss:
    """ORPO: the chosen completion's negative log-likelihood plus beta times an odds-ratio loss; no reference.

    Log-probs (batch,), *length-averaged*: exp of one is a probability per token, whose odds p / (1 - p) are
    compared. beta is the paper's lambda. ValueError for other shapes, beta <= 0.
    """
    beta = _positive("beta", beta)
    chosen, rejected = _checked(policy_chosen_logps=policy_chosen_logps,
                                policy_rejected_logps=policy_rejected_logps)
    log_odds_ratio = (chosen - rejected) - (_log_1m_exp(chosen) - _log_1m_exp(rejected))
    losses = -chosen - beta * F.logsigmoid(log_odds_ratio)  # arXiv 2403.07691, eq. 6 and 7
    return _with_rewards(losses, beta * chosen, beta * rejected)


def simpo_loss(policy_chosen_logps, policy_rejected_logps, *, beta, gamma) -> PreferenceLoss:
    """SimPO: -log sigmoid(beta (chosen - rejected) - gamma); no reference.

    Log-probs (batch,), *length-averaged*; gamma >= 0 is the margin asked for, in units of reward. ValueError
    for other values or shapes, beta <= 0.
    """
    beta = _positive("beta", beta)
    gamma = _number("gamma", gamma, lambda margin: margin >= 0, "the margin asked for, a finite number >= 0")
    chosen, rejected = _checked(policy_chosen_logps=policy_chosen_logps,
                                policy_rejected_logps=policy_rejected_logps)
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)  # arXiv 2405.14734, eq. 6
    return _with_rewards(losses, beta * chosen, beta * rejected)


def bradley_terry_loss(chosen_rewards, rejected_rewards) -> PreferenceLoss:
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected), the negative log-likelihood of the label.

    Rewards (batch,) of a reward model, one number per completion. Adding a constant to all of a prompt's
    rewards changes nothing. ValueError for other shapes.
    """
    chosen, rejected = _checked(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return _with_rewards(-F.logsigmoid(chosen - rejected), chosen, rejected)  # arXiv 2203.02155, eq. 1


def _with_rewards(losses, chosen_rewards, rejected_rewards):
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def _logratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    """log(policy / reference) of chosen and rejected completions; times beta, the implicit rewards."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = _checked(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps, reference_rejected_logps=reference_rejected_logps)
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def _log_1m_exp(logps):
    """log(1 - exp(logps)), for logps <= 0.

    A probability of 1 has infinite odds. Here it counts as 1 - 1e-6, which keeps loss and gradient finite.
    """
    return torch.log(-torch.expm1(logps.clamp(max=-1e-6)))


def _checked(**values):
    """The tensors in float32, in order; ValueError unless all are floating-point, of one shape (batch,)."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"{name} is {_describe(value)}, but it has to be a floating-point tensor of "
                             "shape (batch,), as completion_logps and completion_rewards make them.")
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but a loss takes one number per "
                             "completion, (batch,). Are these per-token log-probs? Sum them first.")
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes differ: {found}. Entry i of each belongs to example i: no broadcast.")
    return [value.float() for value in values.values()]


def _reference_point(kl):
    if isinstance(kl, torch.Tensor):
        if kl.ndim != 0:
            raise ValueError(f"kl is {_describe(kl)}, but the reference point is one number for the whole "
                             "optimizer step: logratios.mean().clamp(min=0) over its mismatched pairs.")
        if kl.requires_grad:
            raise ValueError("kl requires grad, but KTO does not differentiate through its reference point: "
                             "pass kl.detach().")
        kl = kl.item()
    return _number("kl", kl, lambda divergence: divergence >= 0, "an estimate of a KL divergence, finite and "
                   "never negative: clamp the mean of the mismatched log-ratios at 0")


def _positive(name, value):
    return _number(name, value, lambda number: number > 0, f"a finite number > 0, for example, {name}=0.1")


def _number(name, value, fits, wanted):
    if not isinstance(value, Real) or isinstance(value, bool) or not (math.isfinite(value) and fits(value)):
        raise ValueError(f"{name} = {value!r}: it has to be {wanted}.")
    return float(value)


def _describe(value):
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
