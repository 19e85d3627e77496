"""Figures of a run, or of several runs in one picture.

Each function takes tidy data and returns a `matplotlib.figure.Figure`. Nothing touches pyplot, so figures can
be drawn in any thread and saved without a display. `history` is a run's metrics.jsonl as a DataFrame (one row
per optimizer step; columns or values may be missing); for several runs concatenate them with two more
columns, `run` (its name) and `reference` ("fixed", "soft", "hard", or "none" for methods without one). A
colour means the same in every figure.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import plot_style
from .metrics import mean_interval
from .overoptimization import fit_overoptimization
from .plot_style import COLORS, DASHES, FAINT, INK, MARKERS, PALE, STEP, label_ends, new_figure, style_axes

MOST_UPDATES_DRAWN = 40
TRAINING = {  # title: label of the y axis, columns
    "Loss": ("mean over the batch", ["loss"]),
    "Reward margin": ("chosen − rejected", ["rewards/margin"]),
    "Reward accuracy": ("share of pairs", ["rewards/accuracy"]),
    "Log-probability of the completions": ("nats", ["logps/chosen", "logps/rejected"]),
    "KTO reference point z0": ("nats", ["kto/z0"]),
    "Reward of the samples": ("reward model", ["reward/model"]),
    "KL to the reference, before each step": ("nats a completion", ["kl/sequence"]),
    "Entropy of the policy": ("nats a token", ["entropy"]),
}
# what a policy that equals its reference scores
ZERO = {"rewards/margin": 0, "rewards/accuracy": 0.5, "kto/z0": 0}


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, reward margin and accuracy, log-probs (and KTO's z0) of one run over its steps; what was not
    logged is left out. Thin: each step. Bold: a running mean, which starts anew where the reference moves."""
    panels = {title: [name for name in names if has(history, name)] for title, (_, names) in TRAINING.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        known = ", ".join(name for _, names in TRAINING.values() for name in names)
        columns = ", ".join(map(str, history.columns))
        raise ValueError(f"The history holds none of {known}. Its columns: {columns}.")
    color, columns = COLORS[_kind(history)], min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 3.2 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    axes, window = axes[: len(panels)], max(len(history) // 20, 1)
    for i, (ax, (title, names)) in enumerate(zip(axes, panels.items())):
        lowest = i >= len(panels) - columns
        style_axes(ax, title, STEP if lowest else "", TRAINING[title][0])
        ax.xaxis.set_tick_params(labelbottom=lowest)
        if title == "Reward accuracy":
            ax.set_ylim(-0.02, 1.02)
        if names[0] in ZERO:
            ax.axhline(ZERO[names[0]], color="#BBBBBB", lw=1, zorder=1)
        ends = []
        for name, dash in zip(names, DASHES):
            x, y = _points(history, name)
            smooth, marker = _running_mean(x, y, window, _updates(history)), "o" if len(x) <= 15 else None
            if window > 1:
                ax.plot(x, y, color=color, lw=0.8, alpha=0.3, zorder=2)
            ax.plot(x, smooth, color=color, ls=dash, lw=2, zorder=3, marker=marker, ms=5)
            ends.append((smooth[-1], name.split("/")[-1], color))
        plot_style.fit_steps(ax, history)
        if len(TRAINING[title][1]) > 1:
            label_ends(ax, ends)
    _remark(figure, [f"bold: mean over {window} steps"] if window > 1 else [], axes, history)
    return figure


def kl_curves(history: pd.DataFrame) -> Figure:
    """KL to the initial policy and to the reference over the steps, on the policy's own samples; a method
    without a reference gets the first panel alone."""
    panels = {"kl/initial": "KL to the initial policy"}
    if has(history, "kl/reference"):
        panels["kl/reference"] = "KL to the reference"
    figure = new_figure(5.6 * len(panels), 3.9)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, title in zip(axes, panels.values()):
        style_axes(ax, title, STEP, "nats per completion")
        ax.yaxis.set_tick_params(labelleft=True)
        ax.axhline(0, color="#BBBBBB", lw=1, zorder=1)
    _curves(figure, dict(zip(panels, axes)), history)
    return figure


def gold_curves(history: pd.DataFrame, initial_gold: float | None = None) -> Figure:
    """Mean gold reward of the policy's samples over the steps; the initial policy as a grey line."""
    figure = new_figure(7.6, 4.3)
    ax = figure.subplots()
    style_axes(ax, "True quality over training", STEP, "gold reward")
    plot_style.initial_line(ax, initial_gold)
    _curves(figure, {"gold/reward": ax}, history)
    return figure


def overoptimization(history: pd.DataFrame, initial_gold: float | None = None) -> Figure:
    """Gold reward against sqrt(KL to the initial policy): equal abscissa is an equal distance from the start.

    One point an evaluation, joined in the order of steps; the large point is the last one. The axes are those
    of the scaling law of Rafailov et al., arXiv 2406.02900. A KL estimate below 0 (noise of few samples) is
    drawn at 0.
    """
    figure = new_figure(7.6, 4.8)
    ax = figure.subplots()
    xlabel = "distance from the initial policy, √KL (√nats)"
    style_axes(ax, "True quality against distance", xlabel, "gold reward")
    plot_style.initial_line(ax, initial_gold)
    handles = []
    for name, kind, dash, marker, rows in _runs(history):
        rows = rows.reindex(columns=["step", "kl/initial", "gold/reward"]).dropna().sort_values("step")
        if rows.empty:
            continue
        x, y = np.sqrt(rows["kl/initial"].clip(lower=0)).to_numpy(), rows["gold/reward"].to_numpy()
        if initial_gold is not None:
            ax.plot([0, x[0]], [initial_gold, y[0]], color=COLORS[kind], lw=1.2, alpha=0.35, zorder=2)
        look = {"color": COLORS[kind], "marker": marker, "mec": "white"}
        ax.plot(x, y, ls=dash, lw=1.8, ms=4.5, mew=0.6, zorder=3, **look)
        ax.plot(x[-1], y[-1], ms=11, mew=1.5, zorder=4, **look)
        handles.append(Line2D([], [], label=plot_style.shortened(name), ls=dash, lw=2, ms=8, **look))
    if not handles:
        plot_style.say_missing(ax, "kl/initial with gold/reward")
    elif "run" in history:
        columns = 4 if max(len(handle.get_label()) for handle in handles) <= 12 else 2
        look = {"frameon": False, "fontsize": 12, "labelcolor": INK, "handlelength": 2.6}
        figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), columns), **look)
    if initial_gold is not None:
        ax.plot(0, initial_gold, color=COLORS["initial"], marker="o", ms=9, mec="white", mew=1.5, zorder=4)
    ax.set_xlim(left=-0.01 * ax.get_xlim()[1])  # a line that starts at 0 is seen whole
    return figure


def frontiers(panels: dict[str, pd.DataFrame], columns: int = 2) -> Figure:
    """Gold reward against distance, a panel for each setting, with the law R(d) = d (a - b log d).

    panels: title -> rows of `overoptimization.evaluations`. Thin: a run. Bold: the law, through the points of
    all seeds of a kind of reference. Large, with bars: the last step, mean over seeds, 95 % interval.
    """
    rows = -(-len(panels) // columns)
    figure = new_figure(6 * columns, 3.7 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels):]:
        ax.remove()
    kinds = [kind for kind in COLORS if any(kind in set(table["reference"]) for table in panels.values())]
    for ax, (title, table) in zip(axes, panels.items()):
        style_axes(ax, title, "√KL to the initial policy (√nats)", "gold reward")
        start = table.loc[table["step"] == 0, "gold"].mean()
        plot_style.initial_line(ax, start)
        for kind in kinds:
            group, look = table[table["reference"] == kind], {"color": COLORS[kind], "zorder": 3}
            runs = group.groupby("run")
            for _, run in runs:
                ax.plot(run["distance"], run["gold"], lw=0.8, marker="o", ms=2.5, alpha=0.45, **look)
            law = fit_overoptimization(group["distance"], group["gold"] - runs["gold"].transform("first"))
            x = np.linspace(0, group["distance"].max(), 100)
            ax.plot(x, start + law(x), lw=2.6, **look)
            ends, (gold, low, high) = runs["distance"].last(), mean_interval(runs["gold"].last())
            ax.plot(2 * [ends.mean()], [low, high], lw=2, alpha=0.5, **look)
            ax.plot(ends.mean(), gold, marker="o", ms=11, mec="white", mew=1.5, **look)
        low, room = table["gold"].min(), 0.1 * np.ptp(table["gold"])  # of the runs: a bar may be long
        ax.set(xlim=(-0.01 * ax.get_xlim()[1], None), ylim=(low - room, low + 11 * room))
    handles = [Line2D([], [], color=COLORS[kind], lw=2.6, label=kind) for kind in kinds]
    look = {"frameon": False, "fontsize": 12, "labelcolor": INK}
    figure.legend(handles=handles, loc="outside upper left", ncols=len(kinds), **look)
    return figure


def intervals(
    table: pd.DataFrame, *, value: str = "value", title: str, xlabel: str, baseline: float | None = None
) -> Figure:
    """One row a run: a point with its 95 % interval and the numbers beside it.

    table: columns `run`, `reference` (or "initial", for the colour), `value` (name it), `low`, `high`; a row
    without a value is left out, one without an interval is a bare point. `baseline` is a vertical line, as
    0.5 of a win rate.
    """
    table = table.dropna(subset=[value])
    if table.empty:
        raise ValueError(f"No row has a {value!r}, so there is nothing to draw.")
    figure = new_figure(7.6, 1.5 + 0.48 * len(table))
    ax = figure.subplots()
    style_axes(ax, title, xlabel, "")
    ax.grid(True, axis="x", color=FAINT, lw=1)
    ax.grid(False, axis="y")
    if baseline is not None:
        ax.axvline(baseline, color=COLORS["initial"], lw=1.4, ls=DASHES[1], zorder=1)
    for y, row in enumerate(table.to_dict("records")):
        color, known = COLORS[row["reference"]], np.isfinite([row["low"], row["high"]]).all()
        text = f"{row[value]:.2f}"
        if known:
            ax.plot([row["low"], row["high"]], [y, y], color=color, lw=3, solid_capstyle="round", zorder=2)
            text += f"  [{row['low']:.2f}, {row['high']:.2f}]"
        ax.plot(row[value], y, color=color, marker="o", ms=10, mec="white", mew=1.5, zorder=3)
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=11.5, color=INK)
    ax.set_yticks(range(len(table)), table["run"], fontsize=12, color=INK)
    ax.set_ylim(len(table) - 0.4, -0.6)
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


def _runs(history: pd.DataFrame) -> Iterator[tuple[str, str, object, str, pd.DataFrame]]:
    """(name, kind, dash, marker, rows) of each run; the second run of a kind gets another dash and marker."""
    seen: dict[str, int] = {}
    for name, rows in history.groupby("run", sort=False) if "run" in history else [("policy", history)]:
        kind = _kind(rows)
        i = seen[kind] = seen.get(kind, -1) + 1
        yield str(name), kind, DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)], rows


def _curves(figure: Figure, axes: dict[str, Axes], history: pd.DataFrame) -> None:
    """One line a run through its evaluations in the axes of each column, and then the names: the axes share
    their limits."""
    ends = {column: [] for column in axes}
    for column, ax in axes.items():
        for name, kind, dash, marker, rows in _runs(history):
            x, y = _points(rows, column)
            look = {"color": COLORS[kind], "ls": dash, "lw": 2, "marker": marker, "mec": "white", "mew": 0.6}
            ax.plot(x, y, ms=5.5 if len(x) <= 40 else 0, zorder=3, **look)
            ends[column] += [(y[-1], name, COLORS[kind])] if len(y) else []
        plot_style.fit_steps(ax, history)
    for column, ax in axes.items():
        if not ends[column]:
            plot_style.say_missing(ax, column)
        elif "run" in history:
            label_ends(ax, ends[column])
    _remark(figure, [], axes.values(), history)


def _remark(figure: Figure, remarks: list[str], axes, history: pd.DataFrame) -> None:
    """The small print; for a single run also where the reference moved (dotted), or how often."""
    moved = _updates(history) if "run" not in history else []
    if len(moved) > MOST_UPDATES_DRAWN:
        remarks.append(f"the reference moved {len(moved)} times")
    elif len(moved):
        remarks.append("dotted: the reference moves")
        for ax in axes:
            for step in moved:
                ax.axvline(step, color="#A8A8A8", lw=1, ls=(0, (1, 2.5)), zorder=0)
    if remarks:
        figure.supxlabel(" · ".join(remarks), x=0.99, ha="right", fontsize=10.5, color=PALE)
