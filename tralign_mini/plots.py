"""Figures of a run, or of several runs in one picture.

Each function takes tidy data and returns a `matplotlib.figure.Figure`. Nothing touches pyplot, so figures can
be drawn in any thread and saved without a display. `history` is a run's metrics.jsonl as a DataFrame (one row
per optimizer step; columns or values may be missing); for several runs concatenate them with two more
columns, `run` (its name) and `reference` ("fixed", "soft", "hard", or "none" for methods without one). A
colour means the same in every figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import plot_style
from .metrics import mean_interval
from .overoptimization import law_through
from .plot_style import COLORS, CURVES, DASHES, MARKERS, STEP, initial_line, label_ends, new_axes, style_axes

MOST_UPDATES_DRAWN = 40
DISTANCE = "√KL to the initial policy (√nats)"
TRAINING = (["loss"], ["rewards/margin"], ["rewards/accuracy"], ["logps/chosen", "logps/rejected"],
            ["kto/z0"], ["reward/model"], ["kl/sequence"], ["entropy"])  # the columns of each panel
# what a policy that equals its reference, or the initial policy, scores
ZERO = {"rewards/margin": 0, "rewards/accuracy": 0.5, "kto/z0": 0, "kl/initial": 0, "kl/reference": 0}


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, reward margin and accuracy, log-probs (and KTO's z0) of one run over its steps; what was not
    logged is left out. Thin: each step. Bold: a running mean, which starts anew where the reference moves."""
    panels = [names for names in TRAINING if any(has(history, name) for name in names)]
    if not panels:
        known, columns = ", ".join(sum(TRAINING, [])), ", ".join(map(str, history))
        raise ValueError(f"The history holds none of {known}. Its columns: {columns}.")
    color, window = COLORS[_kind(history)], max(len(history) // 20, 1)
    figure, axes = new_axes(len(panels), 5.6, 3.2, columns=2, sharex=True)
    for ax, names in zip(axes, panels):
        (title, ylabel), lowest, ends = CURVES[names[0]], ax in axes[-2:], []
        style_axes(ax, title, STEP if lowest else "", ylabel)
        ax.xaxis.set_tick_params(labelbottom=lowest)
        if title == "Reward accuracy":
            ax.set_ylim(-0.02, 1.02)
        for name, dash in zip(names, DASHES):
            x, y = _points(history, name)
            if not len(x):
                continue
            smooth, marker = _running_mean(x, y, window, _updates(history)), "o" if len(x) <= 15 else None
            if window > 1:
                ax.plot(x, y, color=color, lw=0.8, alpha=0.3, zorder=2)
            ax.plot(x, smooth, color=color, ls=dash, lw=2, zorder=3, marker=marker, ms=5)
            ends.append((smooth[-1], name.split("/")[-1], color))
        _frame(ax, history, names[0])
        if len(names) > 1:
            label_ends(ax, ends)
    _remark(figure, [f"bold: mean over {window} steps"] if window > 1 else [], history)
    return figure


def kl_curves(history: pd.DataFrame) -> Figure:
    """KL to the initial policy and to the reference over the steps, on the policy's own samples; a method
    without a reference gets the first panel alone."""
    return _over_steps(history, ["kl/initial", "kl/reference"][:1 + has(history, "kl/reference")])


def gold_curves(history: pd.DataFrame, initial_gold: float | None = None) -> Figure:
    """Mean gold reward of the policy's samples over the steps; the initial policy as a grey line."""
    return _over_steps(history, ["gold/reward"], initial_gold)


def _over_steps(history: pd.DataFrame, columns: list[str], initial: float | None = None) -> Figure:
    """One line a run through its evaluations, with its name; a panel for each column, of the same limits."""
    figure, axes = new_axes(len(columns), 6.2, 3.8, sharex=True, sharey=True)
    ends = {ax: [] for ax in axes}
    for ax, column in zip(axes, columns):
        style_axes(ax, CURVES[column][0], STEP, CURVES[column][1])
        ax.yaxis.set_tick_params(labelleft=True)
        initial_line(ax, initial)
        for name, kind, look, rows in _runs(history):
            x, y = _points(rows, column)
            ax.plot(x, y, lw=2, ms=5.5 if len(x) <= 40 else 0, mew=0.6, zorder=3, **look)
            ends[ax] += [(y[-1], name, COLORS[kind])] if len(y) and "run" in history else []
        _frame(ax, history, column)
    for ax in axes:  # now that the limits are known
        label_ends(ax, ends[ax])
    _remark(figure, [], history)
    return figure


def overoptimization(history: pd.DataFrame, initial_gold: float | None = None) -> Figure:
    """Gold reward against sqrt(KL to the initial policy): equal abscissa is an equal distance from the start.

    One point an evaluation, joined in the order of steps; the large point is the last one. The axes are those
    of the scaling law of Rafailov et al., arXiv 2406.02900. A KL estimate below 0 (noise of few samples) is
    drawn at 0.
    """
    figure, [ax] = new_axes(1, 7.6, 4.4)
    style_axes(ax, "True quality against distance", DISTANCE, "gold reward")
    initial_line(ax, initial_gold)
    for name, kind, look, rows in _runs(history):
        rows = rows.reindex(columns=["step", "kl/initial", "gold/reward"]).dropna().sort_values("step")
        if rows.empty:
            continue
        x, y = np.sqrt(rows["kl/initial"].clip(lower=0)).to_numpy(), rows["gold/reward"].to_numpy()
        if initial_gold is not None:
            ax.plot([0, x[0]], [initial_gold, y[0]], color=COLORS[kind], lw=1.2, alpha=0.35, zorder=2)
        ax.plot(x, y, lw=1.8, ms=4.5, mew=0.6, zorder=3, **look)
        ax.plot(x[-1], y[-1], lw=1.8, ms=11, mew=1.5, zorder=4, label=plot_style.shortened(name), **look)
    if "run" in history:
        plot_style.add_legend(figure, "outside lower left")
    if initial_gold is not None:
        ax.plot(0, initial_gold, color=COLORS["initial"], marker="o", ms=9, mec="white", mew=1.5, zorder=4)
    ax.set_xlim(left=-0.01 * ax.get_xlim()[1])  # a line that starts at 0 is seen whole
    return figure


def frontiers(panels: dict[str, pd.DataFrame], columns: int = 2) -> Figure:
    """Gold reward against distance, a panel for each setting, with the law R(d) = d (a - b log d).

    panels: title -> rows of `overoptimization.evaluations`. Thin: a run. Bold: the law, through the points of
    all seeds of a kind of reference. Large, with bars: the last step, mean over seeds, 95 % interval.
    """
    figure, axes = new_axes(len(panels), 6, 3.7, columns=columns)
    for ax, (title, table) in zip(axes, panels.items()):
        style_axes(ax, title, DISTANCE, "gold reward")
        initial_line(ax, table.loc[table["step"] == 0, "gold"].mean())
        for kind in COLORS:
            runs, look = table[table["reference"] == kind].groupby("run"), {"color": COLORS[kind]}
            paths = [(run["distance"].to_numpy(), run["gold"].to_numpy()) for _, run in runs]
            for path in paths:
                ax.plot(*path, lw=0.8, marker="o", ms=2.5, alpha=0.45, **look)
            if law := law_through(paths):
                ax.plot(*law, lw=2.6, **look)
            if paths:
                end, (gold, low, high) = runs["distance"].last().mean(), mean_interval(runs["gold"].last())
                ax.plot([end, end], [low, high], lw=2, alpha=0.5, **look)
                ax.plot(end, gold, lw=2.6, marker="o", ms=11, mec="white", mew=1.5, label=kind, **look)
        low, room = table["gold"].min(), 0.1 * np.ptp(table["gold"])  # of the runs: a bar may be long
        ax.set(xlim=(-0.01 * ax.get_xlim()[1], None), ylim=(low - room, low + 11 * room))
    plot_style.add_legend(figure, "outside upper left")
    return figure


def has(history: pd.DataFrame, column: str) -> bool:
    """Whether a column was measured at least once."""
    return column in history and history[column].notna().any()


def _points(history: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    rows = history.reindex(columns=["step", column]).dropna().sort_values("step")
    return rows["step"].to_numpy(), rows[column].to_numpy(dtype=float)


def _kind(history: pd.DataFrame) -> str:
    if "reference" in history:
        return history["reference"].iloc[0]
    if not len(_updates(history)):
        return "fixed"
    return "hard" if has(history, "alpha") and history["alpha"].dropna().iloc[-1] == 1 else "soft"


def _updates(history: pd.DataFrame) -> np.ndarray:
    """The steps after which the reference moved."""
    steps, counts = _points(history, "reference_updates")
    return steps[np.diff(counts, prepend=0) > 0]


def _running_mean(x: np.ndarray, y: np.ndarray, window: int, moved: np.ndarray) -> np.ndarray:
    """It does not bridge updates, where margins jump, unless these are too many to leave a mean."""
    stretch = np.searchsorted(moved if len(moved) <= MOST_UPDATES_DRAWN else [], x)
    return pd.Series(y).groupby(stretch).rolling(window, center=True, min_periods=1).mean().to_numpy()


def _runs(history: pd.DataFrame) -> Iterator[tuple[str, str, dict, pd.DataFrame]]:
    """(name, kind, look, rows) of each run; the second run of a kind gets another dash and marker."""
    seen: dict[str, int] = {}
    for name, rows in history.groupby("run", sort=False) if "run" in history else [("policy", history)]:
        kind = _kind(rows)
        i = seen[kind] = seen.get(kind, -1) + 1
        look = {"color": COLORS[kind], "ls": DASHES[i % 4], "marker": MARKERS[i % 4], "mec": "white"}
        yield str(name), kind, look, rows


def _frame(ax: Axes, history: pd.DataFrame, column: str) -> None:
    """From 0 to the last step, in every figure of a run alike; and a line, see `ZERO`."""
    last = history["step"].max()
    ax.set_xlim(-0.02 * last, 1.02 * last)
    if column in ZERO:
        ax.axhline(ZERO[column], color="#BBBBBB", lw=1, zorder=1)


def _remark(figure: Figure, remarks: list[str], history: pd.DataFrame) -> None:
    """The small print; for a single run also where the reference moved (dotted), or how often."""
    moved = _updates(history) if "run" not in history else []
    if len(moved) > MOST_UPDATES_DRAWN:
        remarks.append(f"the reference moved {len(moved)} times")
    elif len(moved):
        remarks.append("dotted: the reference moves")
        for ax, step in product(figure.axes, moved):
            ax.axvline(step, color="#A8A8A8", lw=1, ls=(0, (1, 2.5)), zorder=0)
    if remarks:
        plot_style.small_print(figure, " · ".join(remarks))
