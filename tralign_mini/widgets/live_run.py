"""`tr.widgets.live_run(recipe)`: a run that is steered while it trains.

Training is a thread that reads the sliders before every optimizer step. What they change is kept in the
run's changes.jsonl, so that `tr.replay(directory, output)` runs the same again. A stopped run can go on.
"""

from __future__ import annotations

import json
import threading
import time
from itertools import groupby
from pathlib import Path

import ipywidgets
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure

from ..changes import read_changes, region_at
from ..json_lines import read_rows
from ..plan import WITHOUT_REFERENCE
from ..plot_style import COLORS, CURVES, DASHES, INK, STEP, style_axes
from ..plots import MOST_UPDATES_DRAWN
from ..recipe import Recipe
from ..trust_region import TrustRegion
from .panel import WIDTH, Panel, alpha_slider, around, region, tau_slider

PANELS = (["loss"], ["rewards/margin"], ["kl/initial", "kl/reference"], ["gold/reward"])
BETWEEN_PICTURES = 0.4  # seconds: drawing takes time from training


class LiveRun(Panel):
    """A run that is steered by sliders while it trains: start, pause, stop, resume.

    recipe, overrides: as for `tr.train`. If `output` holds a run that was stopped, it goes on. alpha = 0 is a
    fixed reference. The strip above the curves tells the kind: blue fixed, orange soft, green hard. Controls:
    start_button, pause_button, stop_button (or `start()`, `pause()`, `stop()`), alpha, tau. state: "ready",
    "running", "paused", "stopped", "finished" or "failed". run: the `Run`, after training.
    """

    def __init__(self, recipe, **overrides):
        self._stop, self._go = threading.Event(), threading.Event()
        self._thread = self._shown = self.run = None
        self.recipe = Recipe.load(recipe, **overrides)
        if self.recipe.method in WITHOUT_REFERENCE:
            raise ValueError(f"method={self.recipe.method} has no reference that could be steered: choose "
                             "dpo, ipo or kto, or train it with tr.train.")
        self.directory = Path(self.recipe.output)
        done = len(self.rows())  # in an earlier session
        self.state = "ready" if not done else "finished" if done == self.total() else "stopped"
        now = region_at(read_changes(self.directory), done, self.recipe.trust_region())
        self.alpha, self.tau = alpha_slider(now.alpha or 0.0), tau_slider(now.tau or 16)
        actions = {"play": self.start, "pause": self.pause, "stop": self.stop}
        buttons = [ipywidgets.Button(description=icon.title(), icon=icon, layout={"width": "110px"})
                   for icon in actions]
        self.start_button, self.pause_button, self.stop_button = buttons
        self.start_button.button_style = "success"
        for button, action in zip(buttons, actions.values()):
            button.on_click(lambda button, action=action: action())
        self.bar, self.status = ipywidgets.IntProgress(layout={"width": "400px"}), ipywidgets.HTML()
        figure = Figure(figsize=(WIDTH, 5.6), facecolor="white")
        figure.subplots_adjust(left=0.075, right=0.985, top=0.94, bottom=0.1, wspace=0.19, hspace=0.34)
        self.axes = figure.subplots(2, 2).ravel()
        for ax, columns in zip(self.axes, PANELS):
            title, ylabel = CURVES[columns[0]]
            title += " (dashed: reference)" * (len(columns) > 1)
            style_axes(ax, title, STEP if ax.get_subplotspec().is_last_row() else "", ylabel)
            ax.set_ylim(0, 1)
        super().__init__([[*buttons, self.bar], [self.alpha, self.tau], [self.status]], [], figure)

    def start(self) -> None:
        """Start, go on after a pause, or go on after a stop, from the last checkpoint."""
        self._go.set()
        self._say("running")
        if self._thread is None or not self._thread.is_alive():
            self._stop.clear()
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Wait before the next optimizer step, until `start` or `stop`."""
        if self.state == "running":
            self._go.clear()
            self._say("paused")

    def stop(self) -> None:
        """End after the step, with a checkpoint; after a pause that is one more step."""
        self._stop.set()
        self._go.set()

    def close(self) -> None:
        self.stop()
        super().close()

    def wait(self, timeout: float | None = 60) -> bool:
        """Until the run has ended, and the picture shows it; a paused run does not end."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        return super().wait(timeout)

    def rows(self) -> list[dict]:
        """metrics.jsonl so far."""
        return read_rows(self.directory / "metrics.jsonl")

    def total(self) -> int | None:
        """Optimizer steps of the whole run; None before the data are loaded, unless the recipe says it."""
        report = self.directory / "data_report.json"
        if self.recipe.max_steps or not report.is_file():
            return self.recipe.max_steps
        return self.recipe.plan(json.loads(report.read_text())["rows_out"]).steps

    def _train(self) -> None:
        from ..runs import train  # not at the top: it loads transformers

        state = "failed"
        with self.errors_shown("training"):
            resume = (self.directory / "recipe.yaml").is_file()
            self.run = train(self.recipe, resume=resume, control=self._control, stop=self._stop)
            state = "finished" if len(self.rows()) == self.total() else "stopped"
        self._say(state)
        if self._shown:  # what a reader without a kernel will see is the end, not the beginning
            self._shown.update(self._repr_mimebundle_(), raw=True)

    def _control(self, step: int) -> TrustRegion:
        """What the trainer asks before each step."""
        self._drawer.ask()
        self._go.wait()
        return region(self.alpha.value, self.tau.value)

    def _say(self, state: str) -> None:
        self.state = state
        self._drawer.ask()

    def _show(self) -> None:
        super()._show()
        if self.state == "running":
            time.sleep(BETWEEN_PICTURES)

    def _settle(self) -> None:
        self._drawer.wait(2)  # not for the end of the run

    def _ipython_display_(self) -> None:
        self._shown = display(self._repr_mimebundle_(), raw=True, display_id=True)

    def draw(self) -> None:
        rows, total = self.rows(), self.total()
        self._show_state(rows, total)
        counts = [0, *(row["reference_updates"] for row in rows)]
        moved = [row["step"] for row, before in zip(rows, counts) if row["reference_updates"] > before]
        spans = [(kind, [row["step"] for row in group]) for kind, group in groupby(
            rows, lambda row: TrustRegion(row["alpha"], row["tau"]).kind)]
        begins, ends = [steps[0] - 1 for _, steps in spans], [steps[-1] for _, steps in spans]
        for ax, columns in zip(self.axes, PANELS):
            ax.set_xlim(0, 1.015 * (total or max(100, len(rows))))
            curves = [_measured(rows, column) for column in columns]
            values = [value for points in curves for _, value in points]
            if values:
                ax.set_ylim(*around([*values, max(values) + 0.12 * np.ptp(values)]))  # the strip needs room
            for points, dash in zip(curves, DASHES):
                ax.plot(*np.reshape(points, (-1, 2)).T, color=INK, lw=2, ls=dash, marker="o", ms=3.5)
            beside = {"transform": ax.get_xaxis_transform()}
            ax.hlines([0.985] * len(spans), begins, ends, [COLORS[kind] for kind, _ in spans], lw=7, **beside)
            shown = moved if len(moved) <= MOST_UPDATES_DRAWN else []
            ax.vlines(shown, 0, 0.97, "#A8A8A8", lw=1, ls=DASHES[2], **beside)

    def _show_state(self, rows: list[dict], total: int | None) -> None:
        """Buttons, bar, and the lines below them."""
        state, changes, step = self.state, read_changes(self.directory), len(rows)
        self.start_button.description = "Resume" if rows or state == "paused" else "Start"
        self.start_button.disabled = state in ("running", "finished")
        self.pause_button.disabled = state != "running"
        self.stop_button.disabled = state not in ("running", "paused")
        self.bar.max, self.bar.value = total or max(100, step), step
        said = [f"<b>{state}</b>, step {step} of {total or '…'}"]
        for column in ("loss", "rewards/margin", "kl/initial", "gold/reward"):
            said += [f"{column} {value:.2f}" for _, value in _measured(rows, column)[-1:]]
        said += [f"the reference moved {row['reference_updates']} times" for row in rows[-1:]]
        history = [f"from step {step}: " + (f"α {new.alpha:g}, τ {new.tau}" if new.alpha else "fixed")
                   for step, new in changes]
        lines = [said, [f"<b>{len(changes)} change{'s' * (len(changes) != 1)}</b>", *history[-6:]]]
        if state in ("stopped", "finished"):
            lines.append([f"the same again: <code>tr.replay({str(self.directory)!r}, output=…)</code>"])
        text = "<br>".join(" · ".join(parts) for parts in lines)
        self.status.value = f'<div style="line-height:1.5;color:{INK}">{text}</div>'


def _measured(rows: list[dict], column: str) -> list[tuple[int, float]]:
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]
