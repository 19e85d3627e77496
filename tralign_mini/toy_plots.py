"""Figures of the toy: where the mass goes, the path of a bandit, the loss over its margin, alpha against tau.

Each function returns a `matplotlib.figure.Figure` and never touches pyplot, as in `plots.py`. Blue is always
a fixed reference, orange a soft and green a hard one. Lines are means over seeds, bands 95 % intervals.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from scipy import stats

from .plot_style import COLORS, DASHES, FAINT, INK, STEP, label_ends, new_axes, small_print, style_axes
from .toy import ToyRuns, along_margin, summary

# Okabe and Ito's vermillion for what nobody asked for; black and grey for what the data shows
MASSES = {"chosen": ("chosen", INK, "-"), "rejected": ("rejected", "#8C8C8C", DASHES[1]),
          "out": ("out of distribution", "#D55E00", "-")}
QUANTITIES = {  # title, label of the y axis
    "chosen": ("Mass on the chosen completions", "probability"),
    "rejected": ("Mass on the rejected completions", "probability"),
    "out": ("Mass out of distribution", "probability"),
    "margin": ("Margin to the reference", "h (nats)"),
    "loss": ("Loss", "mean over the pairs"),
    "gradient": ("Gradient of the loss", "dL/dh"),
    "curvature": ("Curvature of the loss", "d²L/dh²"),
    "kl": ("KL to the initial policy", "nats"),
}
ARMS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])  # corners: chosen, rejected, unseen


def mass(runs: ToyRuns) -> Figure:
    """Chosen, rejected and out-of-distribution mass over the steps; one panel a reference of the grid."""
    groups = _references(runs)
    figure, axes = new_axes(len(groups), 4.6, 3.8, sharey=True)
    for ax, (name, kind, rows) in zip(axes, groups):
        style_axes(ax, name, STEP, "probability" if ax is axes[0] else "", COLORS[kind])
        ends = [(draw_band(ax, getattr(runs, quantity)[rows].numpy(), color, dash), label, color)
                for quantity, (label, color, dash) in MASSES.items()]
        ax.set_ylim(-0.02, 1.02)
    label_ends(axes[-1], ends)
    return figure


def curves(runs: ToyRuns, *quantities: str) -> Figure:
    """One panel for each quantity, a field of `ToyRuns`; one line for each reference of the grid."""
    groups = _references(runs)
    figure, axes = new_axes(len(quantities), 5.6, 3.8)
    for ax, quantity in zip(axes, quantities):
        style_axes(ax, QUANTITIES[quantity][0], STEP, QUANTITIES[quantity][1])
        values = getattr(runs, quantity).numpy()
        label_ends(ax, [(draw_band(ax, values[rows], COLORS[kind]), kind, COLORS[kind])
                        for _, kind, rows in groups])
    return figure


def simplex(runs: ToyRuns) -> Figure:
    """The bandit's policy on its way through the triangle of three probabilities: a panel for each reference.

    A line is a seed; dots are 30 steps apart, the open circle is the start, the large dot the end.
    """
    if runs.policy.shape[2] != 3:
        raise ValueError(f"The policy has {runs.policy.shape[2]} completions, and a triangle shows three. "
                         "Draw a Bandit here, and a Tree with toy_plots.mass.")
    groups = _references(runs)
    figure, axes = new_axes(len(groups), 4.2, 3.8)
    for ax, (name, kind, rows) in zip(axes, groups):
        style_axes(ax, name, "", "", COLORS[kind], pad=26)
        _triangle(ax)
        for path in runs.policy[rows].double().exp().numpy() @ ARMS:
            ax.plot(*path.T, color=COLORS[kind], lw=1.6, alpha=0.6, zorder=2)
            ax.plot(*path[30:-1:30].T, ls="", marker="o", ms=3.5, color=COLORS[kind], alpha=0.7, zorder=3)
            ax.plot(*path[0], marker="o", ms=7, mfc="white", mec=INK, mew=1.3, zorder=4)
            ax.plot(*path[-1], marker="o", ms=9, mfc=COLORS[kind], mec="white", mew=1.2, zorder=5)
    return figure


def loss_shape(method: str, beta: float, margin: float | None = None) -> Figure:
    """Loss, gradient and curvature over the margin h; with `margin`, the jump of a hard update from there."""
    figure, axes = new_axes(3, 5, 3.8)
    reach = max((2 if method == "ipo" else 8) / beta, 1.25 * abs(margin or 0))
    h = torch.linspace(-reach / 2, reach, 400, dtype=torch.float64)
    ends = torch.tensor([margin or 0, (margin or 0) / 2, 0], dtype=torch.float64)
    shapes = zip(along_margin(method, h, beta), along_margin(method, ends, beta))
    titles = {"Loss": "L(h)", "Gradient": "dL/dh", "Curvature": "d²L/dh²"}
    for ax, (title, ylabel), (values, jump) in zip(axes, titles.items(), shapes):
        style_axes(ax, title, "margin h (nats)", ylabel)
        ax.axvline(0, color="#BBBBBB", lw=1, zorder=1)
        ax.plot(h, values, color=INK, lw=2.4, zorder=2)
        before, halfway, after = jump.tolist()
        if np.ptp(values.numpy()) == 0:
            ax.set_ylim(0, 2 * after)
        if margin is not None:  # the arrow keeps off the curve
            bend = 0.3 if halfway <= (before + after) / 2 else -0.3
            draw_jump(ax, (margin, before), (0, after), COLORS["hard"], bend)
    jumps = " · green: a hard update, h → 0" * (margin is not None)
    small_print(figure, f"{method.upper()}, β = {beta:g}{jumps}")
    return figure


def heat_map(runs: ToyRuns, quantity: str = "out") -> Figure:
    """The last value of a quantity over alpha and tau, as colour against the fixed reference's.

    The grid needs a fixed reference, one beta, and every alpha with every tau. Bold: the 95 % interval of the
    difference over seeds leaves out 0.
    """
    _references(runs)
    table = summary(runs, quantity)
    fixed, moving = table[table["reference"] == "fixed"], table[table["reference"] != "fixed"]
    if fixed.empty or moving.empty:
        kinds = ", ".join(table["reference"].unique())
        raise ValueError(f"The references of the grid are {kinds}, and a heat map compares alpha and tau "
                         "with a fixed one. Put TrustRegion.fixed() and others into the grid.")
    moving = moving.assign(bold=(moving["difference_low"] > 0) | (moving["difference_high"] < 0))
    baseline, table = fixed["value"].item(), moving.pivot(index="alpha", columns="tau")
    cells, bold = table["value"], table["bold"].to_numpy()
    figure, [ax] = new_axes(1, 1.15 * cells.shape[1] + 3.4, 0.72 * cells.shape[0] + 2)
    style_axes(ax, QUANTITIES[quantity][0], "τ: steps from update to update", "α: weight of the policy")
    ax.grid(False)
    norm = CenteredNorm(baseline, max(np.nanmax(np.abs(cells - baseline)), 0.02))
    image = ax.pcolormesh(cells, norm=norm, cmap="RdBu_r", edgecolors="white", linewidth=3)
    for (row, column), value in np.ndenumerate(cells.to_numpy()):
        if np.isfinite(value):
            dark = np.dot(image.cmap(norm(value))[:3], (0.3, 0.59, 0.11)) < 0.6
            look = {"ha": "center", "va": "center", "fontsize": 12.5, "color": "white" if dark else INK}
            weight = "bold" if bold[row, column] else "normal"
            ax.text(column + 0.5, row + 0.5, f"{value:.2f}", fontweight=weight, **look)
    ax.set_xticks(np.arange(cells.shape[1]) + 0.5, [f"{tau:g}" for tau in cells.columns])
    ax.set_yticks(np.arange(cells.shape[0]) + 0.5, [f"{alpha:g}" for alpha in cells.index])
    ax.spines["bottom"].set_visible(False)
    bar = figure.colorbar(image, ax=ax, pad=0.03, aspect=14, ticks=[baseline])
    bar.ax.set_yticklabels([f"fixed: {baseline:.2f}"])
    bar.ax.axhline(baseline, color=INK, lw=1.5)
    bar.ax.tick_params(length=0, labelsize=12, labelcolor=INK)
    bar.outline.set_visible(False)
    small_print(figure, "bold: apart from fixed (95 % interval over seeds)")
    return figure


def _references(runs: ToyRuns) -> list[tuple[str, str, torch.Tensor]]:
    """(name, kind, rows) of each reference of the grid, in its order."""
    if (betas := runs.table["beta"].unique()).size > 1:
        named = ", ".join(f"{beta:g}" for beta in betas)
        raise ValueError(f"The grid has several beta ({named}), and a figure shows one. Train one at a time.")
    names = {"fixed": "fixed", "soft": "soft (α = {0.alpha}, τ = {0.tau})", "hard": "hard (τ = {0.tau})"}
    regions = runs.table["trust_region"]
    return [(names[region.kind].format(region), region.kind, torch.tensor((regions == region).to_list()))
            for region in regions.unique()]


def mean_and_half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds, the first dimension, and half of its 95 % interval (0 for a single seed)."""
    n, mean = len(values), values.mean(0)
    half = stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros_like(mean)
    return mean, half


def draw_band(ax: Axes, values: np.ndarray, color: str, dash="-") -> float:
    """The mean of (seeds, steps + 1) over seeds with its 95 % interval; returns the last mean."""
    (mean, half), steps = mean_and_half(values.astype(float)), np.arange(values.shape[1])
    if len(values) > 1:
        ax.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, lw=0, zorder=2)
    ax.plot(steps, mean, color=color, ls=dash, lw=2.4, zorder=3)
    return mean[-1]


def draw_jump(ax: Axes, before: tuple, after: tuple, color: str, bend: float = 0.3) -> None:
    """An update: the reference comes nearer to the policy, and h nearer to 0. Points are (h, height)."""
    look = {"arrowstyle": "-|>,head_width=0.35,head_length=0.7", "color": color, "lw": 2.2,
            "connectionstyle": f"arc3,rad={bend}", "shrinkA": 7, "shrinkB": 8}
    if before != after:
        ax.annotate("", xy=after, xytext=before, arrowprops=look, zorder=4)
    ax.plot(*before, marker="o", ms=10, mfc="white", mec=color, mew=2.2, zorder=5)
    ax.plot(*after, marker="o", ms=11, mfc=color, mec="white", mew=1.5, zorder=5)


def _triangle(ax: Axes) -> None:
    ax.fill(*ARMS.T, facecolor="#F7F7F7", edgecolor="#AAAAAA", lw=1.2, zorder=0)
    for share in (0.25, 0.5, 0.75):  # lines on which one arm has a quarter, a half, three quarters
        for corner in range(3):
            others = np.delete(ARMS, corner, 0)
            ax.plot(*(share * ARMS[corner] + (1 - share) * others).T, color=FAINT, lw=0.8, zorder=1)
    for corner, name, where in zip(ARMS, ("chosen", "rejected", "unseen"), ((0, -9), (0, -9), (0, 7))):
        look = {"fontsize": 12, "color": INK, "ha": "center", "va": "top" if where[1] < 0 else "bottom"}
        ax.annotate(name, corner, xytext=where, textcoords="offset points", **look)
    ax.set_aspect("equal")
    ax.axis("off")
