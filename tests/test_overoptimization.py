"""overoptimization: the law by hand, its peak, paths of runs, and the shipped grid."""

from __future__ import annotations

import json
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import write_run

from tralign_mini import worlds
from tralign_mini.overoptimization import Law, evaluations, fit_overoptimization, frontier, gold_at
from tralign_mini.record import read

ROOT = Path(__file__).resolve().parents[1]


def test_the_law_by_hand():
    # R(d) = d (1 - 0.5 log d): R(1) = 1, R(e) = e / 2, R(e^2) = 0
    law = Law(1.0, 0.5)
    assert law([0, 1, np.e, np.e**2]) == pytest.approx([0, 1, np.e / 2, 0], abs=1e-12)
    assert law.peak == pytest.approx((np.e, np.e / 2))  # 1 - 0.5 - 0.5 log d = 0 at d = e
    assert np.isnan(Law(1.0, 0.0).peak).all() and np.isnan(Law(1.0, -0.1).peak).all()


def test_two_points_determine_it():
    # from R(1) = 3 follows a = 3, then from R(e) = e follows b = 2
    assert fit_overoptimization([1, np.e], [3, np.e]) == pytest.approx((3, 2))


def test_least_squares_by_hand():
    # at d = 1 only a counts: the mean of 1 and 2; d = e then fits exactly: a - b = 0
    assert fit_overoptimization([1, 1, np.e, 0], [1, 2, 0, 0]) == pytest.approx((1.5, 1.5))


@given(st.floats(-5, 5), st.floats(0.1, 5), st.lists(st.floats(0.1, 20), min_size=3, max_size=9, unique=True))
def test_it_is_found_again_and_its_peak_is_the_highest_point(a, b, distances):
    law = Law(a, b)
    if np.ptp(np.log(distances)) > 0.1:
        assert fit_overoptimization(distances, law(distances)) == pytest.approx((a, b), abs=1e-6)
    top, height = law.peak
    assert law(top) == pytest.approx(height) and (law(top * np.array([0.8, 1.25])) < height).all()


@pytest.mark.parametrize("distance, gain, message", [
    ([1, 1, 0], [1, 2, 0], "1 different distance"), ([-1, 2], [1, 1], "not negative"),
    ([1, 2], [1, np.nan], "finite"), ([1, 2], [1], "of one length")])
def test_what_cannot_be_fitted_is_refused(distance, gain, message):
    with pytest.raises(ValueError, match=message):
        fit_overoptimization(distance, gain)


def test_gold_where_a_path_first_arrives():
    distance, gold = [0, 1, 3, 2, 4], [1.0, 2.0, 4.0, 9.0, 0.0]
    assert [gold_at(distance, gold, d) for d in (0, 0.5, 1, 2, 3, 3.5)] == [1, 1.5, 2, 3, 4, 2.25]
    assert np.isnan(gold_at(distance, gold, 4.1))
    assert gold_at([2, 3], [5.0, 6.0], 1) == 5  # it was there from the start


def test_paths_of_runs(tmp_path):
    write_run(tmp_path / "soft", reference="soft", alpha=0.6, tau=4, seed=3, beta=0.2)
    write_run(tmp_path / "below" / "unmeasured", reference="fixed", samples=False, gold=False)
    write_run(tmp_path.with_name("no-start"), reference="fixed", samples=False)
    distance, gold = frontier(read(tmp_path / "soft"))
    assert distance == pytest.approx(np.sqrt([0, 0.5, 1.0, 1.5, 2.0]))
    assert gold == pytest.approx([0.35, 1.25, 1.5, 1.75, 2.0])  # 0.35: mean of the initial samples
    assert len(frontier(read(tmp_path.with_name("no-start")))[0]) == 4
    assert evaluations(tmp_path.with_name("no-start")).step.tolist() == [5, 10, 15, 20]
    table = evaluations(tmp_path)
    assert table.step.tolist() == [0, 5, 10, 15, 20] and table.gold.tolist() == gold.tolist()
    assert table.iloc[0, :6].tolist() == ["soft", "dpo", "soft", 0.2, 1.0, 3]
    with pytest.raises(ValueError, match="There is no run below"):
        evaluations(tmp_path / "below" / "nothing")


def test_noise_below_zero_is_no_distance(tmp_path):
    write_run(tmp_path, metrics_={"kl/initial": -0.1})
    distance, _ = frontier(read(tmp_path))
    assert not distance.any()


def test_the_shipped_grid_is_whole_and_small():
    folder = worlds.grid_directory()
    table = evaluations(folder)
    runs = table.drop_duplicates("run")
    for _, group in runs.groupby(["epochs", "method", "beta", "seed"]):
        assert sorted(group["reference"]) == ["fixed", "hard", "soft"]
    assert set(runs["method"]) == {"dpo", "ipo", "kto"} and runs["seed"].nunique() >= 2
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8e6
    for run in runs["run"]:
        rows = [json.loads(line) for line in (folder / run / "samples.jsonl").read_text().splitlines()]
        texts = [[row[name] for row in rows[:20]] for name in ("prompt", "policy")]
        assert worlds.gold_reward("little-tldr", *texts) == [row["gold_policy"] for row in rows[:20]]
        assert len(rows) == 200


@pytest.fixture
def maker(monkeypatch):
    """data/grid.py as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = util.spec_from_file_location("grid_maker", ROOT / "data" / "grid.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_grid_is_every_method_with_every_reference_and_seed(maker):
    runs = maker.grid()
    assert len(runs) == 81 == 3 * 3 * (5 + 4)  # seeds, references, settings of both regimes
    recipe, settings = runs["one-epoch-dpo-soft-beta1-seed2"]
    assert recipe == "little-tldr"
    assert settings == {"method": "dpo", "beta": 1.0, "seed": 2, "reference": "soft", "alpha": 0.6, "tau": 16}
    assert {path.name for path in worlds.grid_directory().iterdir()} <= {*runs, "README.md"}


def test_of_a_run_the_grid_keeps_what_a_reader_needs(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "TEXTS", 3)
    write_run(tmp_path / "here", metrics_={"loss": 0.123456789}, seed=5)
    maker.keep(tmp_path / "here", tmp_path / "kept" / "name")
    record, before = read(tmp_path / "kept" / "name"), read(tmp_path / "here")
    assert record.recipe == before.recipe | {"output": "name"}
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "kept" / "name").iterdir())
    assert len(record.history) == len(before.history) and record.history["loss"].iloc[0] == 0.12346
    assert record.column("gold_policy") == pytest.approx(before.column("gold_policy"))
    assert record.column("policy") == before.column("policy")[:3]
