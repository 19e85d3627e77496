"""What a run will do, printed before it starts: steps, data, and how often the reference moves.

tau means nothing without the number of steps: with no update a "moving" reference is plain DPO, IPO or KTO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

WITHOUT_REFERENCE = ("orpo", "simpo", "sft", "reward")


def unit_of(method: str) -> str:
    """What a row of the data is."""
    return {"kto": "completions", "sft": "completions", "ppo": "prompts"}.get(method, "pairs")


def in_words(recipe: Recipe, steps: int, epochs: float, updates: int) -> dict[str, str]:
    """What a run is, for the plan before it and the report after it."""
    method = recipe.method
    if method == "ppo":
        method += f", KL coefficient {recipe.kl_coef:g}, reward {recipe.reward_model or 'a function'}"
    elif method not in ("sft", "reward"):
        method += f", beta {recipe.beta:g}, {recipe.logps} of log-probs over tokens"
    reference = "none" if recipe.method in WITHOUT_REFERENCE else "fixed at the start"
    if recipe.reference == "soft":
        reference = f"soft: {recipe.alpha:g} policy + {1 - recipe.alpha:.6g} reference"
    elif recipe.reference == "hard":
        reference = "hard: copies the policy"
    if recipe.reference != "fixed":
        often = "step" if recipe.tau == 1 else f"{recipe.tau} steps"
        reference += f", every {often}: {updates} update{'s' * (updates != 1)}"
    tuning = recipe.tuning
    if tuning != "full":
        tuning += f", rank {recipe.lora_rank}, lora_alpha {recipe.lora_alpha:g}"
        if recipe.method not in WITHOUT_REFERENCE:
            tuning += f", reference rank {recipe.reference_rank}"
    return {
        "model": recipe.model,
        "data": recipe.data,
        "method": method,
        "reference": reference,
        "tuning": f"{tuning}, learning rate {recipe.learning_rate:g}, {recipe.lr_scheduler}",
        "steps": f"{steps} of {recipe.batch_size} {unit_of(recipe.method)}, {epochs:.3g} epochs",
        "seed": str(recipe.seed),
    }


@dataclass(frozen=True)
class Plan:
    """A recipe, and what it comes to with so many rows; made by `Recipe.plan`, printed by `str`."""

    recipe: Recipe
    rows: int  # of the data, those that are used
    steps: int  # optimizer steps
    updates: int  # of the reference

    @property
    def warnings(self) -> list[str]:
        """A learning rate that never gets up, and a moving reference that hardly moves: 0 or 1 updates."""
        recipe, steps, found = self.recipe, self.steps, []
        if recipe.warmup_steps >= steps:
            found.append(f"warmup_steps={recipe.warmup_steps} but the run has {steps} steps: the learning "
                         "rate never gets to its value, so little is learnt; choose warmup_steps=0")
        if recipe.reference == "fixed" or self.updates > 1:
            return found
        what = "never moves" if self.updates == 0 else "moves only after the last step"
        what += f", this is plain {recipe.method.upper()}"
        if self.updates and recipe.tau < steps:
            what = f"moves only once, at step {recipe.tau}"
        advice = f"choose tau <= {max(1, steps // 3)} for {min(3, steps)} updates"
        return [*found, f"tau={recipe.tau} but the run has {steps} steps: the reference {what}; "
                f"{advice if steps > 1 else 'train longer'}"]

    def __str__(self) -> str:
        recipe = self.recipe
        epochs = self.steps * recipe.batch_size / self.rows
        lines = in_words(recipe, self.steps, epochs, self.updates) | {"output": recipe.output}
        lines["data"] += f", {self.rows} {unit_of(recipe.method)}"
        text = [f"{key:<10}{value}" for key, value in lines.items()]
        text += [f"note      {note}" for note in recipe.notes()]
        return "\n".join(text + [f"WARNING   {warning}" for warning in self.warnings])
