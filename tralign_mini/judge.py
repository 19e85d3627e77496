"""Who wins? `judge(prompts, a, b)` compares two answers to each prompt and gives a list of verdicts.

`GoldJudge` knows the truth of an embedded world, `RewardJudge` asks a reward model, and `llm_judge.LLMJudge`
a language model. A verdict without a winner is a failure of the judge, never a tie: count it apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .metrics import outcomes
from .worlds import gold_reward, world

POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of the answer a
WINNERS = {points: winner for winner, points in POINTS.items()}


class Verdict(NamedTuple):
    """One comparison; `winner` is "a", "b" or "tie", or None if the judge failed, and `why` says how."""

    winner: str | None
    why: str
    scores: tuple[float, float] | None = None  # of a and b, if the judge gives scores
    orders: tuple[str, ...] = ()  # who won with a first, and with b first, if the judge was asked in both


class RewardJudge:
    """A reward model: anything with `score(prompts, completions)`, a number for each."""

    def __init__(self, reward_model, name: str = "reward model"):
        self.score, self.name = reward_model.score, name

    def __call__(self, prompts: Sequence, a: Sequence[str], b: Sequence[str]) -> list[Verdict]:
        check_sides(prompts, a, b)
        scores = [np.asarray(self.score(prompts, texts), dtype=float) for texts in (a, b)]
        for side in scores:
            if side.shape != (len(prompts),) or not np.isfinite(side).all():
                raise ValueError(f"The {self.name} scored {len(prompts)} answers with an array of shape "
                                 f"{side.shape}, of which {np.isfinite(side).sum()} are finite. A judge "
                                 "needs one finite number for each answer.")
        equal = [one == other for one, other in zip(a, b)]  # whose scores may be rounded apart
        rows = zip(np.where(equal, 0.5, outcomes(*scores)).tolist(), *(side.tolist() for side in scores))
        return [Verdict(WINNERS[won], f"{x:.2f} against {y:.2f}", (x, y)) for won, x, y in rows]


class GoldJudge(RewardJudge):
    """The true quality, in an embedded world."""

    def __init__(self, name: str):
        world(name)  # ValueError if there is none
        self.score, self.name = partial(gold_reward, name), "gold reward"


def check_sides(prompts: Sequence, a: Sequence[str], b: Sequence[str]) -> None:
    if not len(prompts) == len(a) == len(b):
        raise ValueError("A judge compares two answers to each prompt, but there are "
                         f"{len(prompts)} prompts, {len(a)} answers of a and {len(b)} of b.")


def points(verdicts: Sequence[Verdict]) -> np.ndarray:
    """What a gets for each verdict: 1, 0.5 for a tie, 0; NaN where the judge failed."""
    return np.array([POINTS.get(verdict.winner, np.nan) for verdict in verdicts])


def make_judge(name: str, *, data: str, **llm):
    """The judge that a command names: "gold", "reward:FOLDER", or "llm" with the settings of `LLMJudge`."""
    kind, _, path = name.partition(":")
    if name == "gold":
        return GoldJudge(data)
    if name == "llm":
        from .llm_judge import LLMJudge

        if not llm.get("model"):
            raise ValueError("The judge llm needs the name of a model at its endpoint: --model NAME.")
        return LLMJudge(**llm)
    if kind == "reward" and path:
        from .reward import RewardModel

        return RewardJudge(RewardModel.load(path), f"reward model {Path(path).name}")
    raise ValueError(f"There is no judge {name!r}. There are gold (in an embedded world), reward:FOLDER (a "
                     "run of method=reward) and llm.")
