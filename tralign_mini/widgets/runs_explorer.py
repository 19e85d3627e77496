"""`tr.widgets.runs_explorer(directory)`: the runs below a directory, their curves, quality against distance.

Only the files of the runs are read. The axes follow the selected runs, or one that has run away would squeeze
all others. Through the points of each group goes the law R(d) = d (a - b log d) of `overoptimization.py`.
"""

from __future__ import annotations

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..overoptimization import frontier, law_through, read_all
from ..plot_style import COLORS, CURVES, DASHES, INK, MARKERS, PALE, STEP, shortened, style_axes
from ..record import Record
from ..worlds import grid_directory
from .panel import WIDTH, Panel, around, choice

FILTERS = ("method", "alpha", "tau", "beta", "seed")  # always there; the others where they tell runs apart
OTHERS = ("tuning", "epochs", "model", "data")
UNFILTERED = ("learning_rate", "batch_size", "train_pairs")  # without a filter, but no seeds of each other
SIGNS = {"alpha": "α", "tau": "τ", "beta": "β", "learning_rate": "rate", "batch_size": "batch",
         "train_pairs": "pairs"}
SHOWN = ("gold/reward", "rewards/margin", "loss", "kl/initial", "kl/reference")
MOST_NAMED = 9  # lines of the legend, slower to draw than all curves; of more groups only the colours


def find_runs(directory) -> tuple[pd.DataFrame, list[str]]:
    """The runs below a directory, and the names of folders that cannot be read as one (just begun, damaged).

    A row a run: record, kind of reference, initial_gold (of the initial policy's samples; NaN: not measured)
    and its settings; alpha and tau are None if the reference does not move. ValueError if there is no run.
    """
    records, left_out = read_all(directory)
    rows = []
    for record in records:
        gold = record.column("gold_initial")
        row = {"record": record, "kind": record.kind, "initial_gold": np.mean(gold) if gold else np.nan}
        row |= {name: record.recipe[name] for name in (*FILTERS, *OTHERS, *UNFILTERED)}
        rows.append(row | {"method": row["method"].upper()})
        if not record.moves:
            rows[-1] |= {"alpha": None, "tau": None}
    return pd.DataFrame(rows, dtype=object), list(left_out)


def course(record: Record, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column; what is measured in every step as a running mean over a twentieth."""
    rows = record.history.reindex(columns=["step", column]).dropna().astype(float)
    window = max(len(rows) // 20, 1) if column in ("loss", "rewards/margin") else 1
    values = rows[column].rolling(window, center=True, min_periods=1).mean()
    return rows["step"].to_numpy(), values.to_numpy()


class RunsExplorer(Panel):
    """Finished runs below a directory: filter them, see their curves, and gold reward against sqrt(KL).

    directory: by default the grid that ships with the package. Colours tell the reference: blue fixed, orange
    soft, green hard. Bold: on the left means over seeds, on the right the law R(d) = d (a - b log d).
    Controls: filters (setting -> list box), shown. runs: the table of `find_runs`.
    """

    def __init__(self, directory=None):
        self.runs, left_out = find_runs(directory or grid_directory())
        self.filters = {}
        for name in (*FILTERS, *OTHERS):
            options = sorted(set(self.runs[name]), key=lambda value: (value is None, value or 0))
            if name in FILTERS or len(options) > 1:
                self.filters[name] = ipywidgets.SelectMultiple(
                    options=[(_text(value), value) for value in options], value=options, rows=5,
                    layout={"width": "110px"})
        boxes = [ipywidgets.VBox([ipywidgets.HTML(f"<b>{name}</b>"), box])
                 for name, box in self.filters.items()]
        records = self.runs["record"]
        there = [column for column in SHOWN if any(column in record.history for record in records)]
        self.shown = choice({CURVES[column][0]: column for column in there}, there[0])
        self._curves = {column: [course(record, column) for record in records] for column in there}
        self._curves["frontier"] = list(map(frontier, records))
        figure = Figure(figsize=(WIDTH, 4.5), facecolor="white")
        self.axes = [figure.add_axes((left, 0.13, 0.33, 0.76)) for left in (0.06, 0.455)]
        style_axes(self.axes[1], "True quality against distance", "√KL to the initial policy", "gold reward")
        super().__init__([boxes, [self.shown]], [*self.filters.values(), self.shown], figure)
        if left_out:
            text = f"not readable as runs: {', '.join(left_out)}"
            self.message.value = f'<span style="color:{PALE}">{text}</span>'

    def selected(self) -> pd.DataFrame:
        """The runs that pass all filters."""
        kept = [self.runs[name].isin(box.value) for name, box in self.filters.items()]
        return self.runs[np.logical_and.reduce(kept)]

    def groups(self) -> dict[str, pd.DataFrame]:
        """The selected runs, name -> those that differ in their seed alone."""
        runs, settings = self.selected(), [name for name in (*self.filters, *UNFILTERED) if name != "seed"]
        said = {kind: [name for name in settings  # alpha and tau are said where their kind has several
                       if (alike if name in ("alpha", "tau") else runs)[name].nunique(dropna=False) > 1]
                for kind, alike in runs.groupby("kind")}
        groups = {}
        for _, rows in runs.groupby(settings, dropna=False, sort=False):
            first = dict(zip(rows, rows.to_numpy()[0]))
            words = [f"{SIGNS.get(name, '')} {_text(first[name])}".strip() for name in said[first["kind"]]]
            groups[" ".join([first["kind"], *words])] = rows
        return dict(sorted(groups.items(), key=lambda item: list(COLORS).index(item[1]["kind"].iloc[0])))

    def draw(self) -> None:
        column, groups = self.shown.value, self.groups()
        left, right = self.axes
        style_axes(left, CURVES[column][0], STEP, CURVES[column][1])
        selected = self.selected()
        runs = selected if groups else self.runs
        for ax, what in ((left, column), (right, "frontier")):
            x, y = (np.concatenate(side) for side in zip(*(self._curves[what][i] for i in runs.index)))
            gold = list(runs["initial_gold"].dropna()) if ax.get_ylabel() == "gold reward" else []
            if len(x):
                ax.set(xlim=(-0.02 * x.max(), 1.03 * x.max()), ylim=around([*y, *gold]))
            if gold:
                ax.axhline(np.mean(gold), color=COLORS["initial"], lw=1.2, ls=DASHES[1])
        looks, few = {}, len(groups) <= MOST_NAMED
        for name, rows in groups.items():
            kind = rows["kind"].iloc[0]
            i = [look["color"] for look in looks.values()].count(COLORS[kind])
            looks[name] = {"color": COLORS[kind], "ls": DASHES[i % 4], "marker": MARKERS[i // 4 % 4],
                           "lw": 2.4 if few else 1.2}
        for ax, what in ((left, column), (right, "frontier")):
            curves = [[self._curves[what][i] for i in rows.index] for rows in groups.values()]
            _draw_groups(ax, list(looks.values()), curves, laws=ax is right)
        if few:
            handles = [Line2D([], [], label=shortened(name), ms=6, mec="white", **look)
                       for name, look in looks.items()]
        else:
            handles = [Line2D([], [], label=kind, lw=2.4, color=COLORS[kind])
                       for kind in dict.fromkeys(selected["kind"])]
        look = {"frameon": False, "fontsize": 10.5, "labelcolor": INK, "handlelength": 2.2}
        left.figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.79, 0.91), **look)
        note = f"{len(selected)} of {len(self.runs)} runs; thin: a seed\nright, bold: d (a − b log d)"
        left.figure.text(0.8, 0.05, note, fontsize=10.5, color=PALE)


def _draw_groups(ax, looks: list[dict], groups: list[list], laws: bool) -> None:
    """Thin: each run of several; bold: their mean or, with `laws`, the law and the mean's points, large where
    they end. A few collections are drawn faster than many lines."""
    thin, bold, points = [], [], {}
    for look, curves in zip(looks, groups):
        curves, color, width = [curve for curve in curves if len(curve[0])], look["color"], look["lw"]
        if not curves:
            continue
        if len(curves) > 1:
            thin += [(np.stack(curve, 1), color) for curve in curves]
        length = min(len(x) for x, _ in curves)
        mean = np.mean([(x[:length], y[:length]) for x, y in curves], 0)
        line = (laws and law_through(curves)) or mean
        bold.append((np.stack(line, 1), color, look["ls"], width))
        if laws:
            first = 0 if width > 2 else length - 1
            areas = [20] * (length - 1 - first) + [16 * width**2]
            points.setdefault(look["marker"], []).extend(zip(*mean[:, first:], areas, [color] * len(areas)))
    if thin:
        lines, colors = zip(*thin)
        ax.add_collection(LineCollection(lines, colors=colors, lw=0.9, alpha=0.35), autolim=False)
    if bold:
        lines, colors, dashes, widths = map(list, zip(*bold))  # two dashes in a tuple would be read as one
        bold = LineCollection(lines, colors=colors, linestyles=dashes, lw=widths, joinstyle="round", zorder=2)
        ax.add_collection(bold, autolim=False)
    for marker, those in points.items():
        ax.scatter(*zip(*those), marker=marker, zorder=2.5, edgecolors="white", linewidths=0.5)


def _text(value) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
