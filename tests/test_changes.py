"""Alpha and tau moved while a run trains: recorded, resumed, and run again to the same numbers."""

from __future__ import annotations

import json
import threading

import pytest
from helpers import make_trainer, metrics, tiny_run

import tralign_mini as tr
from tralign_mini.changes import read_changes, region_at, write_change
from tralign_mini.json_lines import drop_after

pytestmark = pytest.mark.usefixtures("no_report")


def steer(step):
    """Fixed for two steps, then a soft update in every step, then a hard one every three."""
    late = tr.TrustRegion.soft(0.5) if step < 6 else tr.TrustRegion.hard(3)
    return tr.TrustRegion.fixed() if step < 3 else late


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    tr.train(tiny_run(folder, output=str(folder / "live"), reference="soft", alpha=0.9), control=steer)
    return folder


def test_each_step_uses_what_the_control_says_before_it(steered):
    rows = metrics(steered / "live")
    expected = [(None, None)] * 2 + [(0.5, 1)] * 3 + [(1.0, 3)] * 3
    assert [(row["alpha"], row["tau"]) for row in rows] == expected
    assert [row["reference_updates"] for row in rows] == [0, 0, 1, 2, 3, 4, 4, 4]  # hard: at step 6 alone


def test_only_changes_are_recorded_with_the_step_from_which_they_hold(steered):
    assert read_changes(steered / "live") == [
        (1, tr.TrustRegion.fixed()), (3, tr.TrustRegion.soft(0.5)), (6, tr.TrustRegion.hard(3))]


def test_a_replay_gives_the_same_metrics(steered):
    run = tr.replay(steered / "live", steered / "again")
    assert metrics(run.directory) == metrics(steered / "live")
    assert read_changes(run.directory) == read_changes(steered / "live")


def test_a_run_without_changes_differs(steered):
    plain = tr.train(tiny_run(steered, output=str(steered / "plain"), reference="soft", alpha=0.9))
    assert metrics(plain.directory) != metrics(steered / "live")
    assert not (plain.directory / "changes.jsonl").exists()


@pytest.mark.parametrize("stop_at", [4, 5, 7])
def test_a_stopped_run_goes_on_with_the_last_change(steered, stop_at):
    stop, output = threading.Event(), steered / f"stopped-{stop_at}"

    def until(step):
        if step == stop_at:
            stop.set()
        return steer(step)

    settings = tiny_run(steered, output=str(output), reference="soft", alpha=0.9)
    tr.train(settings, control=until, stop=stop)
    assert len(metrics(output)) == stop_at
    tr.train(settings, control=steer, resume=True)
    assert metrics(output) == metrics(steered / "live")
    assert read_changes(output) == read_changes(steered / "live")


def test_a_recipe_with_a_fixed_reference_can_be_moved_and_then_uses_no_cached_log_probs(steered, tmp_path):
    settings = tiny_run(steered, output=str(steered / "from-fixed"))
    tr.train(settings, control=lambda step: tr.TrustRegion.hard(1))
    rows = metrics(steered / "from-fixed")
    assert all(abs(row["rewards/margin"]) < 1e-6 for row in rows)  # alpha = 1, tau = 1: none before the step
    assert rows[-1]["reference_updates"] == 8


def test_rewinding_drops_what_came_later(tmp_path):
    for step in (1, 4, 9):
        write_change(tmp_path, step, tr.TrustRegion.hard(step))
    drop_after(tmp_path / "changes.jsonl", 4)
    assert [step for step, _ in read_changes(tmp_path)] == [1, 4]
    drop_after(tmp_path / "nothing", 4)  # a run without changes has no file


def test_a_line_cut_off_by_a_kill_does_not_count(tmp_path):
    write_change(tmp_path, 2, tr.TrustRegion.soft(0.3, 4))
    with open(tmp_path / "changes.jsonl", "a") as file:
        file.write(json.dumps({"step": 3})[:-2])
    assert read_changes(tmp_path) == [(2, tr.TrustRegion.soft(0.3, 4))]


def test_the_last_change_up_to_a_step_holds():
    start, one, two = tr.TrustRegion.fixed(), tr.TrustRegion.soft(0.1), tr.TrustRegion.hard(2)
    changes = [(3, one), (5, two)]
    found = [region_at(changes, step, start) for step in (1, 2, 3, 4, 5, 9)]
    assert found == [start, start, one, one, two, two]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="one process"):
        make_trainer(tmp_path, control=steer)
