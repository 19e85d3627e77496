"""A recipe: every setting of one run, checked before anything heavy is loaded.

`Recipe.load("little-tldr", alpha=0.5)` takes a shipped recipe, a YAML file, the directory of a run, a dict or
another Recipe, and overrides. What is left out or none is derived (alpha from reference, lora_alpha from
lora_rank, ...) and filled in, so that a saved recipe shows every number that was used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .plan import WITHOUT_REFERENCE, Plan, unit_of
from .recipe_file import RecipeError, dump, explain, parse_assignments, read
from .worlds import WORLDS

if TYPE_CHECKING:
    from .trust_region import TrustRegion

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

# The methods that read a setting; with another one, a value other than the default is reported as unused.
READ_BY = {"label_smoothing": ("dpo",), "simpo_gamma": ("simpo",), "desirable_weight": ("kto",),
           "undesirable_weight": ("kto",), "beta": ("dpo", "ipo", "kto", "orpo", "simpo")}


class Recipe(BaseModel):
    """Every setting of one run. Frozen: `recipe.replace(alpha=0.5)` gives another one. Raises RecipeError."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True,
                              use_attribute_docstrings=True)

    model: Text
    """start of training, initial policy: an embedded world, a name on the Hub, a folder (PEFT too)"""
    data: Text = None  # None here and below: filled in by _derived
    """an embedded world, hh, tldr, ultrafeedback, a name on the Hub, a file (default: the world in model)"""
    method: Literal["dpo", "ipo", "kto", "orpo", "simpo", "sft", "reward"] = "dpo"
    """the loss; orpo, simpo and sft have no reference; reward trains a reward model and no policy"""
    reference: Literal["fixed", "soft", "hard"] = "fixed"
    """fixed: stays at the start; soft: moves a part of the way to the policy; hard: becomes the policy"""
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """weight of the policy in an update of the reference (default: 0.6 for soft; hard is 1 by definition)"""
    tau: Count | None = None
    """optimizer steps between two updates of the reference (default: 1 for soft; hard needs a value)"""
    beta: Positive = 0.05
    """strength of the pull towards the reference; ipo aims at a margin of 1 / (2 beta)"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo: assumed share of flipped labels"""
    simpo_gamma: float = Field(0.5, ge=0)
    """simpo: margin by which the chosen completion should win"""
    desirable_weight: Positive = 1.0
    """kto: weight of desirable completions"""
    undesirable_weight: Positive = 1.0
    """kto: weight of undesirable completions"""
    logps: Literal["sum", "mean"] = None
    """log-probability of a completion over its tokens (default: sum; orpo and simpo are defined with mean)"""

    tuning: Literal["full", "lora", "qlora"] = "full"
    """which weights train: all, a LoRA adapter, or a LoRA adapter on a base model in 4 bits"""
    lora_rank: Count = 16
    """rank of the policy's adapter"""
    lora_alpha: Positive = None
    """scale of the policy's adapter, times 1 / rank (default: 2 * lora_rank)"""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """dropout on the input of the policy's adapter"""
    reference_rank: Count = None
    """rank of the reference's adapter (default: 4 * lora_rank)"""

    learning_rate: Positive = None
    """peak learning rate of AdamW (default: 1e-6 for full, 1e-5 for lora and qlora; reward: 10 times that)"""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """course of the learning rate after the warm-up; linear and cosine end at 0"""
    warmup_steps: int = Field(0, ge=0)
    """optimizer steps in which the learning rate rises from 0"""
    max_grad_norm: Positive = 2.0
    """a longer gradient is scaled down to this norm"""
    weight_decay: float = Field(0.0, ge=0)
    """weight decay of AdamW"""
    epochs: Positive = 1.0
    """passes over the data"""
    max_steps: Count | None = None
    """optimizer steps of the run, instead of epochs"""
    batch_size: Count = 64
    """pairs (kto and sft: completions) in one optimizer step, over all micro-batches and processes"""
    micro_batch_size: Count | None = None
    """how many of them go through the model at once: less memory, same result (default: all)"""
    max_prompt_tokens: Count = 512
    """longer prompts lose their beginning"""
    max_completion_tokens: Count = 512
    """longer completions lose their end; also the limit when sampling"""
    train_pairs: Count | None = None
    """train on only so many pairs (kto and sft: completions), the first of the seeded order (default: all)"""

    eval_data: Text | None = None
    """whose test split has the held-out prompts; if a world, with its gold reward (default: data)"""
    eval_steps: Count = 50
    """steps between two measurements on the policy's own samples (reward: on held-out pairs)"""
    eval_prompts: Count = 200
    """held-out prompts for these samples (reward: whose pairs are taken)"""
    save_steps: Count = 100
    """steps between two checkpoints"""
    seed: int = Field(0, ge=0, lt=2**32)
    """seed of data order, initialisation, dropout and sampling"""
    output: Text = None
    """directory of the run (default: runs/ and a name made of data, method, reference, tuning and seed)"""
    resume: bool = False
    """go on from the last checkpoint in output"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic (auto: bfloat16 on a GPU that has it); trainable weights are always stored in float32"""
    gradient_checkpointing: bool = False
    """recompute activations: less memory for more time"""
    tensorboard: bool = False
    """write TensorBoard files into the run's directory"""

    def __init__(self, **settings: Any):
        try:
            super().__init__(**{key: value for key, value in settings.items() if value is not None})
        except ValidationError as error:
            raise RecipeError(explain(error, type(self).model_fields)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("true and false are no values for this")  # pydantic would read true as 1
        text = isinstance(value, os.PathLike) or (kind is str and isinstance(value, str))
        return os.path.expanduser(value) if text else value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        """Fill in derived values and check the rules between settings; ValueError: a line for each broken."""
        derived = _derived(self.__dict__)
        self.__dict__.update({key: value for key, value in derived.items() if getattr(self, key) is None})
        method, reference, micro = self.method, self.reference, self.micro_batch_size or self.batch_size
        divisor = _largest_divisor(self.batch_size, micro)
        rules = [
            (self.data is None,
             f"data is missing: model={self.model} is not an embedded world ({', '.join(WORLDS)}), so say"
             " what to train on: hh, tldr, ultrafeedback, an embedded world, a name on the Hub or a file"),
            (reference != "fixed" and method in WITHOUT_REFERENCE,
             f"reference={reference} with method={method}: {method} has no reference; say reference=fixed"),
            (reference == "hard" and self.alpha != 1,
             f"reference=hard copies the policy, alpha={self.alpha} does not: say reference=soft"),
            (reference == "hard" and self.tau is None,
             "reference=hard needs tau, the optimizer steps between two copies: the paper's is 512, but it"
             " should fit several times into the run, for example tau=50"),
            (self.logps == "sum" and method in ("orpo", "simpo"),
             f"logps=sum with method={method}: {method} is defined with the mean over tokens; leave it out"),
            (self.logps == "mean" and method == "sft",
             "logps=mean with method=sft: its loss is the mean over all tokens of the step; leave it out"),
            (method == "kto" and self.batch_size == 1,
             "batch_size=1 with method=kto: z0 needs a completion of another prompt of the step; take 2"),
            (divisor != micro,
             f"micro_batch_size={micro} does not divide batch_size={self.batch_size}: {divisor} does"),
            (self.reference_rank < self.lora_rank,
             f"reference_rank={self.reference_rank} cannot hold an adapter of lora_rank={self.lora_rank}:"
             f" leave it out to get {4 * self.lora_rank}"),
        ]
        if any(broken for broken, _ in rules):
            raise ValueError("\n".join(line for broken, line in rules if broken))
        return self

    @classmethod
    def load(cls, source: str | os.PathLike | Mapping | Recipe, **overrides: Any) -> Recipe:
        """A recipe from a shipped name, a YAML file, a run's directory, a mapping or a Recipe; overrides win.

        A value of the source that equals its derived default is derived again, so it follows the overrides:
        lora_alpha a new lora_rank, output a new seed. Another `reference` drops the source's alpha, a
        `method` without one drops reference, alpha and tau; another `batch_size` lowers micro_batch_size to
        what divides it.
        """
        if isinstance(source, Recipe):
            settings, title = source.model_dump(), "recipe"
        else:
            settings, title = (dict(source), "recipe") if isinstance(source, Mapping) else read(source)
        if "mpo" in (settings.get("method"), overrides.get("method")):
            raise RecipeError(["method=mpo is several runs in one directory: tralign mpo RECIPE, or in "
                               "Python train_mpo"], title)
        derived = _derived(settings)
        if overrides.get("model", settings.get("model")) not in WORLDS:
            del derived["data"]  # another model on the world's data, then
        settings = {key: value for key, value in settings.items() if value != derived.get(key)}
        if overrides.get("reference") not in (None, settings.get("reference", "fixed")):
            settings.pop("alpha", None)
        if overrides.get("method") in WITHOUT_REFERENCE:
            for key in ("reference", "alpha", "tau"):
                settings.pop(key, None)
        batch, micro = overrides.get("batch_size"), settings.get("micro_batch_size")
        if isinstance(batch, int) and isinstance(micro, int) and batch > 0 < micro:
            settings["micro_batch_size"] = _largest_divisor(batch, micro)
        if "ppo" in (overrides.get("method"), settings.get("method")):
            from .ppo_recipe import class_and_settings  # here: it imports this module

            cls, settings = class_and_settings(overrides.get("method") or settings["method"], settings)
        try:
            return cls(**settings | overrides)
        except RecipeError as error:
            raise RecipeError(error.problems, title) from None

    def replace(self, **overrides: Any) -> Recipe:
        """Another recipe with some settings changed, by the rules of `load`."""
        return type(self).load(self, **overrides)

    def to_yaml(self) -> str:
        """All settings, the derived ones too; `Recipe.load` of this text's file gives an equal recipe."""
        return dump(self.model_dump())

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_yaml` to a file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @property
    def world(self) -> str | None:
        """The embedded world whose gold reward can be measured, if it is one."""
        return next((name for name in [self.eval_data or self.data] if name in WORLDS), None)

    def trust_region(self) -> TrustRegion:
        """When and how far the reference moves in this run."""
        from .trust_region import TrustRegion  # here: a bad recipe is refused before torch is imported

        if self.reference == "fixed":
            return TrustRegion.fixed()
        if self.reference == "hard":
            return TrustRegion.hard(self.tau)
        return TrustRegion.soft(self.alpha, self.tau)

    def notes(self) -> list[str]:
        """What is allowed but may not be meant: settings that the run does not use, names that mislead."""
        notes = [f"{key}={getattr(self, key):g} is not used: method={self.method} has none"
                 f" (method={', '.join(methods)} has)" for key, methods in READ_BY.items()
                 if self.method not in methods and getattr(self, key) != Recipe.model_fields[key].default]
        notes += [f"{key}={getattr(self, key):g} is not used: reference=fixed never moves"
                  for key in ("alpha", "tau") if self.reference == "fixed" and getattr(self, key) is not None]
        if self.reference == "soft" and self.alpha == 1:
            notes.append("reference=soft with alpha=1 copies the policy: it is reference=hard")
        if self.max_steps and self.epochs != 1:
            notes.append(f"epochs={self.epochs:g} is not used: max_steps={self.max_steps} decides")
        return notes

    def plan(self, n_rows: int) -> Plan:
        """What a run does with `n_rows` prepared rows (pairs; kto, sft: completions). Raises RecipeError."""
        unit, batch = unit_of(self.method), f"less than one batch of batch_size={self.batch_size}"
        rows = self.train_pairs or n_rows
        steps = self.max_steps or Fraction(str(self.epochs)) * rows // self.batch_size
        if rows > n_rows:
            raise RecipeError([f"train_pairs={rows}, but {self.data} has only {n_rows} {unit}: lower it"])
        if rows < self.batch_size:
            raise RecipeError([f"{self.data} has {rows} {unit} to train on, {batch}: lower it"])
        if steps < 1:
            raise RecipeError([f"epochs={self.epochs:g} of {rows} {unit} is {batch}: raise epochs"])
        return Plan(self, rows, steps, self.trust_region().updates(steps))


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`["alpha=0.6", "output=runs/1"]` as overrides for `Recipe.load`. Raises RecipeError."""
    return parse_assignments(arguments, Recipe.model_fields)


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def _derived(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that depend on other settings, which may be missing or wrong here: refused later."""

    def get(key: str) -> Any:
        return Recipe.model_fields[key].default if settings.get(key) is None else settings[key]

    method, reference, tuning, rank = get("method"), get("reference"), get("tuning"), get("lora_rank")
    rank = rank if isinstance(rank, (int, float)) else float("nan")
    data = settings.get("model") if settings.get("model") in WORLDS else None
    parts = [Path(str(get("data") or data)).name.split(".")[0], method]
    parts += [reference] * (method not in WITHOUT_REFERENCE) + [tuning] * (tuning != "full") + [get("seed")]
    return {
        "data": data,
        "alpha": {"soft": 0.6, "hard": 1.0}.get(str(reference)),  # 0.6: the paper's, arXiv 2404.09656
        "tau": 1 if reference == "soft" else None,  # the literal reading of the paper's soft update
        "logps": "mean" if method in ("orpo", "simpo") else "sum",
        "lora_alpha": 2.0 * rank,
        "reference_rank": 4 * rank,
        # the paper's; our choice: adapters need more, and so does a reward model's new head
        "learning_rate": float(f"1e{-6 + (tuning != 'full') + (method == 'reward')}"),
        "output": "/".join(["runs", "-".join(str(part) for part in parts)]),
    }
