"""`tr.widgets.runs_explorer(directory)`: the runs below a directory, their curves, quality against distance.

Only the files of the runs are read. A filter does not change the axes, so that pictures can be compared.
"""

from __future__ import annotations

from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..plot_style import COLORS, DASHES, INK, MARKERS, PALE, STEP, shortened, style_axes
from ..record import Record, read
from .panel import WIDTH, Panel, Picture, around, choice

FILTERS = ("method", "alpha", "tau", "beta", "seed")  # always there; the others where they tell runs apart
OTHERS = ("tuning", "learning_rate", "epochs", "train_pairs", "batch_size", "model", "data")
SIGNS = {"alpha": "α", "tau": "τ", "beta": "β"}
COURSES = {  # column: label of the button, title, label of the axis
    "gold/reward": ("gold", "True quality", "gold reward"),
    "rewards/margin": ("margin", "Reward margin", "chosen − rejected"),
    "loss": ("loss", "Loss", "mean over the batch"),
    "kl/initial": ("KL", "KL to the initial policy", "nats per completion"),
    "kl/reference": ("KL to the reference", "KL to the reference", "nats per completion"),
}
MOST_NAMED = 13  # lines of the legend; of more groups only the colours are explained


def find_runs(directory) -> tuple[pd.DataFrame, list[str]]:
    """The runs below a directory, and the names of folders that cannot be read as one (just begun, damaged).

    A row a run: record, kind of reference, initial_gold (of the initial policy's samples; NaN: not measured)
    and its settings; alpha and tau are None if the reference does not move. ValueError if there is no run.
    """
    rows, left_out = [], []
    for path in sorted(Path(directory).rglob("recipe.yaml")):
        try:
            record = read(path.parent)
        except ValueError:
            left_out.append(path.parent.name)
            continue
        gold = record.column("gold_initial")
        row = {"record": record, "kind": record.kind, "initial_gold": np.mean(gold) if gold else np.nan}
        row |= {name: record.recipe[name] for name in (*FILTERS, *OTHERS)}
        row |= {"method": row["method"].upper()} | ({} if record.moves else {"alpha": None, "tau": None})
        rows.append(row)
    if not rows:
        raise ValueError(
            f"There is no run below {directory}: the folder of a run holds recipe.yaml, and metrics.jsonl "
            "with at least a step. Train one first, or give the folder above your runs.")
    return pd.DataFrame(rows, dtype=object), left_out


def course(record: Record, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column; what is measured in every step as a running mean over a twentieth."""
    rows = record.history.reindex(columns=["step", column]).dropna().astype(float)
    window = max(len(rows) // 20, 1) if column in ("loss", "rewards/margin") else 1
    values = rows[column].rolling(window, center=True, min_periods=1).mean()
    return rows["step"].to_numpy(), values.to_numpy()


def frontier(record: Record, initial_gold: float) -> tuple[np.ndarray, np.ndarray]:
    """sqrt of the KL to the initial policy (noise below 0 is 0) and gold reward: start, then evaluations."""
    rows = record.history.reindex(columns=["kl/initial", "gold/reward"]).dropna().to_numpy(float)
    if len(rows) and np.isfinite(initial_gold):
        rows = np.vstack([(0, initial_gold), rows])
    return np.sqrt(rows[:, 0].clip(min=0)), rows[:, 1]


class RunsExplorer(Panel):
    """Controls: filters (setting -> list box), shown. runs: the table of `find_runs`."""

    def __init__(self, directory):
        self.runs, left_out = find_runs(directory)
        self.filters, cuts = {}, []
        for name in (*FILTERS, *OTHERS):
            values = [None if pd.isna(value) else value for value in self.runs[name]]
            cut = pd.factorize(pd.Series(map(str, values)))[0].tolist()
            if name in FILTERS or (any(cut) and cut not in cuts):  # of two that change together, one
                cuts.append(cut)
                options = sorted(set(values), key=lambda value: (value is None, value or 0))
                named = [(_text(value), value) for value in options]
                self.filters[name] = ipywidgets.SelectMultiple(
                    options=named, value=options, rows=min(max(len(named), 2), 5), layout={"width": "110px"})
        boxes = [ipywidgets.VBox([ipywidgets.HTML(f"<b>{name}</b>"), box])
                 for name, box in self.filters.items()]
        records = self.runs["record"]
        there = [column for column in COURSES if any(column in record.history for record in records)]
        self.shown = choice({COURSES[column][0]: column for column in there}, there[0])
        self._curves = {column: [course(record, column) for record in records] for column in there}
        self._curves["frontier"] = list(map(frontier, records, self.runs["initial_gold"]))
        figure = Figure(figsize=(WIDTH, 4.5), facecolor="white")
        self.axes = [figure.add_axes((left, 0.13, 0.33, 0.76)) for left in (0.06, 0.455)]
        style_axes(self.axes[1], "True quality against distance", "√KL to the initial policy", "gold reward")
        self._picture = Picture(figure, [])
        super().__init__([boxes, [self.shown]], [*self.filters.values(), self.shown])
        if left_out:
            text = f"not readable as runs: {', '.join(left_out)}"
            self.message.value = f'<span style="color:{PALE}">{text}</span>'

    def selected(self) -> pd.DataFrame:
        """The runs that pass all filters."""
        keep = np.ones(len(self.runs), bool)
        for name, box in self.filters.items():
            keep &= [(None if pd.isna(value) else value) in box.value for value in self.runs[name]]
        return self.runs[keep]

    def groups(self) -> dict[str, pd.DataFrame]:
        """The selected runs, name -> those that differ in their seed alone."""
        runs, settings = self.selected(), [name for name in self.filters if name != "seed"]
        varied = [name for name in settings if runs[name].nunique(dropna=False) > 1]
        groups = {}
        for _, rows in runs.groupby(settings, dropna=False, sort=False):
            first = rows.iloc[0]
            said = [name for name in varied if name != "alpha" or first["kind"] == "soft"]
            values = {name: first[name] for name in said if not pd.isna(first[name])}
            words = [f"{SIGNS.get(key, '')} {_text(value)}".strip() for key, value in values.items()]
            groups[" ".join([first["kind"], *words])] = rows
        return dict(sorted(groups.items(), key=lambda item: list(COLORS).index(item[1]["kind"].iloc[0])))

    def picture(self) -> bytes:
        column, groups, artists, handles, seen = self.shown.value, self.groups(), [], [], []
        figure, (left, right) = self._picture.figure, self.axes
        style_axes(left, COURSES[column][1], STEP, COURSES[column][2])
        for ax, what in ((left, column), (right, "frontier")):
            x, y = (np.concatenate(side) for side in zip(*self._curves[what]))
            gold = list(self.runs["initial_gold"].dropna()) if ax.get_ylabel() == "gold reward" else []
            if len(x):
                ax.set(xlim=(-0.02 * x.max(), 1.03 * x.max()), ylim=around([*y, *gold]))
            if gold:
                artists.append(ax.axhline(np.mean(gold), color=COLORS["initial"], lw=1.2, ls=DASHES[1]))
        for name, rows in groups.items():
            kind = rows["kind"].iloc[0]
            i = seen.count(kind)
            seen.append(kind)
            look = {"color": COLORS[kind], "ls": DASHES[i % 4], "marker": MARKERS[i // 4 % 4], "mec": "white"}
            artists += _group(left, [self._curves[column][i] for i in rows.index], look | {"marker": ""})
            artists += _group(right, [self._curves["frontier"][i] for i in rows.index], look)
            handles.append(Line2D([], [], label=shortened(name), lw=2.4, ms=6, **look))
        if len(handles) > MOST_NAMED:
            handles = [Line2D([], [], label=kind, lw=2.4, color=COLORS[kind]) for kind in dict.fromkeys(seen)]
        look = {"frameon": False, "fontsize": 10.5, "labelcolor": INK, "handlelength": 2.2}
        artists.append(figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.79, 0.91), **look))
        note = f"{len(self.selected())} of {len(self.runs)} runs; thin: a seed"
        artists.append(figure.text(0.8, 0.05, note, fontsize=10.5, color=PALE))
        self._picture.moving = artists
        try:
            return self._picture.png()
        finally:
            for artist in artists:
                artist.remove()


def _group(ax, curves: list[tuple], look: dict) -> list:
    """The mean over the runs; a thin line for each, where there are several; large, where they end."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return []
    several = curves if len(curves) > 1 else []
    thin = [ax.plot(*curve, lw=0.9, alpha=0.35, color=look["color"])[0] for curve in several]
    length = min(len(x) for x, _ in curves)
    x, y = np.mean([(x[:length], y[:length]) for x, y in curves], 0)
    ends = ax.plot(x[-1:], y[-1:], ms=10, mew=1.3, **look) if look["marker"] else []
    return [*thin, *ax.plot(x, y, lw=2.4, ms=4.5, mew=0.5, **look), *ends]


def _text(value) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def runs_explorer(directory="runs") -> RunsExplorer:
    """Finished runs below a directory: filter them, see their curves, and gold reward against sqrt(KL).

    Colours tell the reference: blue fixed, orange soft, green hard. Bold lines are means over seeds.
    """
    return RunsExplorer(directory)
