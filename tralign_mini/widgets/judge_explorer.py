"""`tr.widgets.judge_explorer(runs, gold, longer)`: the win rates that a judge with known faults reports.

The judge is simulated, the pairs are real: it sees the true gap of two answers through noise, and has a
weakness for the first place and for long answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..metrics import at_equal_length, mean_interval, outcomes
from ..plot_style import COLORS, INK, PALE, new_figure, style_axes
from .panel import WIDTH, Panel, number

WAYS = {"asked once": ("soft", "^"), "in both orders": ("fixed", "o"),
        "both orders,\nat equal length": ("hard", "s")}


def judged(gold: Sequence[float], longer: Sequence[float], *, place: float, length: float, noise: float,
           seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a gets of each pair if it stands in the first place, and if it stands in the second; (pairs,).

    gold: true reward of a less that of b; longer: words of a less those of b. In points of that reward are
    place and length, what the first place and a word more are worth to the judge, and noise, the standard
    deviation of what it adds in each question.
    """
    mistakes = noise * np.random.default_rng(seed).normal(size=(2, len(gold)))
    seen = np.asarray(gold) + length * np.asarray(longer) + mistakes
    return outcomes(seen[0] + place, 0), outcomes(seen[1] - place, 0)


def win_rates(runs: Sequence[str], gold: Sequence[float], longer: Sequence[float], first: np.ndarray,
              second: np.ndarray) -> pd.DataFrame:
    """A row a run: its true win rate, and what is reported of it in each of the WAYS; contradictions tie."""
    both = np.where(first == second, first, 0.5)
    pairs = {"true": outcomes(gold, 0), "once": first, "both": both, "longer": longer}
    by_run = pd.DataFrame(pairs).groupby(np.asarray(runs))
    rates = by_run[["true", "once", "both"]].mean()
    rates["equal length"] = [at_equal_length(rows.both, rows.longer) for _, rows in by_run]
    return rates.set_axis(["true", *WAYS], axis=1)


class JudgeExplorer(Panel):
    """Reported against true win rate, a mark a run, and the mean error over the runs with its 95 % interval.

    runs, gold, longer: of each pair the run, the true gap and the difference in words; a is the run's policy.
    Controls: place, length, noise.
    """

    def __init__(self, runs: Sequence[str], gold: Sequence[float], longer: Sequence[float]):
        self._pairs = [np.asarray(column) for column in (runs, gold, longer)]
        self.place = number("for the first place", 1.5, 0, 3, 0.1, ".1f")
        self.length = number("for each word more", 0.2, 0, 0.5, 0.05, ".2f")
        self.noise = number("noise", 1.0, 0, 4, 0.25, ".2f")
        figure = new_figure(WIDTH, 4.8)
        self.axes = left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        style_axes(left, "What the judge reports", "true win rate of the run", "reported win rate", pad=30)
        left.plot([0, 1], [0, 1], color=INK, lw=1, ls="--")
        left.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        for name, (color, marker) in WAYS.items():
            left.plot([], [], marker, color=COLORS[color], label=name)
        left.legend(frameon=False, fontsize=11.5, loc="lower right")
        style_axes(right, "Mean error", "reported − true, mean over the runs", "", pad=30)
        right.axvline(0, color=INK, lw=1, ls="--")
        right.set(xlim=(-0.3, 0.65), ylim=(-0.6, 2.6))
        right.set_yticks(range(3), list(WAYS))
        right.invert_yaxis()
        controls = [self.place, self.length, self.noise]
        super().__init__([controls[:2], controls[2:]], controls, figure)

    def draw(self) -> None:
        controls = {name: getattr(self, name).value for name in ("place", "length", "noise")}
        orders = judged(*self._pairs[1:], **controls)
        rates = win_rates(*self._pairs, *orders)
        left, right = self.axes
        for row, (name, (color, marker)) in enumerate(WAYS.items()):
            look = {"color": COLORS[color], "lw": 0, "marker": marker}
            left.plot(rates["true"], rates[name], ms=5.5, alpha=0.75, **look)
            error, low, high = mean_interval(rates[name] - rates["true"])
            right.errorbar(error, row, xerr=[[error - low], [high - error]], ms=8, elinewidth=2.4, **look)
            text = f"{error:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
            look = {"color": INK, "fontsize": 11.5, "ha": "center", "backgroundcolor": "white"}
            right.text(error, row - 0.2, text, **look)
        text = f"the two orders contradict each other on {np.mean(orders[0] != orders[1]):.0%} of the pairs"
        left.text(0, 1.04, text, transform=left.transAxes, color=PALE, fontsize=12)
