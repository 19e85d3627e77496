"""How figures look: colours with a meaning, axes, names at the ends of lines. `plots.py` has the figures."""

from __future__ import annotations

from io import BytesIO

import numpy as np
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
CURVES = {  # column of metrics.jsonl: title, label of the y axis
    "loss": ("Loss", "mean over the batch"),
    "rewards/margin": ("Reward margin", "chosen − rejected"),
    "rewards/accuracy": ("Reward accuracy", "share of pairs"),
    "logps/chosen": ("Log-probability of the completions", "nats"),
    "kto/z0": ("KTO reference point z0", "nats"),
    "reward/model": ("Reward of the samples", "reward model"),
    "kl/sequence": ("KL to the reference, before each step", "nats a completion"),
    "entropy": ("Entropy of the policy", "nats a token"),
    "gold/reward": ("True quality", "gold reward"),
    "kl/initial": ("KL to the initial policy", "nats a completion"),
    "kl/reference": ("KL to the reference", "nats a completion"),
}
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


def new_axes(count: int, width: float, height: float, columns: int = 99, **shared) -> tuple[Figure, list]:
    """A figure with `count` axes in rows of `columns`, each so wide and high in inches; and the axes."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for ax in axes[count:]:
        ax.remove()
    return figure, list(axes[:count])


def style_axes(ax: Axes, title: str, xlabel: str, ylabel: str, color: str = INK, pad: float = 9) -> None:
    ax.set_title(title, loc="left", fontsize=13.5, fontweight="bold", color=color, pad=pad)
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
        look = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
        ax.annotate("initial policy", (1, initial_gold), (-2, 4), fontsize=10.5, color=PALE, **look)


def add_legend(figure: Figure, where: str) -> None:
    """Of all labels in the figure, each once."""
    found = {handle.get_label(): handle for ax in figure.axes for handle in ax.get_legend_handles_labels()[0]}
    columns = 4 if max(map(len, found), default=0) <= 12 else 2
    look = {"frameon": False, "fontsize": 12, "labelcolor": INK, "handlelength": 2.6}
    figure.legend(handles=list(found.values()), loc=where, ncols=columns, **look)


def small_print(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.99, ha="right", fontsize=10.5, color=PALE)
