"""The sides that are compared in a mode, what has to be the same about them, and their lines of the table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from .measure import Result
from .workload import Workload

WARMUP, TAU = 2, 2  # steps not timed: memory still grows in them; steps between two updates
MODES = {
    "full": "all weights, float32",
    "bf16": "all weights, bfloat16 autocast",
    "lora": "a LoRA adapter, float32",
    "qlora": "a LoRA adapter on an NF4 base, float32",
}


@dataclass(frozen=True)
class Side:
    """A line of the table: what is special about its jobs, and what came out of them."""

    label: str
    job: dict
    once: bool = False  # measured in the first repeat only
    same_method_as: str = "ours"  # the line whose losses these should be
    results: list[Result] = field(default_factory=list)


def sides(mode: str) -> list[Side]:
    """The sides of a mode; the first is ours with a moving reference, to which the others are compared."""
    if mode == "full":
        return [Side("ours", {"side": "ours", "tau": TAU}), Side("TRL", {"side": "trl", "tau": TAU}),
                Side("TRL, its defaults", {"side": "trl-default", "tau": TAU}, once=True)]
    if mode == "bf16":
        moving = {"dtype": "bfloat16", "tau": TAU}
        return [Side("ours", {"side": "ours"} | moving, once=True),
                Side("TRL", {"side": "trl"} | moving, once=True)]
    ours, fixed = {"side": "ours", "tuning": mode}, "ours, fixed reference"
    return [Side("ours", ours | {"tau": TAU}), Side(fixed, ours, same_method_as=""),
            Side("TRL, fixed reference", ours | {"side": "trl"}, once=True, same_method_as=fixed)]


def check(ours: Result, other: Result, where: str, tolerance: float = 0.02) -> None:
    """RuntimeError if two sides did not see the same pairs, or their references did not move alike."""
    if any(abs(a - b) > tolerance * abs(a) for a, b in zip(ours.logps, other.logps)):
        raise RuntimeError(f"{where}: the mean log-probs of the first step are {other.logps} and not "
                           f"{ours.logps} as ours: the two sides were not given the same pairs or weights.")
    if ours.moved is not None and other.moved is not None:
        if not ours.moved or abs(ours.moved - other.moved) > tolerance * ours.moved:
            raise RuntimeError(f"{where}: its reference moved by {other.moved}, ours by {ours.moved}.")


SPEED = ["pairs", "mode", "side", "pairs/s", "tokens/s", "peak MB", "loss difference", "ours is faster",
         "memory of ours"]


def speed_lines(work: Workload, mode: str, rows: list[Side]) -> list[list[str]]:
    """A line for each side. Tokens: of both sequences of a pair, so the prompt twice, without padding."""
    tokens = statistics.mean(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
                             for row in work.rows)
    ours, lines = rows[0].results, []
    for side in rows:
        pairs = work.pairs / statistics.median(result.seconds for result in side.results)
        peak = statistics.median(result.peak for result in side.results) / 2**20
        cells = [work.name, mode, side.label, f"{pairs:.3g}", f"{pairs * tokens:.0f}", f"{peak:.0f}"]
        same = next((row for row in rows if row.label == side.same_method_as and row is not side), None)
        cells.append(f"{loss_difference(same.results[0], side.results[0]):.0e}" if same else "")
        both = list(zip(ours, side.results))
        faster = spread([other.seconds / mine.seconds for mine, other in both])
        smaller = spread([mine.peak / other.peak for mine, other in both])
        lines.append([*cells, "", ""] if side is rows[0] else [*cells, faster, smaller])
    return lines


def loss_difference(one: Result, other: Result) -> float:
    """The largest difference between the losses of a step."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def spread(ratios: list[float]) -> str:
    """The median, and the range if there are several."""
    text = f"{statistics.median(ratios):.2f}x"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}-{max(ratios):.2f})"
