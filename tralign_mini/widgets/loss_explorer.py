"""`tr.widgets.loss_explorer()`: loss, gradient and curvature over the margin, and what an update gives back.

A moving reference changes one number of the loss: the margin h of policy and reference (arXiv 2404.09656).
"""

from __future__ import annotations

import numpy as np
import torch

from ..plot_style import COLORS, INK, new_figure, style_axes
from ..toy import METHODS, along_margin
from ..toy_plots import draw_jump
from .panel import WIDTH, Panel, alpha_slider, beta_slider, choice, heading, number, region

REACH = (-15.0, 45.0)  # of the margin
TITLES = {"loss": "Loss L(h)", "gradient": "Gradient dL/dh", "curvature": "Curvature d²L/dh²"}
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


def curves(method: str, beta: float, margin) -> dict[str, np.ndarray]:
    """loss, gradient and curvature at each margin, by `toy.along_margin`."""
    found = along_margin(method, *(torch.as_tensor(x, dtype=torch.float64) for x in (margin, beta)))
    return {name: values.numpy() for name, values in found._asdict().items()}


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
        figure = new_figure(WIDTH, 3.9)
        self.axes = figure.subplots(1, 3)
        for ax, title in zip(self.axes, TITLES.values()):
            style_axes(ax, "", "margin h (nats)", "")
            heading(ax, title)
            ax.set_xlim(*REACH)
            ax.axvline(0, color="#BBBBBB", lw=1, zorder=1)
            ax.axhline(0, color="#BBBBBB", lw=1, zorder=1)
        controls = [self.margin, self.alpha, self.beta, self.loss]
        super().__init__([controls[:2], controls[2:]], controls, figure)

    def draw(self) -> None:
        method, beta, alpha = self.loss.value, self.beta.value, self.alpha.value
        h, ends = np.linspace(*REACH, 400), jump(self.margin.value, alpha)
        heights, values = curves(method, beta, h), curves(method, beta, ends)
        color = COLORS[region(alpha, 1).kind]
        for ax, name, (power, limits, ticks) in zip(self.axes, TITLES, UNITS[method]):
            ax.set_ylim(*limits)
            ax.set_yticks(list(ticks), list(ticks.values()))
            ax.plot(h, heights[name] / beta ** power, color=INK, lw=2.4)
            draw_jump(ax, *zip(ends, np.clip(values[name] / beta ** power, *limits)), color)
            text = "{:.3g} → {:.3g}".format(*values[name]).replace("-", "−")
            look = {"color": color, "fontsize": 13, "fontweight": "bold"}
            ax.text(0, 1.04, text, transform=ax.transAxes, **look)
