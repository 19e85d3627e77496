"""The panels without a browser: what they draw, the newest value wins, errors are seen, and a live run."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import logps_by_hand, metrics, tiny_run
from test_report import write_run

import tralign_mini as tr
from tralign_mini import toy
from tralign_mini.changes import read_changes
from tralign_mini.overoptimization import Law, law_through
from tralign_mini.plot_style import new_figure
from tralign_mini.widgets import (
    live_run,
    loss_explorer,
    playground,
    reference_explorer,
    runs_explorer,
    toy_explorer,
)
from tralign_mini.widgets import panel as shared
from tralign_mini.widgets.loss_explorer import UNITS, jump
from tralign_mini.widgets.reference_explorer import PAIRS, RATE, gradient, walk
from tralign_mini.widgets.runs_explorer import course, find_runs
from tralign_mini.widgets.toy_explorer import ALPHAS, TAUS, mean_and_half, trained
from tralign_mini.worlds import grid_directory

LIVE = sys.modules["tralign_mini.widgets.live_run"]  # the file; by this name the package has the function
WIDGET = "application/vnd.jupyter.widget-view+json"


def until(there, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def pictured(panel) -> bytes:
    """The picture once it is up to date."""
    assert panel.wait(60)
    assert panel.error is None, panel.error
    picture = bytes(panel.image.value)
    assert picture.startswith(b"\x89PNG")
    return picture


def change(panel, control, value) -> None:
    """Move a control; the picture changes, and back again to the byte: it depends on the values alone."""
    first, old = pictured(panel), control.value
    control.value = value
    assert pictured(panel) != first, control.description
    control.value = old
    assert pictured(panel) == first


def seconds_of_a_picture(panel) -> float:
    """Of this thread's own time, so that other processes do not count; the best of some."""
    pictured(panel)
    taken = []
    for _ in range(5):
        start = time.thread_time()
        panel.picture()
        taken.append(time.thread_time() - start)
    return min(taken)


# What the panels share.


def test_ipywidgets_is_loaded_on_use_and_its_absence_is_explained():
    code = "import sys, tralign_mini as tr; assert 'ipywidgets' not in sys.modules; {}; tr.widgets.live_run"
    subprocess.run([sys.executable, "-c", code.format("pass")], check=True)
    code = code.format("sys.modules['ipywidgets'] = None")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "pip install 'ipywidgets" in result.stderr.splitlines()[-1]
    assert "widgets" in dir(tr)


def test_of_many_requests_the_newest_wins():
    seen, value = [], 0

    def work():
        seen.append(value)
        time.sleep(0.05)

    worker = shared.Worker(work)
    for value in range(1, 200):  # noqa: B007
        worker.ask()
        time.sleep(0.0005)
    assert worker.wait(5)
    assert seen[-1] == 199 and seen == sorted(seen) and len(seen) < 100
    worker.ask()  # after a rest
    assert worker.wait(5) and seen[-2:] == [199, 199]


def test_waiting_has_an_end():
    gate = threading.Event()
    worker = shared.Worker(lambda: gate.wait(10))
    worker.ask()
    assert not worker.wait(0.05)
    gate.set()
    assert worker.wait(5)


def test_only_what_moves_is_drawn_again_and_it_looks_the_same(monkeypatch):
    figure = new_figure(3, 2)
    ax = figure.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    kept = ax.axvline(0.5)
    picture = shared.Picture(figure)
    [line] = ax.plot([0, 1], [0, 1])
    whole, drawn = [], picture._canvas.draw
    monkeypatch.setattr(picture._canvas, "draw", lambda: (whole.append(1), drawn()))
    first = picture.png()
    line.set_ydata([1, 0])
    second = picture.png()
    assert second != first and len(whole) == 1
    picture._look = None  # all over again
    assert picture.png() == second and len(whole) == 2
    line.set_ydata([0, 1])
    assert picture.png() == first and len(whole) == 2
    ax.set_ylim(0, 2)
    assert picture.png() != first and len(whole) == 3
    picture.clear()
    assert list(ax.lines) == [kept]


def test_errors_are_shown_until_it_works_again():
    panel = loss_explorer()
    pictured(panel)
    good, panel.picture = panel.picture, lambda: 1 / 0
    panel.beta.value = 0.5
    panel.wait()
    assert "ZeroDivisionError: division by zero" in panel.message.value
    with panel.errors_shown("training"):
        raise ValueError("a < b")
    assert "ZeroDivisionError" in panel.message.value and "ValueError: a &lt; b" in panel.message.value
    panel.picture = good
    panel.beta.value = 0.2
    panel.wait()
    assert "ZeroDivisionError" not in panel.message.value and "ValueError" in panel.message.value
    with panel.errors_shown("training"):
        pass
    assert panel.message.value == "" and panel.error is None


def test_a_panel_leaves_a_picture_for_readers_without_a_kernel():
    import nbformat.v4 as nb
    from nbconvert import HTMLExporter

    panel = loss_explorer()
    panel.margin.value = 12
    bundle = panel._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == panel.model_id
    assert base64.b64decode(bundle["image/png"]) == pictured(panel)
    cell = nb.new_code_cell("", outputs=[nb.new_output("display_data", data=bundle)])
    page, _ = HTMLExporter().from_notebook_node(nb.new_notebook(cells=[cell]))
    assert page.count(bundle["image/png"][:200]) == 1


@pytest.mark.parametrize("alpha, tau, kind", [(0.0, 8, "fixed"), (0.05 * 3, 8, "soft"), (1.0, 8, "hard")])
def test_two_sliders_make_a_trust_region(alpha, tau, kind):
    region = shared.region(alpha, tau)
    assert region.kind == kind and region.alpha in (None, 0.15, 1.0) and region.tau == (8 if alpha else None)


def test_limits_are_round_and_enclose():
    assert shared.around([0.31, 0.68]) == pytest.approx((0.3, 0.7))
    low, high = shared.around([2.0, 2.0])
    assert low < 2 < high


# The loss.

ZERO = torch.tensor(0.0, dtype=torch.float64)


def test_the_curves_at_a_margin_of_zero():
    by_hand = {"dpo": (np.log(2), -0.3 / 2, 0.3**2 / 4), "kto": (0.5, -0.3 / 8, 0),
               "ipo": (1 / (4 * 0.3**2), -1 / 0.3, 2)}
    for method, expected in by_hand.items():
        found = [values.item() for values in toy.along_margin(method, ZERO, 0.3)]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", UNITS)
def test_the_named_heights_hold_for_every_beta(method):
    for beta in (0.01, 0.1, 2.0):
        at_zero = toy.along_margin(method, ZERO, beta)
        for values, (power, (low, high), ticks) in zip(at_zero, UNITS[method]):
            assert low < values / beta**power < high
            assert min(abs(values / beta**power - tick) for tick in ticks) < 1e-9  # named on the axis


def test_an_update_is_a_jump():
    assert jump(30, 1.0) == [30, 0] and jump(30, 0.0) == [30, 30] and jump(30, 0.25) == [30, 22.5]
    panel = loss_explorer()
    panel.margin.value, panel.beta.value = 20, 0.1
    pictured(panel)
    ax = panel.axes[1]  # of the gradient
    [arrow, text], [*_, before, after] = ax.texts, ax.lines
    assert text.get_text() == "−0.0119 → −0.05"  # -beta sigmoid(-beta h), then -beta / 2
    assert before.get_xydata()[0] == pytest.approx([20, -1 / (1 + np.exp(2))])  # in units of beta
    assert after.get_xydata()[0] == pytest.approx([0, -0.5])
    assert arrow.arrow_patch.get_visible()
    panel.alpha.value = 0.0
    pictured(panel)
    [text] = ax.texts  # and no arrow
    assert text.get_text() == "−0.0119 → −0.0119"


def test_controls_of_the_loss():
    panel = loss_explorer()
    for control, value in ((panel.beta, 0.5), (panel.margin, 3), (panel.alpha, 0.4), (panel.loss, "kto")):
        change(panel, control, value)
    assert seconds_of_a_picture(panel) < 0.1


# The plane.


def test_a_walk_by_hand():
    way = walk(tr.TrustRegion.soft(0.5, 2), 0.1, steps=3)
    policy, reference = np.zeros(2), np.zeros(2)
    for step in (1, 2, 3):
        h = PAIRS @ (policy - reference)
        slope = sum(-0.1 / (1 + np.exp(0.1 * one)) * pair for one, pair in zip(h, PAIRS)) / len(PAIRS)
        policy = policy - RATE / 0.1 * slope
        if step == 2:
            reference = 0.5 * policy
        assert way.policy[step] == pytest.approx(policy) and way.reference[step] == pytest.approx(reference)
    assert way.margin[3] == pytest.approx((PAIRS @ (policy - reference)).mean())


def test_its_gradient_is_that_of_the_packages_dpo_loss():
    policy = torch.tensor([1.0, 2.0], requires_grad=True)
    chosen, zeros = torch.tensor(PAIRS, dtype=torch.float32) @ policy, torch.zeros(len(PAIRS))
    tr.dpo_loss(chosen, zeros, zeros, zeros, beta=0.3).losses.mean().backward()
    assert gradient(np.array([1.0, 2.0]), np.zeros(2), 0.3) == pytest.approx(policy.grad.numpy(), rel=1e-5)


def test_references_in_the_plane():
    fixed, late = walk(tr.TrustRegion.fixed(), 0.1), walk(tr.TrustRegion.hard(1000), 0.1)
    assert np.array_equal(fixed.policy, late.policy)  # tau beyond the last step
    always = walk(tr.TrustRegion.hard(1), 0.1)
    assert not always.margin.any() and np.ptp(always.pull) < 1e-12
    assert always.policy[-1, 0] > 3 * fixed.policy[-1, 0]
    hard = walk(tr.TrustRegion.hard(32), 0.1)
    assert hard.margin[32] == 0 and hard.pull[32] == pytest.approx(hard.pull[0]) and hard.margin[31] > 1


def test_controls_of_the_plane():
    panel = reference_explorer()
    for control, value in ((panel.alpha, 1.0), (panel.tau, 8), (panel.beta, 1.0)):
        change(panel, control, value)
    assert seconds_of_a_picture(panel) < 0.1


# The toy.


@pytest.fixture
def small_toy(monkeypatch):
    """A toy whose whole map is trained in a second."""
    regimes = {"small": toy.Regime(toy.Bandit(coupling=1.2), 1.0, "small steps", steps=40),
               "other": toy.Regime(toy.Bandit(), 0.5, "another", method="ipo", steps=30)}
    for name, regime in regimes.items():
        monkeypatch.setitem(toy.REGIMES, name, regime)
    trained.cache_clear()
    yield
    trained.cache_clear()


def test_a_row_of_the_map_is_what_the_toy_trains(small_toy):
    row = trained("small", "kto", 0.5, 0.6)
    one = toy.grid([tr.TrustRegion(0.6, 4)], beta=0.5, seed=3)
    alone = toy.train(toy.Bandit(coupling=1.2), one, method="kto", steps=40)
    assert row["out"].shape == (len(TAUS), 8, 41)
    for name, values in row.items():
        assert values[TAUS.index(4), 3] == pytest.approx(getattr(alone, name)[0].numpy(), abs=1e-6)
    fixed = trained("small", "kto", 0.5, 0.0)
    assert (fixed["kl"] == fixed["kl"][:1]).all()  # of every tau


def test_mean_and_interval():
    mean, half = mean_and_half(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert mean == pytest.approx([2, 5]) and half == pytest.approx([4.302653 / 3**0.5, 0])  # t, 2 degrees


def test_controls_and_map_of_the_toy(small_toy):
    panel = toy_explorer("small")
    assert panel.wait(60, ALPHAS)
    until(lambda: panel.bar.value == len(ALPHAS))
    for control, value in ((panel.alpha, 1.0), (panel.tau, 2), (panel.shown, "kl")):
        change(panel, control, value)
    assert seconds_of_a_picture(panel) < 0.1
    [image] = panel.axes[2].images
    cells = np.asarray(image.get_array())
    assert cells.shape == (len(ALPHAS), len(TAUS)) and not cells[0].any()  # alpha = 0 is the fixed reference
    ends, fixed = (trained("small", "dpo", 1.0, alpha)["out"][:, :, -1].mean(1) for alpha in (0.6, 0.0))
    assert cells[ALPHAS.index(0.6)] == pytest.approx(ends - fixed, abs=1e-6)
    panel.problem.value = "other"
    assert (panel.loss.value, panel.beta.value) == ("ipo", 0.5) and "another" in panel.what.value
    pictured(panel)
    assert panel._rows().keys() >= {0.0, 0.6}
    panel.close()


def test_the_sliders_alpha_is_trained_first_and_a_closed_panel_rests(small_toy):
    panel = toy_explorer("small")
    panel.alpha.value = 0.95
    panel.close()
    panel._trainer.wait(10)
    assert len(panel._rows()) < len(ALPHAS)
    panel._closed = False
    panel._trainer.ask()
    assert panel.wait(30)
    assert 0.95 in panel._rows()
    panel.close()


def test_a_toy_that_fails_says_so(small_toy, monkeypatch):
    monkeypatch.setattr(toy, "train", lambda *arguments, **options: 1 / 0)
    panel = toy_explorer("small")
    until(lambda: "ZeroDivisionError" in panel.message.value)
    assert panel.wait(5)
    with pytest.raises(ValueError, match="pass one of .*tree-helps"):
        toy_explorer("nothing")


# Finished runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Fixed and soft with two seeds each, one of another beta, and a folder that is no run yet."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, gain in ((1, 1.0), (2, 2.0)):
        write_run(folder / f"fixed-{seed}", seed=seed, gain=gain, beta=0.1)
        soft = {"reference": "soft", "alpha": 0.6, "tau": 4}
        write_run(folder / "deeper" / f"soft-{seed}", seed=seed, gain=gain, beta=0.1, **soft)
    write_run(folder / "hard", seed=1, beta=0.5, reference="hard", tau=10)
    write_run(folder / "begun", seed=1)
    (folder / "begun" / "metrics.jsonl").write_text("")
    return folder


def test_runs_are_found(runs, tmp_path):
    table, left_out = find_runs(runs)
    assert sorted(table["kind"]) == ["fixed", "fixed", "hard", "soft", "soft"] and left_out == ["begun"]
    assert table["initial_gold"].tolist() == pytest.approx([0.35] * 5)
    panel = runs_explorer(runs)
    assert "begun" in panel.message.value
    assert {name: box.value for name, box in panel.filters.items()} == {
        "method": ("DPO",), "alpha": (0.6, 1.0, None), "tau": (4, 10, None), "beta": (0.1, 0.5),
        "seed": (1, 2)}
    with pytest.raises(ValueError, match="There is no run below"):
        runs_explorer(tmp_path)


def test_curves_of_a_run(runs):
    table, _ = find_runs(runs)
    record = next(record for record in table["record"] if record.directory.name == "hard")
    steps, values = course(record, "kl/initial")
    assert steps.tolist() == [5, 10, 15, 20] and values == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert len(course(record, "nothing")[0]) == 0


def test_the_law_through_a_group_of_runs():
    by_hand = Law(1.0, 0.5)
    d = np.array([0, 0.5, 1.0, 2.0])
    without_start = d[1:], d[1:]
    x, y = law_through([(d, 0.2 + by_hand(d)), (d, 0.4 + by_hand(d)), without_start])
    assert x[0] == 0 and x[-1] == 2 and y == pytest.approx(0.3 + by_hand(x))
    assert law_through([(d[:3], d[:3])]) is None and law_through([]) is None


def test_the_axes_follow_the_selected_runs(runs):
    panel = runs_explorer(runs)
    panel.shown.value = "kl/initial"
    pictured(panel)
    assert panel.axes[0].get_ylim()[1] >= 4  # the gain of seed 2 is 2
    panel.filters["seed"].value = (1,)
    pictured(panel)
    assert 2 <= panel.axes[0].get_ylim()[1] < 4


def test_the_shipped_grid_is_shown_by_default():
    panel = runs_explorer()
    pictured(panel)
    assert len(panel.runs) == len(list(grid_directory().iterdir())) - 1  # README.md
    assert "epochs" in panel.filters and not panel.message.value
    assert seconds_of_a_picture(panel) < 0.15
    panel.filters["epochs"].value, panel.filters["method"].value = (4.0,), ("DPO",)
    pictured(panel)
    assert all(" β " in name for name in panel.groups())


def test_filters_and_groups_of_runs(runs):
    panel = runs_explorer(runs)
    first = pictured(panel)
    names = {name: len(rows) for name, rows in panel.groups().items()}
    assert names == {"fixed β 0.1": 2, "soft β 0.1": 2, "hard β 0.5": 1}  # seeds are one group
    panel.filters["beta"].value = (0.1,)
    assert pictured(panel) != first
    assert len(panel.selected()) == 4 and list(panel.groups()) == ["fixed", "soft"]
    panel.filters["alpha"].value = (None,)
    panel.filters["seed"].value = (2,)
    assert panel.selected()["record"].iloc[0].directory.name == "fixed-2" and len(panel.selected()) == 1
    panel.filters["alpha"].value = ()
    pictured(panel)  # nothing is left, and that is no error
    change(panel, panel.shown, "rewards/margin")
    assert seconds_of_a_picture(panel) < 0.2


def test_runs_that_differ_in_more_than_the_seed_are_no_seeds_of_each_other(tmp_path):
    different = {"learning_rate": 2e-5, "batch_size": 8, "train_pairs": 40}
    write_run(tmp_path / "first", seed=1)
    write_run(tmp_path / "second", seed=2)
    for name, value in different.items():
        write_run(tmp_path / name, seed=1, **{name: value})
    panel = runs_explorer(tmp_path)
    assert not different.keys() & panel.filters.keys()
    groups = panel.groups()
    runs = [[record.directory.name for record in rows["record"]] for rows in groups.values()]
    assert sorted(runs) == [["batch_size"], ["first", "second"], ["learning_rate"], ["train_pairs"]]
    assert sum("rate 2e-05" in name for name in groups) == 1


# The playground.


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tr.Run, "report", lambda self: None)
        for name, settings in (("dpo", {}), ("tr-dpo", {"reference": "soft", "alpha": 0.6, "tau": 1})):
            settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.02, **settings}
            tr.train(tiny_run(folder, output=str(folder / name), **settings))
    return folder


def test_answers_and_their_log_ratios(two_runs):
    panel = playground([two_runs / "dpo", two_runs / "tr-dpo"])
    pictured(panel)
    panel.prompt.value = "w5 w6 w7"
    panel.button.click()
    pictured(panel)
    assert list(panel.answers) == ["SFT", "dpo", "tr-dpo"]
    run = tr.Run(two_runs / "dpo")
    how = {"seed": 0, "max_prompt_tokens": 16, "max_completion_tokens": 8}
    samples = tr.sample(run.policy, run.tokenizer, ["w5 w6 w7"], **how)
    assert panel.answers["dpo"]["text"] == samples.texts[0].strip()
    from tralign_mini.models import load_base

    initial = load_base(run.recipe.model, torch.float32).eval()
    ratio = logps_by_hand(run.policy, samples.sequences) - logps_by_hand(initial, samples.sequences)
    assert panel.answers["dpo"]["log_ratios"]["dpo"] == pytest.approx(ratio.item(), abs=1e-4)
    assert abs(ratio) > 0.1 and panel.answers["dpo"]["gold"] is None


def test_controls_of_the_playground(two_runs):
    panel = playground({"DPO": two_runs / "dpo"})
    pictured(panel)
    change(panel, panel.seed, 3)
    steps = [label for label, _ in panel.checkpoints["DPO"].options]
    assert steps == ["checkpoint-2", "checkpoint-4"]
    change(panel, panel.checkpoints["DPO"], panel.checkpoints["DPO"].options[0][1])
    panel.temperature.value = 0.0
    pictured(panel)
    greedy = panel.answers["SFT"]["text"]
    panel.seed.value = 7
    pictured(panel)
    assert panel.answers["SFT"]["text"] == greedy
    panel.prompt.value = " "
    panel.button.click()
    panel.wait()
    assert "The prompt is empty" in panel.message.value
    before = bytes(panel.image.value)
    panel.example.value = panel.example.options[1][1]
    assert pictured(panel) != before and panel.prompt.value == panel.example.value


def test_what_the_playground_refuses(two_runs, tmp_path):
    with pytest.raises(ValueError, match="no run to ask"):
        playground([])
    write_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        playground(tmp_path / "empty")
    with pytest.raises(ValueError, match="different models"):
        playground([two_runs / "dpo", tmp_path / "empty"])


def test_answers_in_an_embedded_world_have_a_gold_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(tr.Run, "report", lambda self: None)
    small = {"max_steps": 1, "batch_size": 4, "eval_prompts": 2, "warmup_steps": 0}
    panel = playground(tr.train("little-tldr", reference="fixed", output=str(tmp_path / "run"), **small))
    pictured(panel)
    answer = panel.answers["SFT"]
    assert answer["gold"] == tr.gold_reward("little-tldr", [panel.prompt.value], [answer["text"]])[0]


# A live run.


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(tr.Run, "report", lambda self: None)
    monkeypatch.setattr(LIVE, "BETWEEN_PICTURES", 0.01)
    monkeypatch.setattr(LIVE, "WIDTH", 4)  # smaller pictures are drawn sooner
    steps = {"max_steps": 50, "eval_steps": 10, "save_steps": 100}
    return tiny_run(tmp_path, pairs=400, reference="soft", alpha=0.6, tau=4, **steps)


def test_a_run_is_steered_paused_stopped_resumed_and_replayed(settings, tmp_path):
    panel = live_run(settings)
    empty = pictured(panel)
    assert (panel.state, panel.alpha.value, panel.tau.value) == ("ready", 0.6, 4)
    assert panel.start_button.description == "Start" and panel.stop_button.disabled
    panel.start_button.click()
    until(lambda: len(panel.rows()) >= 2)
    panel.alpha.value = 1.0  # while it runs
    until(lambda: (tmp_path / "run" / "changes.jsonl").exists())
    panel.pause_button.click()
    assert panel.state == "paused"
    time.sleep(0.5)  # the step that was being done
    done = len(panel.rows())
    time.sleep(0.5)
    assert len(panel.rows()) == done < 50  # no step passes
    panel.tau.value, panel.alpha.value = 2, 0.3
    panel._drawer.wait(5)
    assert panel.start_button.description == "Resume" and not panel.start_button.disabled
    panel.start_button.click()
    until(lambda: len(panel.rows()) >= done + 3)
    panel.stop_button.click()
    assert panel.wait() and panel.state == "stopped" and panel.error is None
    stopped = len(panel.rows())
    assert stopped < 50 and f"step {stopped} of 50" in panel.status.value

    again = live_run(settings)  # in another session
    assert (again.state, again.alpha.value, again.tau.value) == ("stopped", 0.3, 2)
    again.alpha.value = 0.0  # fixed from here
    again.start()
    assert again.wait() and again.state == "finished" and again.error is None
    assert pictured(again) != empty and again.bar.value == again.bar.max == 50 and again.start_button.disabled
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 51))
    changes = read_changes(tmp_path / "run")
    assert [region for _, region in changes] == [
        tr.TrustRegion.hard(4), tr.TrustRegion(0.3, 2), tr.TrustRegion.fixed()]
    assert [step for step, _ in changes][1:] == [done + 1, stopped + 1]
    for step, region in changes:
        assert (rows[step - 1]["alpha"], rows[step - 1]["tau"]) == (region.alpha, region.tau)
    replay = tr.replay(tmp_path / "run", tmp_path / "replay")
    assert metrics(replay.directory) == rows
    assert live_run(settings).state == "finished"


def test_what_a_live_run_draws(settings, tmp_path):
    panel = live_run(settings, max_steps=20)
    panel.start()
    assert panel.wait() and panel.state == "finished"
    rows = metrics(tmp_path / "run")
    loss, _, kl, gold = panel.axes
    assert loss.lines[0].get_xydata().tolist() == [[row["step"], row["loss"]] for row in rows]
    assert list(kl.lines[0].get_xdata()) == [10, 20] and not len(gold.lines[0].get_xdata())
    kinds, moves = loss.collections
    assert kinds.get_segments()[0].tolist() == [[0, 0.985], [20, 0.985]]  # soft, all the way
    assert [segment[0, 0] for segment in moves.get_segments()] == [4, 8, 12, 16, 20]


def test_a_live_run_that_fails_shows_why(settings):
    panel = live_run(settings, max_completion_tokens=500)
    panel.start()
    assert panel.wait() and panel.state == "failed"
    assert "positions" in panel.message.value and isinstance(panel.error, ValueError)
    assert not panel.start_button.disabled


def test_what_a_live_run_refuses(settings):
    with pytest.raises(ValueError, match="method=simpo has no reference"):
        live_run("little-tldr", method="simpo")
    with pytest.raises(ValueError, match="alpha"):
        live_run(settings, alpha=2.0)


def test_the_picture_that_stays_is_that_of_the_end(settings, monkeypatch):
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(bundle)

    def display(bundle, raw, display_id):
        shown.append(bundle)
        return Handle()

    monkeypatch.setattr(LIVE, "display", display)
    panel = live_run(settings, max_steps=5)
    panel._ipython_display_()
    panel.start()
    assert panel.wait()
    assert len(shown) == 2 and shown[0][WIDGET] == shown[1][WIDGET]
    assert shown[0]["image/png"] != shown[1]["image/png"]
    assert base64.b64decode(shown[1]["image/png"]) == pictured(panel)
    assert json.loads(json.dumps(shown[1])) == shown[1]
