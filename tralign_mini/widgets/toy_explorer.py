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

from .. import toy
from ..plot_style import COLORS, DASHES, INK, STEP, style_axes
from ..toy_plots import MASSES, QUANTITIES, draw_band, mean_and_half
from . import panel
from .panel import CONTROL, Panel, Worker, region

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


class ToyExplorer(Panel):
    """Mass in and out of distribution under every alpha and tau, beside a fixed reference (dotted).

    problem: a name in `toy.REGIMES`. Lines are means over 8 seeds, bands 95 % intervals. On the map red is
    more than with a fixed reference, blue less; it fills while you read. Controls: problem, loss, shown,
    alpha, tau, beta; `bar`: how much of the map is trained.
    """

    def __init__(self, problem: str = "tree-helps"):
        if problem not in toy.REGIMES:
            names = ", ".join(toy.REGIMES)
            raise ValueError(f"problem = {problem!r} is none of the toy's: pass one of {names}.")
        regime, self._trained, self._closed = toy.REGIMES[problem], {}, False
        titles = [(title, name) for name, (title, _) in QUANTITIES.items()]
        menu, betas = ipywidgets.Dropdown, {regime.beta for regime in toy.REGIMES.values()}
        self.problem = menu(options=list(toy.REGIMES), value=problem, description="problem", **CONTROL)
        self.shown = menu(options=titles, value="out", description="shown", **CONTROL)
        self.loss = panel.choice({method.upper(): method for method in toy.METHODS}, regime.method)
        self.alpha, self.tau = panel.alpha_slider(0.6), panel.tau_slider(16, TAUS)
        self.beta = panel.beta_slider(regime.beta, betas.union(panel.BETAS))
        self.bar = ipywidgets.IntProgress(max=len(ALPHAS), description="map trained", **CONTROL)
        self.what = ipywidgets.HTML(f"<i>{regime.what}</i>")
        self._trainer = Worker(self._train_next)
        rows = [[self.problem, self.loss], [self.what], [self.alpha, self.tau], [self.beta, self.shown]]
        super().__init__([*rows, [self.bar]], [self.tau, self.shown], self._figure())
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

    def _figure(self) -> Figure:
        figure = Figure(figsize=(panel.WIDTH, 4.3), facecolor="white")
        figure.subplots_adjust(left=0.062, right=0.96, top=0.84, bottom=0.13, wspace=0.3)
        self.axes = mass, course, chart = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
        style_axes(mass, "Where the mass goes", STEP, "probability", pad=30)
        mass.set(ylim=(-0.03, 1.4), yticks=[0, 0.25, 0.5, 0.75, 1])
        for y, (label, color, _) in zip((0.95, 0.88, 0.81), MASSES.values()):
            look = {"fontsize": 12, "fontweight": "bold", "va": "center"}
            mass.text(0.03, y, label, color=color, transform=mass.transAxes, **look)
        bar = figure.colorbar(ScalarMappable(CenteredNorm(0, 1), "RdBu_r"), ax=chart, pad=0.03, aspect=16)
        bar.outline.set_visible(False)
        bar.ax.set_yticks([-0.95, 0, 0.95], ["less", "fixed", "more"])
        bar.ax.tick_params(length=0, labelsize=11, labelcolor=INK)
        return figure

    def draw(self) -> None:
        rows, shown, alpha, tau = self._rows(), self.shown.value, self._alpha(), TAUS.index(self.tau.value)
        mass, course, chart = self.axes
        title, ylabel = QUANTITIES[shown]
        style_axes(course, title, STEP, ylabel, pad=30)
        style_axes(chart, f"{title} at the end", panel.TAU, panel.ALPHA, pad=30)
        chart.grid(False)
        chart.set(xlim=(-0.5, len(TAUS) - 0.5), ylim=(-0.5, len(ALPHAS) - 0.5))
        chart.set_xticks(range(len(TAUS)), TAUS)
        chart.set_yticks(range(0, len(ALPHAS), 4), COARSE)
        chart.plot(tau, ALPHAS.index(alpha), marker="o", ms=13, mfc="none", mec=INK, mew=2.5)
        if not {alpha, 0.0} <= rows.keys():
            return
        kind = region(alpha, TAUS[tau]).kind
        lines = [(mass, name, color, color) for name, (_, color, _) in MASSES.items()]
        for ax, name, color, fixed_color in (*lines, (course, shown, COLORS[kind], COLORS["fixed"])):
            values, fixed = (rows[row][name][tau] for row in (alpha, 0.0))
            draw_band(ax, values, color)
            ax.plot(fixed.mean(0), color=fixed_color, lw=1.6, ls=DASHES[2])
            ax.set_xlim(0, fixed.shape[1] - 1)
        apart, half = mean_and_half(values[:, -1] - fixed[:, -1])  # of the quantity shown, seed by seed
        text = f"{kind} − fixed: {apart:.2f} ± {half:.2f}".replace("-", "−") if alpha else "fixed"
        look = {"color": COLORS[kind], "fontsize": 12.5, "fontweight": "bold"}
        course.text(0, 1.03, text, transform=course.transAxes, **look)
        known = np.array(sorted(rows))
        means = np.stack([rows[alpha][shown].mean(1) for alpha in known])  # (known, taus, steps + 1)
        course.set_ylim(*panel.around(means.ravel()))
        nearest = np.abs(known[:, None] - ALPHAS).argmin(0)  # what is not trained looks like what is
        ends = (means[nearest] - means[0])[..., -1]
        chart.imshow(ends, "RdBu_r", CenteredNorm(0, max(np.abs(ends).max(), 0.02)), origin="lower",
                     aspect="auto", interpolation="nearest")
