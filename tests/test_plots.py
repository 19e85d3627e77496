"""plots: lines hold the data, colours keep their meaning, gaps in the data are survived, no pyplot."""

from __future__ import annotations

import subprocess
import sys
import threading
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from tralign_mini import plots
from tralign_mini.overoptimization import Law
from tralign_mini.plot_style import COLORS, label_ends, new_figure, png, shortened, style_axes

FIGURES = (plots.training_curves, plots.kl_curves, plots.gold_curves, plots.overoptimization)


def history(steps=40, every=10, tau=8, **columns):
    """A run: evaluations every few steps only, the reference moves every tau steps."""
    step = np.arange(1, steps + 1)
    measured = step % every == 0
    table = pd.DataFrame({"step": step, "loss": 1 / step, "rewards/margin": step / 10,
                          "rewards/accuracy": 0.5 + step / 100, "logps/chosen": -20.0 - step,
                          "logps/rejected": -20.0 - 2 * step, "reference_updates": step // tau, "alpha": 0.6,
                          "kl/initial": np.where(measured, step / 10, np.nan),
                          "kl/reference": np.where(measured, step / 30, np.nan),
                          "gold/reward": np.where(measured, 1 + step / 50, np.nan)})
    return table.assign(**columns)


def several():
    kinds = {"a": "fixed", "b": "soft", "c": "hard", "d": "soft"}
    return pd.concat([history().assign(run=name, reference=kind) for name, kind in kinds.items()])


def lines(ax, color=None, minimum=2):
    """Data lines of an axes (not the helper lines, which span the axes)."""
    found = [line for line in ax.lines if len(line.get_xdata()) >= minimum
             and line.get_transform() == ax.transData]
    return [line for line in found if color is None or to_hex(line.get_color()) == color.lower()]


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def dotted(ax):
    return [line.get_xdata()[0] for line in ax.lines if to_hex(line.get_color()) == "#a8a8a8"]


def test_training_curves_hold_every_step():
    figure = plots.training_curves(history())
    by_title = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert list(by_title) == ["Loss", "Reward margin", "Reward accuracy",
                              "Log-probability of the completions"]
    thin = lines(by_title["Loss"])[0]
    assert thin.get_xdata().tolist() == list(range(1, 41))
    assert thin.get_ydata() == pytest.approx(1 / np.arange(1, 41))
    assert by_title["Reward accuracy"].get_ylim() == (-0.02, 1.02)
    assert {"chosen", "rejected"} <= {text.get_text()
                                      for text in by_title["Log-probability of the completions"].texts}
    assert all(ax.get_ylabel() for ax in figure.axes) and figure.axes[-1].get_xlabel() == "optimizer step"


def test_the_running_mean_by_hand_does_not_bridge_an_update():
    # 40 steps: window 2, a step and the one before it; the reference moves after step 20: 21 starts anew
    values = np.where(np.arange(1, 41) <= 20, 0.0, 10.0)
    figure = plots.training_curves(history(tau=20)[["step", "reference_updates"]].assign(loss=values))
    bold = lines(figure.axes[0])[1].get_ydata()
    assert bold.tolist() == values.tolist()
    bridged = plots.training_curves(history()[["step"]].assign(loss=values))
    assert lines(bridged.axes[0])[1].get_ydata()[20] == 5.0


def test_updates_of_the_reference_are_marked_where_they_happened():
    figure = plots.training_curves(history(tau=8))
    assert all(dotted(ax) == [8, 16, 24, 32, 40] for ax in figure.axes)
    assert "bold: mean over 2 steps · dotted: the reference moves" in texts(figure)


def test_many_updates_become_a_remark():
    figure = plots.training_curves(history(steps=100, tau=1))
    assert not any(dotted(ax) for ax in figure.axes)
    assert any("the reference moved 100 times" in text for text in texts(figure))


@pytest.mark.parametrize("columns, kind", [
    ({"reference_updates": 0}, "fixed"),
    ({}, "soft"),
    ({"alpha": 1.0}, "hard"),
    ({"reference": "none"}, "none"),
    ({"reference": "initial"}, "initial"),
])
def test_a_colour_means_a_kind_of_reference(columns, kind):
    for draw in FIGURES:
        ax = draw(history(**columns)).axes[0]
        assert lines(ax) and all(to_hex(line.get_color()) == COLORS[kind].lower() for line in lines(ax))


def test_colours_are_okabe_and_itos_and_differ():
    assert (COLORS["fixed"], COLORS["soft"], COLORS["hard"]) == ("#0072B2", "#E69F00", "#009E73")
    assert len(set(COLORS.values())) == len(COLORS)


def test_kl_curves_skip_steps_without_a_measurement():
    left, right = plots.kl_curves(history()).axes
    assert lines(left)[0].get_xdata().tolist() == [10, 20, 30, 40]
    assert lines(left)[0].get_ydata() == pytest.approx([1, 2, 3, 4])
    assert lines(right)[0].get_ydata() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert left.get_ylim() == right.get_ylim()


def test_kl_of_a_method_without_a_reference_is_one_panel():
    figure = plots.kl_curves(history().drop(columns=["kl/reference", "reference_updates"]))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["KL to the initial policy"]


def test_several_runs_are_named_and_told_apart():
    for draw in (plots.kl_curves, plots.gold_curves):
        ax = draw(several()).axes[0]
        assert {text.get_text() for text in ax.texts} >= {"a", "b", "c", "d"}
        assert [len(lines(ax, COLORS[kind])) for kind in ("fixed", "soft", "hard")] == [1, 2, 1]
        assert not dotted(ax)  # whose updates would they be?
    first, second = lines(plots.gold_curves(several()).axes[0], COLORS["soft"])
    assert first.get_linestyle() != second.get_linestyle() and first.get_marker() != second.get_marker()


def test_overoptimization_is_gold_against_the_square_root_of_kl():
    figure = plots.overoptimization(several(), initial_gold=0.5)
    path = lines(figure.axes[0], COLORS["fixed"], minimum=3)[0]
    assert path.get_xdata() == pytest.approx(np.sqrt([1, 2, 3, 4]))
    assert path.get_ydata() == pytest.approx([1.2, 1.4, 1.6, 1.8])
    start = lines(figure.axes[0], COLORS["fixed"])[0]
    assert list(start.get_xdata()) == [0, 1] and list(start.get_ydata()) == [0.5, pytest.approx(1.2)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c", "d"]


def test_a_negative_kl_estimate_is_drawn_at_zero():
    table = history()
    table.loc[9, "kl/initial"] = -0.02
    assert lines(plots.overoptimization(table).axes[0], minimum=3)[0].get_xdata()[0] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("table", [
    history().head(1), history().drop(columns="gold/reward"), history(steps=1, every=1),
    history()[["step", "loss"]], several().groupby("run").head(1),
    history(**{"rewards/margin": np.nan, "logps/rejected": np.nan}), history(**{"kl/initial": 0.0})])
def test_sparse_histories_are_drawn(table):
    before = table.copy()
    for draw in FIGURES:
        assert Image.open(BytesIO(png(draw(table), dpi=40))).width > 100
    pd.testing.assert_frame_equal(table, before)


def test_what_was_not_measured_is_left_out():
    plain = history()[["step", "loss"]]
    assert [ax.get_title(loc="left") for ax in plots.training_curves(plain).axes] == ["Loss"]


def test_kto_has_its_reference_point():
    figure = plots.training_curves(history(**{"kto/z0": 0.5}))
    assert "KTO reference point z0" in [ax.get_title(loc="left") for ax in figure.axes]


def test_labels_do_not_overlap_and_stay_near_their_lines():
    figure = new_figure(7, 4)
    ax = figure.subplots()
    style_axes(ax, "t", "x", "y")
    ax.set_ylim(0, 1)
    label_ends(ax, [(0.5, "b", "k"), (0.5, "a", "k"), (0.51, "c", "k"), (0.1, "d", "k")])
    figure.canvas.draw()
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heights["d"] == pytest.approx(0.1)
    assert np.mean([heights[name] for name in "abc"]) == pytest.approx(1.51 / 3)
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))


def test_long_names_lose_their_middle():
    assert shortened("little-tldr-dpo-soft") == "little-tldr-dpo-soft"
    short = shortened("little-tldr-dpo-soft-alpha-0.6-tau-16-seed-3")
    assert len(short) == 28 and short.startswith("little-tldr-dp") and short.endswith("au-16-seed-3")


def test_a_history_without_a_known_column_is_refused():
    with pytest.raises(ValueError, match="Its columns: step, speed"):
        plots.training_curves(pd.DataFrame({"step": [1], "speed": [2]}))


def test_figures_can_be_drawn_in_threads():
    table, images = several(), {}

    def draw(number):
        images[number] = png(plots.kl_curves(table), dpi=50)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(images.values())) == 1 and len(images) == 4


def test_frontiers_hold_runs_laws_and_ends():
    law, d = Law(1.0, 0.5), np.array([0.0, 0.5, 1.0, 2.0])
    tables = [pd.DataFrame({"run": f"{kind}{seed}", "reference": kind, "step": [0, 1, 2, 3],
                            "distance": d * far, "gold": 0.3 + seed / 10 + law(d * far)})
              for kind, far in (("soft", 1.0), ("fixed", 0.5)) for seed in (-1, 1)]
    figure = plots.frontiers({"DPO": pd.concat(tables), "one seed": pd.concat(tables[::2])}, columns=2)
    both, one = figure.axes
    assert both.get_title(loc="left") == "DPO" and both.get_xlabel() and both.get_ylabel() == "gold reward"
    for kind, far in (("soft", 2.0), ("fixed", 1.0)):
        drawn = lines(both, COLORS[kind])
        assert [len(line.get_xdata()) for line in drawn] == [4, 4, 100, 2]  # runs, law, interval
        x, y = drawn[2].get_data()
        assert x[-1] == far and y == pytest.approx(0.3 + law(x))
        high = 0.3 + law(far) + 12.7062 * 0.2 / 2  # t with one degree of freedom, values 0.2 apart
        assert drawn[3].get_ydata()[1] == pytest.approx(high, abs=1e-4)
        [end] = [line for line in both.lines if list(line.get_xdata()) == [far]]
        assert end.get_ydata() == pytest.approx([0.3 + law(far)])
    assert both.get_ylim()[1] < 2 < high  # a long interval does not squeeze the runs
    assert len(lines(one, COLORS["soft"])) == 3  # the interval of one run is NaN, so its line is empty
    assert [text.get_text() for text in figure.legends[0].texts] == ["fixed", "soft"]


def test_pyplot_is_never_loaded():
    code = "import sys, tralign_mini.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
