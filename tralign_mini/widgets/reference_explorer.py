"""`tr.widgets.reference_explorer()`: policy and reference walk through a plane, as alpha, tau and beta move.

A policy with two parameters, log-linear, so that a pair's margin is h = features . (policy - reference),
learns five pairs by DPO. Four are about the first parameter, and one of these is labelled wrongly; the fifth
is about the second. The reference moves as in arXiv 2404.09656. An illustration, not a measurement.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from ..plot_style import COLORS, DASHES, INK, STEP, new_figure, style_axes
from ..trust_region import TrustRegion
from .panel import WIDTH, Panel, alpha_slider, beta_slider, region, tau_slider

# features of the chosen minus those of the rejected completion
PAIRS = np.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [-3.0, 0.0], [0.0, 0.6]])
STEPS, RATE = 160, 0.3  # a step is RATE / beta * gradient: Adam, too, does not know the scale of a loss
SIDES = (-1.5, 31.0), (-0.3, 3.6)
POINTS = np.stack(np.meshgrid(*(np.linspace(*side, 80) for side in SIDES)), -1)
SHADES = LinearSegmentedColormap.from_list("pull", ["#FFFFFF", "#C9D3DC"])


class Walk(NamedTuple):
    """Row t is the state after t steps and the update that was due then."""

    policy: np.ndarray  # (steps + 1, 2)
    reference: np.ndarray  # (steps + 1, 2)
    margin: np.ndarray  # (steps + 1,), mean over the pairs
    pull: np.ndarray  # (steps + 1,), length of the gradient over beta


def gradient(policy: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    """dL/dpolicy of the mean DPO loss, (..., 2)."""
    h = (policy - reference) @ PAIRS.T
    return -beta / (1 + np.exp(beta * h)) @ PAIRS / len(PAIRS)


def pull(policy: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    return np.linalg.norm(gradient(policy, reference, beta), axis=-1) / beta


def walk(trust_region: TrustRegion, beta: float, steps: int = STEPS) -> Walk:
    """Gradient descent from the origin; after each step the update of the reference that is due."""
    policy, reference = np.zeros((2, steps + 1, 2))
    for t in range(1, steps + 1):
        policy[t] = policy[t - 1] - RATE / beta * gradient(policy[t - 1], reference[t - 1], beta)
        alpha = trust_region.alpha if trust_region.is_due(t) else 0.0
        reference[t] = alpha * policy[t] + (1 - alpha) * reference[t - 1]
    margin = ((policy - reference) @ PAIRS.T).mean(1)
    return Walk(policy, reference, margin, pull(policy, reference, beta))


class ReferenceExplorer(Panel):
    """Policy and reference in a plane of two parameters, step by step, as alpha, tau and beta move.

    Shaded is where the loss still pulls; the dotted line is the policy's way with a fixed reference.
    Controls: alpha, tau, beta.
    """

    def __init__(self):
        self.alpha, self.tau, self.beta = alpha_slider(0.6), tau_slider(32), beta_slider(0.1)
        figure = new_figure(WIDTH, 4.3)
        self.axes = plane, margin, teaching = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        style_axes(plane, "Policy and reference", "what most pairs are about", "what one pair is about")
        style_axes(margin, "Margin h", STEP, "nats, mean over the pairs")
        style_axes(teaching, "Pull of the loss", STEP, "|gradient| / β")
        plane.grid(False)
        plane.set(xlim=SIDES[0], ylim=SIDES[1])
        margin.set(xlim=(0, STEPS), ylim=(-0.3, 8))
        teaching.set(xlim=(0, STEPS), ylim=(-0.02, 0.65))
        margin.text(0.04, 0.93, "dotted: fixed reference", transform=margin.transAxes, color=COLORS["fixed"],
                    fontsize=12, fontweight="bold")
        controls = [self.alpha, self.tau, self.beta]
        super().__init__([controls[:2], controls[2:]], controls, figure)

    def draw(self) -> None:
        trust_region, beta = region(self.alpha.value, self.tau.value), self.beta.value
        way, fixed = walk(trust_region, beta), walk(TrustRegion.fixed(), beta)
        policy, reference, color = way.policy, way.reference, COLORS[trust_region.kind]
        moved = np.any(np.diff(reference, axis=0, prepend=np.nan) != 0, axis=1)  # and the start
        plane, *others = self.axes
        plane.imshow(pull(POINTS, reference[-1], beta), SHADES, vmin=0, vmax=0.7, aspect="auto",
                     origin="lower", extent=(*SIDES[0], *SIDES[1]))
        plane.text(0.98, 0.03, "shaded: where the loss pulls", transform=plane.transAxes, ha="right")
        still = {"color": COLORS["fixed"], "ls": DASHES[2], "lw": 2, "alpha": 0.8}
        plane.plot(*fixed.policy.T, **still)
        plane.plot(*policy.T, color=INK, lw=2.4, marker="o", ms=4, markevery=8)
        plane.plot(*reference[moved].T, color=color, lw=2, marker="s", ms=5.5, mec="white", mew=0.6)
        plane.plot(*reference[-1], color=color, marker="s", ms=11, mec="white", mew=1.5)
        plane.plot(*policy[-1], color=INK, marker="o", ms=12, mec="white", mew=1.5)
        look = {"fontsize": 12, "fontweight": "bold"}
        plane.text(*policy[-1] + (-1, 0.22), "policy", color=INK, **look)
        plane.text(*reference[-1] + (1, -0.25), "reference", color=color, **look)
        for ax, name in zip(others, ("margin", "pull")):
            ax.plot(getattr(fixed, name), **still)
            ax.plot(getattr(way, name), color=color, lw=2.4)
