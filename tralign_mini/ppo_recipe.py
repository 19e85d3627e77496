"""The recipe of a PPO run: the settings of `Recipe`, and those of PPO.

A *step* is one iteration here: `batch_size` prompts, a sampled completion each, some optimizer steps on them.
max_steps, warmup_steps, tau, eval_steps and save_steps count iterations, `epochs` counts passes over prompts.
"N+ details" below is "The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .recipe import Count, Positive, Recipe, Text


class PPORecipe(Recipe):
    """Every setting of one PPO run; `Recipe.load(..., method="ppo")` makes one."""

    method: Literal["ppo"] = "ppo"
    """proximal policy optimization"""
    reward_model: Text = None
    """what is maximised: a reward run's directory, or a folder with a sequence classifier"""
    tau: Count | None = None
    """iterations between two updates of the reference (default: 1 for soft; hard needs a value)"""
    max_steps: Count | None = None
    """iterations of the run, instead of epochs"""
    warmup_steps: int = Field(0, ge=0)
    """iterations in which the learning rate rises from 0"""
    batch_size: Count = 64
    """prompts of one iteration"""
    train_pairs: Count | None = None
    """train on only so many prompts, the first of the seeded order (default: all)"""

    kl_coef: float = Field(0.05, ge=0)
    """weight of log(policy / reference), taken from the reward; what DPO calls beta (0.05: N+ details)"""
    kl_target: Positive | None = None
    """nats a completion: kl_coef changes until the KL to the reference is there (default: it is fixed)"""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """taken from the reward of a completion that was cut off: it was not finished (1: our choice)"""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """discount a token (1: the reward comes once, at the end, and a long answer is not worth less)"""
    lam: float = Field(0.95, ge=0, le=1)
    """lambda of GAE: 0 trusts the value function, 1 only the rewards (0.95: N+ details)"""
    whiten: bool = True
    """advantages get mean 0 and variance 1 over the tokens of an iteration (true: N+ details)"""
    clip: Positive = 0.2
    """how far from 1 the probability ratio may take the policy's loss (0.2: arXiv 1707.06347)"""
    value_clip: Positive = 0.2
    """how far from its old value a value may take the value function's loss (0.2: N+ details)"""
    ppo_epochs: Count = 4
    """passes over the samples of an iteration (4: N+ details)"""
    minibatches: Count = 1
    """optimizer steps in one such pass (1: N+ details)"""
    sample_batch_size: Count | None = None
    """prompts that are sampled at once: less memory, other samples (default: all of the iteration)"""
    max_kl: Positive = 50.0
    """guard rail: the run stops at this KL to the reference, nats a completion (50: our choice)"""
    min_entropy: float = Field(0.01, ge=0)
    """guard rail: the run stops when the policy's entropy falls below, nats a token (0.01: our choice)"""

    @model_validator(mode="after")
    def _ppo_fits_together(self) -> PPORecipe:
        rules = [
            (self.batch_size % self.minibatches,
             f"minibatches={self.minibatches} does not divide batch_size={self.batch_size}: each optimizer"
             " step of an iteration sees equally many completions"),
            (self.lora_dropout,
             f"lora_dropout={self.lora_dropout:g} with method=ppo: while the weights are the same, the ratio"
             " of two passes over the same tokens has to be 1; leave it out"),
            (self.kl_target and not self.kl_coef,
             f"kl_target={self.kl_target} with kl_coef=0: a coefficient of 0, multiplied, stays 0; begin with"
             " kl_coef=0.05, for example"),
        ]
        if any(broken for broken, _ in rules):
            raise ValueError("\n".join(line for broken, line in rules if broken))
        return self


def class_and_settings(method: str, settings: Mapping[str, Any]) -> tuple[type[Recipe], dict[str, Any]]:
    """The class of recipe for a method, and `settings`; without those that only PPO has, for another one."""
    if method == "ppo":
        return PPORecipe, dict(settings)
    only = PPORecipe.model_fields.keys() - Recipe.model_fields.keys()
    return Recipe, {key: value for key, value in settings.items() if key not in only}
