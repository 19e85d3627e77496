"""PPO for language models (arXiv 1707.06347): the mathematics, and one iteration: samples to new weights.

The state is the prompt and the completion so far, the action the next token, the reward (arXiv 1909.08593)

    r_t = -kl_coef * log(policy / reference)(token t)  +  the completion's score, at its last token

n completions of up to T tokens stand in tensors (n, T), padded on the right; `mask`, (n, T) bool, is True on
real tokens, EOS included. "N+ details" is "The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .generate import Samples, sample
from .logprobs import completion_token_logps
from .ppo_models import active, completion_values
from .ppo_recipe import PPORecipe
from .tokens import collate

KL_STEP, KL_GAIN = 0.2, 0.1  # of the adaptive KL coefficient, arXiv 1909.08593, sec. 2.2
ADVICE = ("Training stops, and the last checkpoint is kept. Try a smaller learning_rate or max_grad_norm, "
          "or dtype=float32.")


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t as above, (n, T), 0 on padding. scores: (n,); log_ratio, (n, T): log(policy / reference) (k1)."""
    rewards = -kl_coef * log_ratio * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16): advantages and returns, 0 on padding.

    values[:, t] is V of the state before token t. An episode ends after its last token, where V is 0.
    """
    rewards, values = rewards * mask, values * mask
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the real tokens of all completions, 0 on padding (N+ details)."""
    real = values[mask]
    return (values - real.mean()) * torch.rsqrt(real.var(correction=0) + 1e-8) * mask


def policy_losses(logps: Tensor, old_logps: Tensor, advantages: Tensor, *,
                  clip: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (arXiv 1707.06347, eq. 7), negated, and the ratio policy / old policy."""
    ratio = (logps - old_logps).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Half the squared error, the value clipped around its old one, as in OpenAI's baselines (N+ details)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || reference) on the policy's own samples: unbiased, never negative.

    log_ratio is log(policy / reference), whose plain mean is k1. joschu.net/blog/kl-approx.html
    """
    return torch.expm1(-log_ratio) + log_ratio


def adapted(kl_coef: float, kl: float, target: float | None) -> float:
    """The next KL coefficient (arXiv 1909.08593, sec. 2.2), at most 2 % away; the same without a target."""
    if target is None:
        return kl_coef
    return kl_coef * (1 + KL_GAIN * min(max(kl / target - 1, -KL_STEP), KL_STEP))


class MicroBatch(NamedTuple):
    """Completions that go through a model together: their places in the rollout, and their tensors."""

    rows: Tensor  # (m,)
    batch: dict[str, Tensor]


@dataclass
class Rollout:
    """The samples of one iteration and what was found out about them before learning; (n, T) if not said."""

    samples: Samples
    minibatches: list[list[MicroBatch]]  # an optimizer step each
    mask: Tensor
    logps: Tensor  # of the policy that sampled
    values: Tensor
    advantages: Tensor
    returns: Tensor
    numbers: dict[str, float]  # for metrics.jsonl


class PPO:
    """Policy, reference, value function and reward, and the iteration in which policy and values learn.

    policy: causal LM or PeftModel without dropout; reference: as of `make_reference`; value: a classifier of
    `ppo_models`, whose parameters `trained` learn; score(prompts, samples) rewards each completion; autocast
    makes the context in which models compute.
    """

    def __init__(self, recipe: PPORecipe, policy: nn.Module, reference, value: nn.Module,
                 trained: dict[str, Tensor], score: Callable[[Sequence, Samples], Sequence[float]], tokenizer,
                 autocast: Callable):
        self.recipe, self.policy, self.reference, self.value = recipe, policy, reference, value
        self.score, self.tokenizer, self.autocast = score, tokenizer, autocast
        self.kl_coef = recipe.kl_coef
        self.trained = [p for p in policy.parameters() if p.requires_grad], list(trained.values())
        # Policy and value function share no trained weight, so a coefficient between their losses would do
        # nothing: Adam does not see the scale of a gradient. eps: N+ details
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in self.trained], lr=recipe.learning_rate, eps=1e-5,
            weight_decay=recipe.weight_decay, fused=True)

    @torch.no_grad()
    def rollout(self, prompts: Sequence, step: int) -> Rollout:
        """Sample a completion for each prompt, at temperature 1, and compute all that learning needs.

        Draws from (recipe.seed, step) alone, so that a resumed run draws the same.
        """
        recipe, tokenizer = self.recipe, self.tokenizer
        rng = np.random.default_rng([recipe.seed, step])
        with self.autocast():
            samples = sample(
                self.policy, tokenizer, prompts, max_completion_tokens=recipe.max_completion_tokens,
                max_prompt_tokens=recipe.max_prompt_tokens, seed=int(rng.integers(2**32)),
                batch_size=recipe.sample_batch_size or len(prompts))
            scores = torch.as_tensor(self.score(prompts, samples), dtype=torch.float32, device="cpu")
        if scores.shape != (len(prompts),):
            raise ValueError(f"the reward of {len(prompts)} completions has shape {tuple(scores.shape)}: it "
                             "has to be one number for each of them.")
        device = next(self.policy.parameters()).device
        lengths = torch.tensor([len(completion) for _, completion in samples.sequences], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        minibatches = self._cut(samples.sequences, rng, device)
        micro_batches = sum(minibatches, [])

        # The sampler's own log-probs, by KV cache and left padding, differ in their last digits from those of
        # training. Computed anew, by the forward and on the very micro-batches of training, they give a ratio
        # of exactly 1 at the first minibatch (N+ details).
        logps = self._by_token(micro_batches, mask, self._logps)
        with active(self.value):
            values = self._by_token(micro_batches, mask, self._values)
        with self.reference.using() as model:
            reference_logps = self._by_token(micro_batches, mask, lambda batch: self._logps(batch, model))

        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for _, ids in samples.sequences])
        # N+ details set the reward of a completion without an end to -1; a penalty keeps an order among them
        penalised = (scores - recipe.missing_eos_penalty * ~ended).to(device)
        log_ratio = (logps - reference_logps) * mask
        rewards = token_rewards(penalised, log_ratio, mask, kl_coef=self.kl_coef)
        advantages, returns = gae(rewards, values, mask, gamma=recipe.gamma, lam=recipe.lam)
        unexplained, variance = (x[mask].var(correction=0) for x in (returns - values, returns))
        numbers = {
            "reward/mean": rewards.sum(1).mean(), "reward/model": scores.mean(),
            "kl/sequence": log_ratio.sum(1).mean(), "kl/k3": (k3(log_ratio) * mask).sum(1).mean(),
            "entropy": -logps[mask].mean(),  # its estimate on the policy's own samples
            "value/explained_variance": 1 - unexplained / (variance + 1e-8),
            "advantage/std": advantages[mask].std(correction=0),
            "eos_rate": ended.float().mean(), "length/rollout": lengths.float().mean(),
        }
        if recipe.whiten:
            advantages = whiten(advantages, mask)
        numbers = {name: number.item() for name, number in numbers.items()} | {"kl_coef": self.kl_coef}
        return Rollout(samples, minibatches, mask, logps, values, advantages, returns, numbers)

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Epochs of minibatches over the samples; numbers for metrics.jsonl, means over their tokens.

        FloatingPointError for a loss or a gradient that is not finite, before it touches the weights, and for
        weights that are not.
        """
        rng = np.random.default_rng([self.recipe.seed, step, 1])
        sums, first = defaultdict(float), None
        for _ in range(self.recipe.ppo_epochs):
            for i in rng.permutation(len(rollout.minibatches)):
                numbers = self._optimizer_step(rollout, rollout.minibatches[i], step)
                first = numbers["ratio/max"] if first is None else first
                for name, number in numbers.items():
                    sums[name] = max(sums[name], number) if name == "ratio/max" else sums[name] + number
        if not all(weight.isfinite().all() for weights in self.trained for weight in weights):
            raise FloatingPointError(f"step {step + 1}: weights are not finite any more. {ADVICE}")
        tokens = sums.pop("tokens")
        numbers = {name: total if name == "ratio/max" else total / tokens for name, total in sums.items()}
        self.kl_coef = adapted(self.kl_coef, rollout.numbers["kl/sequence"], self.recipe.kl_target)
        return numbers | {"ratio/first": first}

    def _optimizer_step(self, rollout: Rollout, minibatch: list[MicroBatch], step: int) -> dict[str, float]:
        """One step on a minibatch; sums over its tokens (of the ratio: the largest)."""
        recipe, sums = self.recipe, defaultdict(float)
        tokens = sum(int(rollout.mask[rows].sum()) for rows, _ in minibatch)
        self.optimizer.zero_grad()
        for rows, batch in minibatch:
            mask = rollout.mask[rows]
            old_logps, advantages = rollout.logps[rows][mask], rollout.advantages[rows][mask]
            old_values, returns = rollout.values[rows][mask], rollout.returns[rows][mask]
            losses, ratio = policy_losses(self._logps(batch), old_logps, advantages, clip=recipe.clip)
            (losses.sum() / tokens).backward()  # a mean over tokens, not over completions (N+ details)
            with active(self.value):  # backward, too: gradient checkpointing computes forward again in it
                values = self._values(batch)
                errors = value_losses(values, old_values, returns, clip=recipe.value_clip)
                (errors.sum() / tokens).backward()
            ratio = ratio.detach()
            sums["ratio/max"] = max(sums["ratio/max"], ratio.max().item())
            for name, numbers in {
                "loss/policy": losses, "loss/value": errors,
                "clip_fraction": losses > -advantages * ratio,  # of tokens for which clipping decides
                "value_clip_fraction": errors > 0.5 * (values - returns).square(),
                "kl/update": k3(-ratio.log()),  # KL(old policy || policy)
            }.items():
                sums[name] += numbers.detach().sum().item()
        norms = [nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm).item() for weights in self.trained]
        found = {name: sums[name] for name in ("loss/policy", "loss/value")} | {"gradient norms": sum(norms)}
        if wrong := [name for name, number in found.items() if not np.isfinite(number)]:
            raise FloatingPointError(
                f"step {step + 1}: {' and '.join(wrong)} not finite. {ADVICE}")
        self.optimizer.step()
        for name, norm in zip(("grad_norm", "grad_norm/value"), norms):
            sums[name] = norm * tokens
        return dict(sums) | {"tokens": tokens}

    def _cut(self, sequences: Sequence, rng: np.random.Generator, device) -> list[list[MicroBatch]]:
        """Random minibatches, each cut into micro-batches of similar length; the same ones in all epochs."""
        n = len(sequences) // self.recipe.minibatches
        at_once = min(self.recipe.micro_batch_size or n, n)
        minibatches, lengths = [], np.array([sum(map(len, sequence)) for sequence in sequences])
        for rows in rng.permutation(len(sequences)).reshape(-1, n):
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            parts = [rows[first : first + at_once] for first in range(0, n, at_once)]
            minibatches.append([])
            for part in parts:
                batch = collate([sequences[i] for i in part], self.tokenizer.pad_token_id)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                minibatches[-1].append(MicroBatch(torch.tensor(part, device=device), batch))
        return minibatches

    def _by_token(self, micro_batches: list[MicroBatch], mask: Tensor, compute: Callable) -> Tensor:
        """(n, T) of what `compute(batch)` gives for each token, 0 on padding."""
        out = torch.zeros(mask.shape, device=mask.device)
        for rows, batch in micro_batches:
            out[rows] = out[rows].masked_scatter(mask[rows], compute(batch))
        return out

    def _logps(self, batch: dict, model: nn.Module | None = None) -> Tensor:
        with self.autocast():
            return completion_token_logps(model or self.policy, batch)[0]

    def _values(self, batch: dict) -> Tensor:
        with self.autocast():
            return completion_values(self.value, batch)
