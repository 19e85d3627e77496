"""`tr.widgets.split_explorer(gaps, gold)`: which pairs a reward model calls easy, and which labels are wrong.

The first step of MPO (arXiv 2403.19443), on pairs whose true quality is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..mpo import WRONG_SIGN, draw_gaps, split_gaps, stage_1_labels
from ..plot_style import COLORS, INK, new_figure, style_axes
from .panel import WIDTH, Panel, choice, number


def wrong_share(gaps: Sequence[float], gold: Sequence[float], easy_fraction: float, wrong_sign: str) -> dict:
    """Share of labels that contradict the truth, name -> (share, pairs); pairs of equal quality do not count.

    gaps: r(chosen) - r(rejected); gold: the same by the true reward; both (pairs,).
    """
    gaps, gold = np.asarray(gaps), np.asarray(gold)
    easy = split_gaps(gaps, easy_fraction=easy_fraction).easy
    labels = stage_1_labels(gaps, easy, wrong_sign)
    wrong, known = np.where(labels == "flipped", gold > 0, gold < 0), gold != 0
    parts = {"all pairs": gold == gold, "hard": ~easy, "easy": easy,
             "stage 1": np.isin(labels, ("kept", "flipped"))}
    truths = dict.fromkeys(parts, gold < 0) | {"stage 1": wrong}
    return {name: (float(truths[name][part & known].mean()), int(part.sum())) for name, part in parts.items()}


class SplitExplorer(Panel):
    """The gaps with the threshold, and the share of wrong labels on both sides of it.

    gaps, gold: r(chosen) - r(rejected) of each training pair by the reward model, and by the true reward.
    Controls: easy, the share of easy pairs; sign, what becomes of an easy pair whose gap is negative.
    """

    def __init__(self, gaps: Sequence[float], gold: Sequence[float]):
        self._pairs = np.asarray(gaps, dtype=float), np.asarray(gold, dtype=float)
        self.easy = number("easy: share of the pairs", 0.5, 0.05, 0.95, 0.01, ".0%")
        self.sign = choice({f"wrong sign: {what}": what for what in WRONG_SIGN}, "keep")
        figure = new_figure(WIDTH, 4.2)
        self.axes = figure.subplots(1, 2, width_ratios=(1.6, 1))
        style_axes(self.axes[0], "Reward gaps", "r(chosen) − r(rejected)", "pairs")
        style_axes(self.axes[1], "Labels that contradict the truth", "", "% of the pairs")
        self.axes[1].set_ylim(0, 50)
        self.axes[1].axhline(50, color=INK, lw=1, ls="--")
        super().__init__([[self.easy, self.sign]], [self.easy, self.sign], figure)

    def draw(self) -> None:
        gaps, gold = self._pairs
        left, right = self.axes
        draw_gaps(left, gaps, split_gaps(gaps, easy_fraction=self.easy.value).gamma)
        shares = wrong_share(gaps, gold, self.easy.value, self.sign.value)
        colors = [INK, COLORS["initial"], COLORS["fixed"], COLORS["hard"]]
        heights = [100 * share for share, _ in shares.values()]
        bars = right.bar(list(shares), heights, color=colors, width=0.7)
        texts = [f"{share:.0%} of\n{n:,}" for share, n in shares.values()]
        right.bar_label(bars, texts, fontsize=11, color=INK)
