"""How figures look: colours with a meaning, axes, names at the ends of lines. `plots.py` has the figures."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

# Okabe and Ito's palette: told apart with the usual forms of colour blindness, and on a bad projector
COLORS = {"initial": "#767676", "fixed": "#0072B2", "soft": "#E69F00", "hard": "#009E73", "none": "#CC79A7"}
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))  # runs of one kind differ in the dash
MARKERS = "osD^"
INK, PALE, FAINT = "#333333", "#767676", "#E3E3E3"
LONGEST_LABEL = 28
STEP = "optimizer step"


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG file, as `ipywidgets.Image` takes it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)
    return figure


def style_axes(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=13.5, fontweight="bold", color=INK, pad=9)
    ax.set_xlabel(xlabel, fontsize=12, color=INK)
    ax.set_ylabel(ylabel, fontsize=12, color=INK)
    ax.tick_params(length=0, labelsize=11, labelcolor=INK, pad=5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#AAAAAA")
    ax.grid(True, axis="y", color=FAINT, lw=1)
    ax.set_axisbelow(True)
    ax.margins(x=0.02, y=0.08)
    round_steps = [1, 2, 2.5, 5, 10]
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=round_steps, integer=xlabel in ("", STEP)))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=round_steps))


def fit_steps(ax: Axes, history: pd.DataFrame) -> None:
    """From 0 to the last step, in every figure of a run alike."""
    last = history["step"].max()
    ax.set_xlim(-0.02 * last, 1.02 * last)


def label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names beside the right ends of the lines, pushed apart where they would overlap."""
    ends = sorted(ends)
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top)  # the heights hold for these limits
    rows = ax.get_subplotspec().get_gridspec().nrows
    height_in_points = ax.figure.get_figheight() * 72 / rows * 0.68  # of the axes, about
    apart = 15 / height_in_points * np.arange(len(ends))
    heights = np.array([(y - bottom) / (top - bottom) for y, _, _ in ends])
    heights = isotonic_regression(heights - apart).x + apart
    for height, (_, name, color) in zip(heights, ends, strict=True):
        look = {"color": color, "fontsize": 12, "fontweight": "bold", "va": "center"}
        ax.text(1.02, height, shortened(name), transform=ax.transAxes, **look)


def shortened(name: str) -> str:
    """A long name without its middle: a picture of names leaves no room for lines."""
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[:half]}…{name[1 - half :]}"


def initial_line(ax: Axes, initial_gold: float | None) -> None:
    if initial_gold is not None:
        ax.axhline(initial_gold, color=COLORS["initial"], lw=1.4, ls=DASHES[1], zorder=1)
        look = {"xytext": (-2, 4), "textcoords": "offset points", "ha": "right", "fontsize": 10.5}
        where = {"xy": (1, initial_gold), "xycoords": ax.get_yaxis_transform()}
        ax.annotate("initial policy", **where, **look, color=COLORS["initial"])


def say_missing(ax: Axes, what: str) -> None:
    ax.tick_params(labelleft=False)
    look = {"ha": "center", "va": "center", "fontsize": 12, "color": PALE}
    ax.text(0.5, 0.5, f"no {what} was measured", transform=ax.transAxes, **look)
