"""`tr.widgets.toy_explorer()`: the toy problems of `toy.py` under every alpha and tau.

All tau of one alpha are trained at once, in a thread: first the alpha of the slider, then a coarse map, then
the rest. What is trained is kept, so that a slider only looks it up.
"""

from __future__ import annotations

import time
from functools import lru_cache

import ipywidgets
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from scipy import stats

from .. import toy
from ..plot_style import COLORS, DASHES, INK, PALE, STEP, style_axes
from ..toy_plots import MASSES, QUANTITIES
from . import panel
from .panel import Panel, Picture, Worker, heading, region

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
COARSE = ALPHAS[::4]
TAUS = (1, 2, 4, 8, 16, 32, 64, 128)
SEEDS = range(8)


@lru_cache(maxsize=200)
def trained(problem: str, method: str, beta: float, alpha: float) -> dict[str, np.ndarray]:
    """Every tau of one alpha: quantity -> (taus, seeds, steps + 1); of alpha = 0, fixed, all are the same."""
    regime, taus = toy.REGIMES[problem], TAUS if alpha else TAUS[:1]
    table = toy.grid([region(alpha, tau) for tau in taus], beta=beta, seed=SEEDS)
    runs = toy.train(regime.problem, table, method=method, steps=regime.steps)
    columns = {name: getattr(runs, name).float().numpy() for name in QUANTITIES}
    return {name: values.reshape(len(taus), len(SEEDS), -1).repeat(len(TAUS) // len(taus), 0)
            for name, values in columns.items()}


def mean_and_half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds, the first dimension, and half of its 95 % interval."""
    seeds = len(values)
    return values.mean(0), stats.t.ppf(0.975, seeds - 1) * values.std(0, ddof=1) / np.sqrt(seeds)


class ToyExplorer(Panel):
    """Controls: problem, loss, shown, alpha, tau, beta. `bar`: how much of the map is trained."""

    def __init__(self, problem: str):
        regime = toy.REGIMES[problem]
        titles = [(title, name) for name, (title, _) in QUANTITIES.items()]
        look = panel.CONTROL
        names = list(toy.REGIMES)
        self.problem = ipywidgets.Dropdown(options=names, value=problem, description="problem", **look)
        self.shown = ipywidgets.Dropdown(options=titles, value="out", description="shown", **look)
        self.loss = panel.choice({method.upper(): method for method in toy.METHODS}, regime.method)
        self.alpha, self.tau = panel.alpha_slider(0.6), panel.tau_slider(16, TAUS)
        betas = {toy.REGIMES[name].beta for name in names}
        self.beta = panel.beta_slider(regime.beta, {*panel.BETAS, *betas})
        self.bar = ipywidgets.IntProgress(max=len(ALPHAS), description="map trained", **look)
        self.what = ipywidgets.HTML(f"<i>{regime.what}</i>")
        self._trained, self._map, self._closed = {}, (None, None), False
        self._trainer = Worker(self._train_next)
        self._make_figure()
        rows = [[self.problem, self.loss], [self.what], [self.alpha, self.tau], [self.beta, self.shown]]
        super().__init__([*rows, [self.bar]], [self.tau, self.shown])
        self.problem.observe(self._new_problem, "value")
        for control in (self.loss, self.beta, self.alpha):
            control.observe(lambda change: self._trainer.ask(), "value")
        self._trainer.ask()

    def wait(self, timeout: float | None = 60, alphas=()) -> bool:
        """Until the slider's alpha (and others) are trained and the picture shows it."""
        end = time.monotonic() + (timeout or 1e9)
        while not (self.error or {0.0, self._alpha(), *alphas} <= self._rows().keys()):
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        self._drawer.ask()
        return super().wait(timeout)

    def close(self) -> None:
        self._closed = True
        super().close()

    def _settle(self) -> None:
        self.wait(60, COARSE)  # to a reader without a kernel a map with gaps says little

    def _alpha(self) -> float:
        return round(self.alpha.value, 2)

    def _setting(self) -> tuple[str, str, float]:
        return self.problem.value, self.loss.value, self.beta.value

    def _rows(self) -> dict[float, dict]:
        """What is trained of the chosen problem, loss and beta: alpha -> quantities."""
        return self._trained.setdefault(self._setting(), {})

    def _new_problem(self, change) -> None:
        regime = toy.REGIMES[self.problem.value]
        self.what.value = f"<i>{regime.what}</i>"
        self.loss.value, self.beta.value = regime.method, regime.beta
        self._trainer.ask()

    def _train_next(self) -> None:
        """One more row of the map, the most wanted one."""
        setting, rows, now = self._setting(), self._rows(), self._alpha()
        missing = [alpha for alpha in ALPHAS if alpha not in rows]
        self.bar.value = len(rows)
        self._drawer.ask()
        if missing and not self._closed:
            with self.errors_shown("training"):
                alpha = min(missing, key=lambda one: (one != now, one > 0, one not in COARSE, abs(one - now)))
                rows[alpha] = trained(*setting, alpha)
                self._trainer.ask()

    def _make_figure(self) -> None:
        figure = Figure(figsize=(panel.WIDTH, 4.3), facecolor="white")
        figure.subplots_adjust(left=0.062, right=0.96, top=0.84, bottom=0.13, wspace=0.3)
        mass, course, chart = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
        style_axes(mass, "", STEP, "probability")
        style_axes(course, "", STEP, "")
        style_axes(chart, "", "τ: steps between updates", "α: weight of the policy")
        heading(mass, "Where the mass goes")
        mass.set(ylim=(-0.03, 1.4), yticks=[0, 0.25, 0.5, 0.75, 1])
        self.lines = {}
        for y, (name, (label, color, _)) in zip((0.95, 0.88, 0.81), MASSES.items()):
            mass.text(0.03, y, label, color=color, fontsize=12, fontweight="bold", va="center",
                      transform=mass.transAxes)
            self.lines[mass, name] = _curve(mass, color, color)
        self.lines[course, None] = _curve(course, INK, COLORS["fixed"])
        self.numbers = course.text(0, 1.03, "", transform=course.transAxes, fontsize=12.5, fontweight="bold")
        self.state = chart.text(0, 1.03, "", transform=chart.transAxes, fontsize=12, color=PALE)
        chart.grid(False)
        chart.set_xticks(range(len(TAUS)), TAUS)
        chart.set_yticks(range(0, len(ALPHAS), 4), COARSE)
        self.cells = chart.imshow(np.zeros((len(ALPHAS), len(TAUS))), "RdBu_r", CenteredNorm(0, 1),
                                  origin="lower", aspect="auto", interpolation="nearest")
        [self.here] = chart.plot([], [], marker="o", ms=13, mfc="none", mec=INK, mew=2.5)
        scale = ScalarMappable(CenteredNorm(0, 1), "RdBu_r")  # one that stays, with words for numbers
        bar = figure.colorbar(scale, ax=chart, pad=0.03, aspect=16)
        bar.outline.set_visible(False)
        bar.ax.set_yticks([-0.95, 0, 0.95], ["less", "fixed", "more"])
        bar.ax.tick_params(length=0, labelsize=11, labelcolor=INK)
        self.course, self.chart = course, chart
        lines = [part for parts in self.lines.values() for part in parts]
        self._picture = Picture(figure, [*lines, self.numbers, self.cells, self.here, self.state])

    def picture(self) -> bytes:
        rows, shown, alpha, tau = self._rows(), self.shown.value, self._alpha(), TAUS.index(self.tau.value)
        title, ylabel = QUANTITIES[shown]
        heading(self.course, title)
        heading(self.chart, f"{title} at the end")
        self.course.set_ylabel(ylabel)
        self.here.set_data([tau], [ALPHAS.index(alpha)])
        self.state.set_text("training …" if len(rows) < len(ALPHAS) else "")
        if not {alpha, 0.0} <= rows.keys():
            self.numbers.set_text("")
            return self._picture.png()
        kind = region(alpha, TAUS[tau]).kind
        for (ax, name), (band, line, still) in self.lines.items():
            values, fixed = (rows[row][name or shown][tau] for row in (alpha, 0.0))
            (mean, half), steps = mean_and_half(values), range(values.shape[1])
            band.set_data(steps, mean - half, mean + half)
            line.set_data(steps, mean)
            still.set_data(steps, fixed.mean(0))
            ax.set_xlim(0, steps[-1])
        band.set_facecolor(COLORS[kind])  # of the last one, the quantity shown
        line.set_color(COLORS[kind])
        apart, half = mean_and_half(values[:, -1] - fixed[:, -1])  # seed by seed
        text = f"{kind} − fixed: {apart:.2f} ± {half:.2f}".replace("-", "−") if alpha else "fixed"
        self.numbers.set(text=text, color=COLORS[kind])
        limits, ends = self._limits_and_ends(rows, shown)
        self.course.set_ylim(*limits)
        self.cells.set_data(ends)
        self.cells.set_clim(-max(np.abs(ends).max(), 0.02), max(np.abs(ends).max(), 0.02))
        return self._picture.png()

    def _limits_and_ends(self, rows: dict, shown: str) -> tuple[tuple, np.ndarray]:
        """Limits for all means over the steps; the last ones minus the fixed reference's, (alphas, taus)."""
        key = *self._setting(), shown, len(rows)
        if self._map[0] != key:
            known = np.array(sorted(rows))
            means = np.stack([rows[alpha][shown].mean(1) for alpha in known])
            nearest = np.abs(known[:, None] - ALPHAS).argmin(0)  # what is not trained looks like what is
            self._map = key, (panel.around(means.ravel()), (means[nearest] - means[0])[..., -1])
        return self._map[1]


def _curve(ax, color: str, fixed: str) -> tuple:
    """A band, a line and the fixed reference's dotted one."""
    band = ax.fill_between([0], [0], [0], color=color, alpha=0.18, lw=0)
    return band, *ax.plot([], [], color=color, lw=2.4), *ax.plot([], [], color=fixed, lw=1.6, ls=DASHES[2])


def toy_explorer(problem: str = "tree-helps") -> ToyExplorer:
    """Mass in and out of distribution under every alpha and tau, beside a fixed reference (dotted).

    problem: a name in `toy.REGIMES`. Lines are means over 8 seeds, bands 95 % intervals. On the map red is
    more than with a fixed reference, blue less; it fills while you read.
    """
    if problem not in toy.REGIMES:
        raise ValueError(f"problem = {problem!r} is none of the toy's: pass one of {', '.join(toy.REGIMES)}.")
    return ToyExplorer(problem)
