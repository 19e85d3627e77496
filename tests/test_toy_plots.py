"""toy_plots: lines and cells hold the numbers, colours their meaning, a jump ends at h = 0, no pyplot."""

from __future__ import annotations

import math
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from tralign_mini import toy, toy_plots
from tralign_mini.plot_style import COLORS, png
from tralign_mini.toy import Bandit, Tree, TrustRegion, grid, train

STEPS = 40


@pytest.fixture(scope="module")
def runs():
    return train(Bandit(coupling=0.5), grid(beta=1.0, seed=range(4)), steps=STEPS)


@pytest.fixture(scope="module")
def table():
    moving = [TrustRegion(alpha, tau) for alpha in (0.5, 1.0) for tau in (2, 10, 50)]
    references = [TrustRegion.fixed(), *moving]
    return train(Bandit(coupling=1.5), grid(references, beta=1.0, seed=range(4)), steps=STEPS)


def curve(ax, color):
    """The one line of this colour that has a point for every step."""
    [line] = [line for line in ax.lines
              if to_hex(line.get_color()) == color.lower() and len(line.get_xdata()) == STEPS + 1]
    return line.get_ydata()


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_mass_is_the_mean_over_seeds_in_a_panel_for_each_reference(runs):
    figure = toy_plots.mass(runs)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["fixed", "soft (α = 0.6, τ = 16)", "hard (τ = 32)"]
    for i, ax in enumerate(figure.axes):
        rows = slice(4 * i, 4 * i + 4)
        for quantity, (_, color, _) in toy_plots.MASSES.items():
            assert curve(ax, color) == pytest.approx(getattr(runs, quantity)[rows].mean(0).numpy())
    assert {"chosen", "rejected", "out of distribution"} <= set(texts(figure))


def test_a_band_is_the_interval_over_seeds(runs):
    ax = toy_plots.mass(runs).axes[2]
    band = ax.collections[list(toy_plots.MASSES).index("out")].get_paths()[0].vertices
    out = runs.out[8:, 17].numpy()
    half = 3.1824 * out.std(ddof=1) / 2  # Student's t with 3 degrees of freedom, over sqrt(4)
    heights = band[band[:, 0] == 17][:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((out.mean() - half, out.mean() + half), rel=1e-4)
    one_seed = train(Bandit(), grid(seed=1), steps=3)
    assert not toy_plots.mass(one_seed).axes[0].collections  # one seed has no spread


def test_curves_show_any_quantity_in_the_colours_of_the_references(runs):
    figure = toy_plots.curves(runs, *toy_plots.QUANTITIES)
    assert len(figure.axes) == len(toy_plots.QUANTITIES)
    for ax, quantity in zip(figure.axes, toy_plots.QUANTITIES):
        for i, kind in enumerate(("fixed", "soft", "hard")):
            values = getattr(runs, quantity)[4 * i : 4 * i + 4].mean(0).numpy()
            assert curve(ax, COLORS[kind]) == pytest.approx(values, abs=1e-9)
    assert curve(toy_plots.curves(runs, "margin").axes[0], COLORS["hard"])[32] == 0


def test_the_triangle_puts_a_policy_where_its_probabilities_say(runs):
    for i, (ax, kind) in enumerate(zip(toy_plots.simplex(runs).axes, ("fixed", "soft", "hard"))):
        paths = [line for line in ax.lines if len(line.get_xdata()) == STEPS + 1]
        assert len(paths) == 4 and {to_hex(line.get_color()) for line in paths} == {COLORS[kind].lower()}
        for seed, line in enumerate(paths):
            chosen, rejected, unseen = runs.policy[4 * i + seed].exp().numpy().T
            assert line.get_xdata() == pytest.approx(rejected + unseen / 2)
            assert line.get_ydata() == pytest.approx(unseen * math.sqrt(3) / 2)
        assert {"chosen", "rejected", "unseen"} <= {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("method, at_zero", [
    ("dpo", (math.log(2), -0.05, 0.0025)), ("ipo", (25, -10, 2)), ("kto", (0.5, -0.0125, 0))])
def test_a_hard_update_jumps_to_the_curve_at_zero(method, at_zero):
    figure = toy_plots.loss_shape(method, 0.1, margin=4.0)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Loss", "Gradient", "Curvature"]
    shape = toy.along_margin(method, torch.tensor(4.0, dtype=torch.float64), 0.1)
    for ax, value, before in zip(figure.axes, at_zero, shape):
        curve_x, curve_y = max((line.get_data() for line in ax.lines), key=lambda data: len(data[0]))
        assert np.interp(0, curve_x, curve_y) == pytest.approx(value, rel=1e-2, abs=1e-5)
        points = [line.get_xydata()[0].tolist() for line in ax.lines if len(line.get_xdata()) == 1]
        assert points == [pytest.approx([4, before.item()]), pytest.approx([0, value], abs=1e-9)]
        [arrow] = [text for text in ax.texts if text.arrow_patch is not None]
        assert [*arrow.xy] == points[1] and [*arrow.xyann] == points[0]
        low, high = ax.get_ylim()
        assert low < min(value, before) and max(value, before) < high


def test_without_a_margin_nothing_jumps():
    for ax in toy_plots.loss_shape("dpo", 0.1).axes:
        assert not ax.texts and not [line for line in ax.lines if len(line.get_xdata()) == 1]


def test_a_heat_map_holds_the_last_mean_of_each_alpha_and_tau(table):
    figure = toy_plots.heat_map(table)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "10", "50"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.5", "1"]
    means = table.out[:, -1].reshape(7, 4).mean(1)  # fixed, then alpha by tau
    cells = ax.collections[0].get_array().reshape(2, 3)
    assert np.asarray(cells) == pytest.approx(means[1:].reshape(2, 3).numpy())
    written = {(x.get_position(), x.get_text(), x.get_fontweight()) for x in ax.texts}
    assert ((0.5, 0.5), f"{means[1]:.2f}", "bold") in written
    assert ((2.5, 1.5), f"{means[0]:.2f}", "normal") in written  # tau 50 of 40 steps is fixed
    assert f"fixed: {means[0]:.2f}" in texts(figure)
    middle = ax.collections[0].cmap(ax.collections[0].norm(means[0].item()))[:3]
    assert middle == pytest.approx((0.97, 0.97, 0.97), abs=0.01)  # white: as the fixed reference


def test_an_incomplete_heat_map_leaves_cells_empty():
    references = [TrustRegion.fixed(), TrustRegion.soft(0.5, 2), TrustRegion.hard(3)]
    figure = toy_plots.heat_map(train(Bandit(), grid(references, seed=range(3)), steps=6))
    assert len(figure.axes[0].texts) == 2


def test_every_figure_is_drawn_for_both_problems(runs, table):
    tree = train(Tree(depth=3, pairs=1, sft_steps=5), grid(seed=[0]), steps=3)
    figures = [toy_plots.mass(runs), toy_plots.mass(tree), toy_plots.curves(tree, "out", "kl"),
               toy_plots.simplex(runs), toy_plots.loss_shape("ipo", 0.2, 1), toy_plots.heat_map(table, "kl")]
    for figure in figures:
        image = Image.open(BytesIO(png(figure, dpi=40)))
        assert image.width > 100 and len(image.convert("RGB").getcolors(100000)) > 20


@pytest.mark.parametrize("call, message", [
    (lambda: toy_plots.mass(train(Bandit(), grid(beta=[0.1, 1]), steps=2)), r"several beta \(0.1, 1\)"),
    (lambda: toy_plots.simplex(train(Tree(depth=2, pairs=1), grid(seed=0), steps=1)), "9 completions"),
    (lambda: toy_plots.heat_map(train(Bandit(), grid([TrustRegion.hard(1)]), steps=2)), "grid are hard, and"),
    (lambda: toy_plots.heat_map(train(Bandit(), grid([TrustRegion.fixed()]), steps=2)), "are fixed, and"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pyplot_is_never_loaded():
    code = "import sys, tralign_mini.toy_plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
