"""`tr.widgets.loss_explorer()`: loss, gradient and curvature over the margin, and what an update gives back.

A moving reference changes one number of the loss: the margin h of policy and reference (arXiv 2404.09656).
"""

from __future__ import annotations

import numpy as np
import torch

from ..plot_style import COLORS, INK, new_axes, style_axes
from ..toy import METHODS, along_margin
from ..toy_plots import draw_jump
from .panel import WIDTH, Panel, alpha_slider, beta_slider, choice, number, region

REACH = (-15.0, 45.0)  # of the margin
TITLES = ("Loss L(h)", "Gradient dL/dh", "Curvature d²L/dh²")
# For each loss and axes: the power of beta in whose units every beta has the same heights, limits, ticks
UNITS = {
    "dpo": [(0, (-0.1, 3.2), {0: "0", np.log(2): "log 2", 2: "2", 3: "3"}),
            (1, (-1.08, 0.08), {-1: "−β", -0.5: "−β/2", 0: "0"}),
            (2, (-0.01, 0.27), {0: "0", 0.125: "β²/8", 0.25: "β²/4"})],
    "ipo": [(-2, (-0.2, 4.2), {0: "0", 0.25: "1/4β²", 1: "1/β²", 2: "2/β²", 4: "4/β²"}),
            (-1, (-4.3, 4.3), {-4: "−4/β", -1: "−1/β", 0: "0", 4: "4/β"}),
            (0, (-0.1, 2.6), {0: "0", 1: "1", 2: "2"})],
    "kto": [(0, (-0.05, 1.05), {0: "0", 0.5: "½", 1: "1"}),
            (1, (-0.135, 0.01), {-0.125: "−β/8", 0: "0"}),
            (2, (-0.028, 0.028), {-0.02: "−β²/50", 0: "0", 0.02: "β²/50"})],
}


def jump(margin: float, alpha: float) -> list[float]:
    """The margin before and after an update: if log-probs are linear in the parameters, 1 - alpha is left."""
    return [margin, (1 - alpha) * margin]


class LossExplorer(Panel):
    """DPO, IPO and KTO over the margin, as beta moves; an update of the reference is drawn as a jump.

    alpha = 1 is a hard update: it jumps back to h = 0 and restores the gradient that is there. Controls:
    margin, alpha, beta, loss.
    """

    def __init__(self):
        self.margin, self.alpha = number("h: margin before", 30, -10, 40, 1), alpha_slider(1.0)
        self.beta, self.loss = beta_slider(0.1), choice({method.upper(): method for method in METHODS}, "dpo")
        figure, self.axes = new_axes(3, WIDTH / 3, 3.5)
        for ax, title in zip(self.axes, TITLES):
            style_axes(ax, title, "margin h (nats)", "", pad=30)
            ax.set_xlim(*REACH)
            ax.axvline(0, color="#BBBBBB", lw=1, zorder=1)
            ax.axhline(0, color="#BBBBBB", lw=1, zorder=1)
        controls = [self.margin, self.alpha, self.beta, self.loss]
        super().__init__([controls[:2], controls[2:]], controls, figure)

    def draw(self) -> None:
        method, beta, alpha = self.loss.value, self.beta.value, self.alpha.value
        color, ends = COLORS[region(alpha, 1).kind], jump(self.margin.value, alpha)
        h, margins = torch.linspace(*REACH, 400), torch.tensor(ends, dtype=torch.float64)
        shapes, jumps = along_margin(method, h, beta), along_margin(method, margins, beta)
        for ax, shape, values, (power, limits, ticks) in zip(self.axes, shapes, jumps, UNITS[method]):
            ax.set_ylim(*limits)
            ax.set_yticks(list(ticks), list(ticks.values()))
            ax.plot(h, shape / beta**power, color=INK, lw=2.4)
            draw_jump(ax, *zip(ends, (values / beta**power).clip(*limits).tolist()), color)
            look = {"color": color, "fontsize": 13, "fontweight": "bold", "transform": ax.transAxes}
            ax.text(0, 1.04, "{:.3g} → {:.3g}".format(*values).replace("-", "−"), **look)
