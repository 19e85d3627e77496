"""`tr.widgets.reference_explorer()`: policy and reference walk through a plane, as alpha, tau and beta move.

A policy with two parameters, log-linear, so that a pair's margin is h = features . (policy - reference),
learns five pairs by DPO. Four are about the first parameter, and one of these is labelled wrongly; the fifth
is about the second. The reference moves by the package's own rule (arXiv 2404.09656). An illustration,
not a measurement.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap

from ..plot_style import COLORS, DASHES, INK, STEP, new_figure, style_axes
from ..trust_region import TrustRegion, update_reference
from .panel import WIDTH, Panel, Picture, alpha_slider, beta_slider, number, region, tau_slider

# features of the chosen minus those of the rejected completion
PAIRS = np.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [-3.0, 0.0], [0.0, 0.6]])
STEPS, RATE = 160, 0.3  # a step is RATE / beta * gradient: Adam, too, does not know the scale of a loss
SIDES = (-1.5, 31.0), (-0.3, 3.6)
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
    """Gradient descent from the origin, with the package's `is_due` and `update_reference`."""
    policy, reference = (torch.nn.Linear(2, 1, bias=False, dtype=torch.float64) for _ in "pr")
    here, there = (module.weight.detach().numpy()[0] for module in (policy, reference))  # shared memory
    here[:] = there[:] = 0
    policies, references = [here.copy()], [there.copy()]
    for step in range(1, steps + 1):
        here -= RATE / beta * gradient(here, there, beta)
        if trust_region.is_due(step):
            update_reference(reference, policy, trust_region.alpha)
        policies.append(here.copy())
        references.append(there.copy())
    policies, references = np.stack(policies), np.stack(references)
    margin = ((policies - references) @ PAIRS.T).mean(1)
    return Walk(policies, references, margin, pull(policies, references, beta))


class ReferenceExplorer(Panel):
    """Controls: alpha, tau, beta, step."""

    def __init__(self):
        self.alpha, self.tau, self.beta = alpha_slider(0.6), tau_slider(32), beta_slider(0.1)
        self.step = number("step", STEPS, 0, STEPS, 4)
        figure = new_figure(WIDTH, 4.3)
        axes = plane, margin, teaching = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        style_axes(plane, "Policy and reference", "what most pairs are about", "what one pair is about")
        style_axes(margin, "Margin h", STEP, "nats, mean over the pairs")
        style_axes(teaching, "Pull of the loss", STEP, "|gradient| / β")
        plane.grid(False)
        look = {"fontsize": 12, "fontweight": "bold"}
        note = plane.text(0.98, 0.03, "shaded: where the loss pulls", transform=plane.transAxes, ha="right")
        margin.text(0.04, 0.93, "dotted: fixed reference", transform=margin.transAxes, **look,
                    color=COLORS["fixed"])
        still = {"color": COLORS["fixed"], "ls": DASHES[2], "lw": 2, "alpha": 0.8}
        self.points = np.stack(np.meshgrid(*(np.linspace(*side, 80) for side in SIDES)), -1)
        self.shade = plane.imshow(np.zeros((80, 80)), SHADES, vmin=0, vmax=0.7, aspect="auto", origin="lower",
                                  extent=(*SIDES[0], *SIDES[1]))
        self.fixed = [ax.plot([], [], **still)[0] for ax in axes]
        [self.path] = plane.plot([], [], color=INK, lw=2.4, marker="o", ms=4, markevery=8)
        [self.moves] = plane.plot([], [], lw=2, marker="s", ms=5.5, mec="white", mew=0.6)
        [self.there] = plane.plot([], [], marker="s", ms=11, mec="white", mew=1.5)
        [self.here] = plane.plot([], [], marker="o", ms=12, color=INK, mec="white", mew=1.5)
        self.names = [plane.text(0, 0, name, color=INK, **look) for name in ("policy", "reference")]
        self.lines = [ax.plot([], [], lw=2.4)[0] for ax in (margin, teaching)]
        plane.set(xlim=SIDES[0], ylim=SIDES[1])
        margin.set(xlim=(0, STEPS), ylim=(-0.3, 8))
        teaching.set(xlim=(0, STEPS), ylim=(-0.02, 0.65))
        walkers = [self.path, self.moves, self.there, self.here, *self.names]
        self._picture = Picture(figure, [self.shade, note, *self.fixed, *walkers, *self.lines])
        controls = [self.alpha, self.tau, self.beta, self.step]
        super().__init__([controls[:2], controls[2:]], controls)

    def picture(self) -> bytes:
        trust_region, beta = region(self.alpha.value, self.tau.value), self.beta.value
        now = int(self.step.value) + 1
        way, fixed = walk(trust_region, beta), walk(TrustRegion.fixed(), beta)
        (x, y), (left, low) = way.policy[now - 1], way.reference[now - 1]
        moved = np.any(np.diff(way.reference[:now], axis=0, prepend=np.nan) != 0, axis=1)  # and the start
        self.shade.set_data(pull(self.points, way.reference[now - 1], beta))
        self.path.set_data(*way.policy[:now].T)
        self.moves.set_data(*way.reference[:now][moved].T)
        self.here.set_data([x], [y])
        self.there.set_data([left], [low])
        self.names[0].set_position((x - 1, y + 0.22))
        self.names[1].set_position((left + 1, low - 0.25))
        self.fixed[0].set_data(*fixed.policy.T)
        for line, still, name in zip(self.lines, self.fixed[1:], ("margin", "pull")):
            line.set_data(range(now), getattr(way, name)[:now])
            still.set_data(range(STEPS + 1), getattr(fixed, name))
        for artist in (*self.lines, self.names[1], self.moves, self.there):
            artist.set_color(COLORS[trust_region.kind])
        return self._picture.png()


def reference_explorer() -> ReferenceExplorer:
    """Policy and reference in a plane of two parameters, step by step, as alpha, tau and beta move.

    Shaded is where the loss still pulls; the dotted line is the policy's way with a fixed reference.
    """
    return ReferenceExplorer()
