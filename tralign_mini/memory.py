"""Will it fit? The peak memory of a run, predicted before anything big is loaded, and what makes it smaller.

The bytes come from a rehearsal without numbers (`rehearsal.py`). On a CPU they are within 15 % of the
peaks that were measured (benchmarks/README.md); on a GPU none was measured.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .models import this_process
from .recipe import Recipe
from .rehearsal import SAMPLED_AT_ONCE, Rehearsal

CGROUP = Path("/sys/fs/cgroup")  # of a container on Linux


@dataclass(frozen=True)
class Prediction:
    """What a run needs: {part: bytes} for each of its moments; free: what its device has for it now."""

    moments: dict[str, dict[str, float]]
    free: float

    @property
    def moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        return self.moments[self.moment]

    @property
    def total(self) -> float:
        """Bytes at that moment: the peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.free


def predict(recipe: Recipe, rows: list[dict] | None = None) -> Prediction:
    """Peak memory of a run in one process, on the device that it would use.

    rows: as `prepare` makes them; by default all are as long as the recipe allows, which real ones seldom
    are. On a CPU the bytes are resident memory beyond that of the imported libraries. ValueError for
    method=ppo, and if the model has no config here, or code that needs numbers.
    """
    if recipe.method == "ppo":
        raise ValueError("the memory of method=ppo is not predicted. Try a short run: max_steps=3.")
    device = this_process().device
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of PEFT's calls
        rehearsal = Rehearsal(recipe, on_cpu=device.type == "cpu")
    largest = rehearsal.largest_batch(rows)
    try:
        rehearsal.run(largest)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = rehearsal.config.model_type
        raise ValueError(f"the memory of a {kind} model cannot be predicted: its code fails on tensors "
                         f"without numbers ({reason}). Try a short run: max_steps=3.") from error
    return Prediction(rehearsal.moments, free_memory(device))


def smaller(recipe: Recipe, prediction: Prediction) -> Iterator[tuple[dict, Prediction]]:
    """(changes to a recipe that does not fit, what it needs with them); each adds to those before, until the
    run fits. What hardly helps is left out."""
    tunings = ("full", "lora", "qlora")
    ways = [("micro_batch_size", _micro_batch_size(recipe)), ("gradient_checkpointing", True),
            ("eval_prompts", min(recipe.eval_prompts, SAMPLED_AT_ONCE // 8)),
            ("max_prompt_tokens", -(-recipe.max_prompt_tokens // 2)),
            *(("tuning", tuning) for tuning in tunings[tunings.index(recipe.tuning) + 1 :])]
    changes: dict = {}
    for key, value in ways:
        trial = predict(recipe.replace(**changes | {key: value}))
        if trial.total < 0.98 * prediction.total:
            changes, prediction = changes | {key: value}, trial
            yield changes, prediction
        if prediction.fits:
            return


def _micro_batch_size(recipe: Recipe) -> int:
    """The largest that fits, else 1."""
    now = recipe.micro_batch_size or recipe.batch_size
    sizes = [size for size in range(1, now + 1) if recipe.batch_size % size == 0]

    def too_large(size: int) -> bool:
        return not predict(recipe.replace(micro_batch_size=size)).fits

    return sizes[max(0, bisect_left(sizes, True, key=too_large) - 1)]


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take: of the GPU, or of the machine and the container around it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(statistics["inactive_file"]))  # cached files give way
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free
