"""Who wins? `judge(prompts, a, b)` compares two answers to each prompt and gives a list of verdicts.

`GoldJudge` knows the truth of an embedded world, `RewardJudge` asks a reward model, and `llm_judge.LLMJudge`
a language model. A verdict without a winner is a failure of the judge, never a tie: count it apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .metrics import TIE
from .worlds import gold_reward, world

POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of the answer a


class Verdict(NamedTuple):
    """One comparison; `winner` is "a", "b" or "tie", or None if the judge failed, and `why` says how."""

    winner: str | None
    why: str
    scores: tuple[float, float] | None = None  # of a and b, if the judge gives scores
    orders: tuple[str, ...] = ()  # who won with a first, and with b first, if the judge was asked in both


class GoldJudge:
    """The true quality, in an embedded world."""

    def __init__(self, name: str):
        world(name)  # ValueError if there is none
        self.world, self.name = name, "gold reward"

    def __call__(self, prompts: Sequence, a: Sequence[str], b: Sequence[str]) -> list[Verdict]:
        check_sides(prompts, a, b)
        return _by_score(a, b, gold_reward(self.world, prompts, a), gold_reward(self.world, prompts, b))


class RewardJudge:
    """A reward model: anything with `score(prompts, completions)`, a number for each."""

    def __init__(self, reward_model, name: str = "reward model"):
        self.reward_model, self.name = reward_model, name

    def __call__(self, prompts: Sequence, a: Sequence[str], b: Sequence[str]) -> list[Verdict]:
        check_sides(prompts, a, b)
        sides = [np.asarray(self.reward_model.score(prompts, texts), dtype=float) for texts in (a, b)]
        for scores in sides:
            if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
                finite = np.isfinite(scores).sum()
                raise ValueError(f"The {self.name} scored {len(prompts)} answers with an array of shape "
                                 f"{scores.shape}, of which {finite} are finite. A judge needs one finite "
                                 "number for each answer.")
        return _by_score(a, b, *(scores.tolist() for scores in sides))


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
        if not llm.get("model"):
            raise ValueError("The judge llm needs the name of a model at its endpoint: --model NAME.")
        from .llm_judge import LLMJudge

        return LLMJudge(**llm)
    if kind == "reward" and path:
        from .reward import RewardModel

        return RewardJudge(RewardModel.load(path), f"reward model {Path(path).name}")
    raise ValueError(f"There is no judge {name!r}. There are gold (in an embedded world), reward:FOLDER (a "
                     "run of method=reward) and llm.")


def _by_score(a, b, of_a: Sequence[float], of_b: Sequence[float]) -> list[Verdict]:
    verdicts = []
    for one, other, x, y in zip(a, b, of_a, of_b):
        tie = one == other or abs(x - y) <= TIE  # equal texts in other batches may differ by rounding
        verdicts.append(Verdict("tie" if tie else "a" if x > y else "b", f"{x:.2f} against {y:.2f}", (x, y)))
    return verdicts
