"""What a micro-batch adds to the loss of its optimizer step, by method, and the sums behind metrics.jsonl.

The loss of a step is a sum over its pairs (kto: completions; sft: tokens) divided by how many the whole step
has, so it does not depend on how the step is cut into micro-batches.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from . import losses
from .recipe import Recipe


class StepSums:
    """Sums and counts by name over the micro-batches of a step."""

    def __init__(self):
        self.sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, values: torch.Tensor, count: torch.Tensor | int | None = None) -> None:
        """Add a tensor's values; `count` where a value stands for several (tokens)."""
        self.sums[name][0] += values.detach().float().sum()
        self.sums[name][1] += values.numel() if count is None else count

    def means(self, accelerator) -> dict[str, float | None]:
        """Means over all micro-batches and processes, in float64; None without a value. Empties the sums."""
        names = sorted(self.sums)
        sums = torch.tensor([[float(x) for x in self.sums[name]] for name in names], dtype=torch.float64)
        self.sums.clear()
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return {name: (s[0] / s[1]).item() if s[1] > 0 else None for name, s in zip(names, sums)}


def micro_batch_loss(recipe: Recipe, logps, reference_logps, inputs: dict, sums: StepSums) -> torch.Tensor:
    """The part of the step's loss that this micro-batch adds, from the log-probs (reward: rewards)."""
    if recipe.method == "sft":
        tokens = inputs["sequences"]["completion_mask"].sum()
        sums.add("loss", -logps, tokens)
        sums.add("logps/chosen", logps)
        return -logps.sum() / inputs["step_tokens"]
    per_method = _kto if recipe.method == "kto" else _paired
    return per_method(recipe, logps, reference_logps, inputs, sums).sum() / recipe.batch_size


def _paired(recipe, logps, reference_logps, inputs, sums):
    chosen, rejected = logps.chunk(2)
    if recipe.method == "reward":
        result = losses.bradley_terry_loss(chosen, rejected)
        _add_rewards(sums, result)
        return result.losses
    settings = {"dpo": {"label_smoothing": recipe.label_smoothing}, "simpo": {"gamma": recipe.simpo_gamma}}
    settings = settings.get(recipe.method, {}) | {"beta": recipe.beta}
    references = () if reference_logps is None else reference_logps.chunk(2)
    result = getattr(losses, f"{recipe.method}_loss")(chosen, rejected, *references, **settings)
    for name, values, reference in zip(("chosen", "rejected"), (chosen, rejected), references):
        sums.add(f"logratio/{name}", values - reference)
    _add_rewards(sums, result)
    sums.add("logps/chosen", chosen)
    sums.add("logps/rejected", rejected)
    return result.losses


def _add_rewards(sums, result):
    sums.add("loss", result.losses)
    sums.add("rewards/chosen", result.chosen_rewards)
    sums.add("rewards/rejected", result.rejected_rewards)
    sums.add("rewards/margin", result.chosen_rewards - result.rejected_rewards)
    sums.add("rewards/accuracy", (result.chosen_rewards > result.rejected_rewards).float())


def _kto(recipe, logps, reference_logps, inputs, sums):
    desirable = inputs["desirable"]
    weights = {"desirable_weight": recipe.desirable_weight, "undesirable_weight": recipe.undesirable_weight}
    result = losses.kto_loss(logps, reference_logps, desirable, inputs["kl"], beta=recipe.beta, **weights)
    sums.add("loss", result.losses)
    sums.add("rewards/chosen", result.chosen_rewards)
    sums.add("rewards/rejected", result.rejected_rewards)
    for name, values in (("logps", logps), ("logratio", logps - reference_logps)):
        sums.add(f"{name}/chosen", values[desirable])
        sums.add(f"{name}/rejected", values[~desirable])
    return result.losses
