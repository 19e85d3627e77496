"""What a run will do, printed before it starts: steps, data, and how often the reference moves.

tau means nothing without the number of steps: with no update a "moving" reference is plain DPO, IPO or KTO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

WITHOUT_REFERENCE = ("orpo", "simpo", "sft", "reward")


@dataclass(frozen=True)
class Plan:
    """A recipe, and what it comes to with so many rows; made by `Recipe.plan`, printed by `str`."""

    recipe: Recipe
    rows: int  # of the data, those that are used
    unit: str  # what a row is: "pairs" or "completions"
    steps: int  # optimizer steps
    updates: int  # of the reference

    @property
    def warnings(self) -> list[str]:
        """A moving reference that hardly moves: 0 or 1 updates in the whole run."""
        recipe, steps = self.recipe, self.steps
        if recipe.reference == "fixed" or self.updates > 1:
            return []
        if self.updates == 0:
            what = f"the reference never moves, this is plain {recipe.method.upper()}"
        elif recipe.tau == steps:
            what = f"the reference moves only after the last step, this is plain {recipe.method.upper()}"
        else:
            what = f"the reference moves only once, at step {recipe.tau}"
        advice = "train longer"
        if steps > 1:
            advice = f"choose tau <= {max(1, steps // 3)} for {min(3, steps)} updates"
        return [f"tau={recipe.tau} but the run has {steps} step{'s' * (steps > 1)}: {what}; {advice}"]

    def __str__(self) -> str:
        recipe = self.recipe
        reference = "none" if recipe.method in WITHOUT_REFERENCE else "fixed at the start"
        if recipe.reference == "soft":
            reference = f"soft: {recipe.alpha:g} policy + {1 - recipe.alpha:.6g} reference"
        elif recipe.reference == "hard":
            reference = "hard: copies the policy"
        if recipe.reference != "fixed":
            reference += f", every {recipe.tau} steps: {self.updates} updates"
        tuning = recipe.tuning
        if tuning != "full":
            tuning += f", rank {recipe.lora_rank}, lora_alpha {recipe.lora_alpha:g}"
        if tuning != "full" and recipe.method not in WITHOUT_REFERENCE:
            tuning += f", reference rank {recipe.reference_rank}"
        epochs = self.steps * recipe.batch_size / self.rows
        method = f"{recipe.method}, beta {recipe.beta:g}, {recipe.logps} of log-probs over tokens"
        if recipe.method == "ppo":
            method = f"ppo, KL coefficient {recipe.kl_coef:g}, reward {recipe.reward_model or 'a function'}"
        lines = {
            "model": recipe.model,
            "data": f"{recipe.data}, {self.rows} {self.unit}",
            "method": recipe.method if recipe.method in ("sft", "reward") else method,
            "reference": reference,
            "tuning": f"{tuning}, learning rate {recipe.learning_rate:g}, {recipe.lr_scheduler}",
            "steps": f"{self.steps} of {recipe.batch_size} {self.unit}, {epochs:.3g} epochs",
            "output": recipe.output,
        }
        text = [f"{key:<10}{value}" for key, value in lines.items()]
        text += [f"note      {note}" for note in recipe.notes()]
        return "\n".join(text + [f"WARNING   {warning}" for warning in self.warnings])
