"""MPO: what is easy, who scored it, what becomes of wrong signs, and stages that survive a kill."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import metrics, tiny_neox, weights, write_model
from hypothesis import given
from hypothesis import strategies as st

import tralign_mini as tr
from tralign_mini import cli, models, mpo
from tralign_mini.data import load_dataset
from tralign_mini.json_lines import read_rows as lines
from tralign_mini.mpo import folds_of, gap_figure, load_settings, split_gaps, stage_recipe, train_mpo
from tralign_mini.recipe_file import RecipeError
from tralign_mini.widgets.split_explorer import wrong_share

GAPS = [3.0, -0.5, 0.2, -2.0, 1.0]

# -------------------------------------------------------------------------------------------- what is easy


def test_a_pair_is_easy_by_the_size_of_its_gap_whatever_its_sign():
    assert split_gaps(GAPS, gamma=0.9).easy.tolist() == [True, False, False, True, True]
    assert split_gaps(GAPS, gamma=1.0).easy.tolist() == [True, False, False, True, False]  # more than gamma


def test_a_fraction_is_a_quantile_of_the_sizes():
    easy, gamma = split_gaps(GAPS, easy_fraction=0.4)
    assert easy.tolist() == [True, False, False, True, False] and 1.0 <= gamma < 2.0
    assert gamma == pytest.approx(np.quantile([3, 0.5, 0.2, 2, 1], 0.6))


@given(st.lists(st.floats(-50, 50), min_size=4, max_size=80, unique_by=abs), st.floats(0.05, 0.95))
def test_every_easy_gap_is_larger_than_every_hard_one(gaps, share):
    easy, gamma = split_gaps(gaps, easy_fraction=share)
    sizes = np.abs(gaps)
    assert sizes[~easy].max() <= gamma < sizes[easy].min()
    assert abs(easy.mean() - share) <= 1 / len(gaps)
    again = split_gaps([-gap for gap in gaps], gamma=gamma)
    assert again.easy.tolist() == easy.tolist()


@pytest.mark.parametrize("settings, message", [
    ({}, "give one of them"), ({"gamma": 1, "easy_fraction": 0.5}, "give one of them"),
    ({"easy_fraction": 1}, "no share of pairs"), ({"gamma": -1}, "size of a gap"),
    ({"gamma": "x"}, "size of a gap"),
    ({"gamma": 3.0}, "leaves no easy pair: the gaps are 0.2 to 3, half of them below 1"),
    ({"gamma": 0.1}, "leaves no hard pair")])
def test_a_threshold_that_splits_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        split_gaps(GAPS, **settings)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60), st.integers(0, 5))
def test_all_pairs_of_a_prompt_are_in_one_fold_and_folds_have_half_the_prompts(prompts, seed):
    different = sorted(set(prompts))
    if len(different) < 2:
        with pytest.raises(ValueError, match="same prompt"):
            folds_of(prompts, seed)
        return
    folds = folds_of(prompts, seed)
    of = {prompt: {int(fold) for fold, own in zip(folds, prompts) if own == prompt} for prompt in different}
    assert all(len(found) == 1 for found in of.values())
    assert abs(sum(next(iter(found)) for found in of.values()) - len(different) / 2) <= 0.5
    assert folds_of(prompts, seed).tolist() == folds.tolist()


def test_the_seed_draws_the_folds():
    one, other = (folds_of([str(i) for i in range(40)], seed).tolist() for seed in (0, 1))
    assert one != other and one != [i % 2 for i in range(40)] and sum(one) == sum(other) == 20


def test_the_picture_shows_the_counts_and_the_threshold():
    figure = gap_figure(GAPS, 0.9)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(labels) == ["easy, right sign: 2 (40%)", "easy, wrong sign: 1 (20%)", "hard: 2 (40%)"]
    lines = sorted(line.get_xdata()[0] for line in figure.axes[0].lines)
    assert lines == [-0.9, 0.9] and figure.axes[0].get_legend().get_title().get_text() == "γ = 0.9"
    steps = [patch.get_data() for patch in figure.axes[0].patches]
    assert [(values - below).sum() for values, _, below in steps] == [2, 2, 1]  # none falls off the picture


# The slider: pairs 0 and 2 have the larger gaps, the labels of 0 and 1 are wrong, 3 is between equals.
KNOWN = {"gaps": [-2.0, 0.5, 1.5, -0.2], "gold": [-1.0, -1.0, 2.0, 0.0]}


@pytest.mark.parametrize("sign, stage_1", [("keep", (0.5, 2)), ("drop", (0.0, 1)), ("flip", (0.0, 2))])
def test_wrong_labels_are_counted_on_both_sides_of_the_threshold(sign, stage_1):
    found = wrong_share(**KNOWN, easy_fraction=0.5, wrong_sign=sign)
    assert found == {"all pairs": (pytest.approx(2 / 3), 4), "hard": (1.0, 2), "easy": (0.5, 2),
                     "stage 1": stage_1}


def test_the_slider_moves_the_threshold_and_a_picture_takes_a_tenth_of_a_second():
    rng = np.random.default_rng(0)
    panel = tr.widgets.split_explorer(rng.normal(0.5, 1, 3200), rng.normal(0.5, 1, 3200))
    assert panel.wait() and panel.error is None
    first, panel.easy.value = bytes(panel.image.value), 0.2
    assert panel.wait() and panel.error is None and bytes(panel.image.value) != first
    assert "hard: 2560 (80%)" in [text.get_text() for text in panel.axes[0].get_legend().get_texts()]
    second, panel.sign.value = bytes(panel.image.value), "flip"
    assert panel.wait() and bytes(panel.image.value) != second
    begun = time.thread_time()
    panel.picture()
    assert time.thread_time() - begun < 0.25


# ------------------------------------------------------------------------------------------- the whole of it


def settings_of(folder: Path, **changes) -> dict:
    """All of MPO on a tiny model: the chosen completion says w5, the rejected w6, but one pair in eight.

    What is between its words ends a line for `str.splitlines`, and does not in JSON.
    """
    if not (folder / "model").exists():
        write_model(folder / "model", tiny_neox())
        rows = []
        for i in range(48):
            sides = [f"w5\u2028w{10 + i % 31}", f"w6 w{10 + i % 29}"]
            prompt = f"w{7 + (i // 2) % 50} w{8 + (i // 2) % 43}"  # two pairs a prompt
            chosen, rejected = sides[::-1] if i % 8 == 7 else sides
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"model": str(folder / "model"), "data": str(folder / "pairs.jsonl")}
    return {**paths, "output": str(folder / "mpo"), "easy_fraction": 0.5, "wrong_sign": "flip",
            "batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "max_prompt_tokens": 16,
            "max_completion_tokens": 8, "eval_steps": 2, "eval_prompts": 3, "save_steps": 2,
            "reward": {"max_steps": 8}, "easy": {"reference": "soft", "alpha": 0.5, "tau": 2, "beta": 0.3},
            "ppo": {"kl_coef": 0.1, "max_steps": 3}} | changes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("mpo")


@pytest.fixture(scope="module")
def done(root):
    return train_mpo(settings_of(root))


def test_a_directory_holds_every_stage_as_a_run(done):
    assert list(done.stages) == ["reward-a", "reward-b", "easy", "reward", "ppo"]
    steps = {name: len(metrics(run.directory)) for name, run in done.stages.items()}
    assert steps == {"reward-a": 8, "reward-b": 8, "easy": 4, "reward": 8, "ppo": 3}
    assert [run.recipe.method for run in done.stages.values()] == ["reward", "reward", "dpo", "reward", "ppo"]
    assert done.stages["easy"].recipe.trust_region() == tr.TrustRegion.soft(0.5, 2)
    assert (done.directory / "figures" / "gaps.png").read_bytes()[1:4] == b"PNG"
    assert all((run.directory / "report.md").is_file() for run in done.stages.values())


def test_no_pair_is_scored_by_a_model_that_saw_its_prompt(done):
    data, pairs = done.directory / "data", done.pairs
    rows, folds = lines(data / "all.jsonl"), {name: lines(data / f"fold-{name}.jsonl") for name in "ab"}
    prompts = {name: {row["prompt"] for row in fold} for name, fold in folds.items()}
    assert not prompts["a"] & prompts["b"] and min(map(len, prompts.values())) >= 10
    assert len(folds["a"]) + len(folds["b"]) == len(rows) == len(pairs)
    for name, other in ("ab", "ba"):
        mine = pairs[pairs.fold == name]
        assert {rows[i]["prompt"] for i in mine.index} == prompts[name]
        assert tr.Run(done.directory / f"reward-{other}").recipe.data == str(data / f"fold-{other}.jsonl")
        model = tr.RewardModel.load(done.directory / f"reward-{other}")
        for side in ("chosen", "rejected"):
            texts = [rows[i][side] for i in mine.index]
            expected = model.score([rows[i]["prompt"] for i in mine.index], texts)
            assert mine[side].tolist() == pytest.approx(expected, abs=1e-6)
    assert pairs.gap.tolist() == pytest.approx((pairs.chosen - pairs.rejected).tolist(), abs=1e-6)


def test_held_out_prompts_are_in_no_stage(done):
    data = done.directory / "data"
    held_out = {row["prompt"] for row in lines(data / "held-out" / "test.jsonl")}
    assert len(held_out) >= 2
    for file in ("all", "fold-a", "fold-b", "stage-1", "stage-2"):
        assert not held_out & {row["prompt"] for row in lines(data / f"{file}.jsonl")}
    for run in done.stages.values():
        assert set(run.held_out_prompts()) <= held_out


def check_split(directory, wrong_sign, swap=False):
    """What the files say, from the gaps alone."""
    run, data = mpo.MPORun(directory), directory / "data"
    rows, pairs, counts = lines(data / "all.jsonl"), run.pairs, run.counts
    gamma = np.quantile(pairs.gap.abs(), 0.5)
    easy, wrong = pairs.gap.abs() > gamma, pairs.gap < 0
    first = ~easy if swap else easy
    assert counts["gamma"] == pytest.approx(gamma) and counts["pairs"] == len(rows)
    assert (pairs.part == "easy").tolist() == easy.tolist()
    assert (counts["easy"], counts["hard"]) == (easy.sum(), (~easy).sum())
    assert counts["of the wrong sign"] == {"easy": (easy & wrong).sum(), "hard": (~easy & wrong).sum()}
    expected = []
    for row, mine, bad in zip(rows, first, wrong):
        if mine and not (bad and wrong_sign == "drop"):
            flip = bad and wrong_sign == "flip"
            expected.append(row | {"chosen": row["rejected"], "rejected": row["chosen"]} if flip else row)
    assert lines(data / "stage-1.jsonl") == expected
    number = (first & wrong).sum()
    assert counts["stage 1"] == {"on": "hard" if swap else "easy", "pairs": len(expected),
                                 "dropped": number if wrong_sign == "drop" else 0,
                                 "flipped": number if wrong_sign == "flip" else 0}
    second = [row["prompt"] for row, mine in zip(rows, first) if not mine]
    assert {row["prompt"] for row in lines(data / "stage-2.jsonl")} == set(second)
    assert counts["stage 2"] == {"on": "easy" if swap else "hard", "prompts": len(set(second))}
    assert number > 0 and (~first & wrong).sum() + number == wrong.sum()


def test_the_split_is_what_it_says(done):
    check_split(done.directory, "flip")


@pytest.mark.parametrize("wrong_sign, swap", [("keep", False), ("drop", False), ("flip", True)])
def test_pairs_of_the_wrong_sign_are_kept_dropped_or_flipped_and_counted(done, tmp_path, wrong_sign, swap):
    shutil.copytree(done.directory, tmp_path / "mpo")
    settings = load_settings(settings_of(Path(done.directory).parent, wrong_sign=wrong_sign, swap=swap), {})
    mpo._split(settings | {"seed": 5}, tmp_path / "mpo")  # the folds are the files', not drawn again
    check_split(tmp_path / "mpo", wrong_sign, swap)
    assert mpo.MPORun(tmp_path / "mpo").pairs.fold.tolist() == done.pairs.fold.tolist()


def test_stage_2_begins_at_the_policy_of_stage_1_and_is_held_to_it(done):
    easy, ppo = done.stages["easy"], done.stages["ppo"]
    assert ppo.recipe.model == str(easy.last_checkpoint)
    assert ppo.recipe.data == str(done.directory / "data" / "stage-2.jsonl")
    assert ppo.recipe.reward_model == str(done.directory / "reward")
    start, reference = weights(models.load_policy(ppo.recipe)), weights(easy.policy)
    assert all(torch.equal(start[name], reference[name]) for name in reference)
    assert metrics(ppo.directory)[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)
    moved = weights(done.policy)
    assert any(not torch.equal(moved[name], start[name]) for name in moved)


def test_lora_goes_through_both_stages(root, tmp_path):
    settings = settings_of(root, output=str(tmp_path / "mpo"), tuning="lora", lora_rank=2)
    run = train_mpo(settings, max_steps=2, reward={"max_steps": 4}, ppo={"max_steps": 1})
    assert list(run.stages) == ["reward-a", "reward-b", "easy", "reward", "ppo"]
    assert "initial" in run.stages["ppo"].policy.peft_config  # stage 1's policy, to measure KL to it
    assert metrics(run.stages["ppo"].directory)[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)


STAGES = ["data", "reward-a", "reward-b", "split", "easy", "reward", "ppo"]


def cut(done, output: Path, after: str) -> None:
    """A copy of the finished run as a kill leaves it right after `after` was finished."""
    shutil.copytree(done.directory, output)
    for name in STAGES[STAGES.index(after) + 1 :]:
        for path in [output / name, *output.glob(f"{name}.json*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("after", ["reward-a", "split", "reward"])
def test_a_killed_run_goes_on_in_another_folder_and_ends_the_same(done, tmp_path, after):
    """Its recipes name their data and models by path, and follow; what is done is not done again."""
    cut(done, tmp_path / "moved", after)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("moved/reward-a/metrics.jsonl")}
    resumed = train_mpo(tmp_path / "moved", resume=True)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and before
    for name in resumed.stages:
        assert metrics(resumed.directory / name) == metrics(done.directory / name), name
        text = (resumed.directory / name / "recipe.yaml").read_text()
        assert str(resumed.directory) in text and str(done.directory) not in text
    assert resumed.counts == done.counts


def test_a_stopped_run_stops_within_its_stage_and_goes_on(root, done, tmp_path):
    settings = settings_of(root, output=str(tmp_path / "mpo"))
    stop = SimpleNamespace(is_set=lambda: (tmp_path / "mpo" / "easy" / "metrics.jsonl").exists())
    stopped = train_mpo(settings, stop=stop)
    assert list(stopped.stages) == ["reward-a", "reward-b", "easy"]
    assert 0 < len(metrics(stopped.directory / "easy")) < 4
    resumed = train_mpo(settings, resume=True)
    for name in ("easy", "ppo"):
        assert metrics(resumed.directory / name) == metrics(done.directory / name)


def test_a_finished_run_is_left_alone(done):
    before = {path: path.stat().st_mtime_ns for path in done.directory.rglob("*") if path.is_file()}
    train_mpo(done.directory, resume=True)
    assert {path: path.stat().st_mtime_ns for path in done.directory.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="already holds an MPO run. Say resume=true"):
        train_mpo(done.directory)
    with pytest.raises(ValueError, match="gamma: None then, 1.0 now.*same run"):
        train_mpo(done.directory, resume=True, gamma=1.0, easy_fraction=None)
    with pytest.raises(ValueError, match="easy.beta: 0.3 then, 0.4 now"):
        train_mpo(done.directory, resume=True, easy={"beta": 0.4})


# ------------------------------------------------------------------------------------------------ the recipe


def test_settings_of_a_stage_win_over_those_of_all():
    common = {"model": "little-tldr", "gamma": 1, "beta": 0.2, "seed": 3}
    settings = load_settings(common | {"easy.method": "ipo", "reward": {"epochs": 2}},
                             {"easy": {"beta": 0.5}, "ppo.kl_coef": 0.2})
    assert settings["output"] == "runs/little-tldr-mpo-3"
    easy, reward, ppo = (stage_recipe(settings, Path("/x"), name) for name in ("easy", "reward-b", "ppo"))
    assert (easy.method, easy.beta, easy.seed, easy.data) == ("ipo", 0.5, 3, "/x/data/stage-1.jsonl")
    assert (reward.method, reward.epochs, reward.data) == ("reward", 2, "/x/data/fold-b.jsonl")
    assert (ppo.kl_coef, ppo.reward_model, ppo.output) == (0.2, "/x/reward", "/x/ppo")
    assert {recipe.eval_data for recipe in (easy, reward, ppo)} == {easy.world} == {"little-tldr"}
    noisy = stage_recipe(settings | {"data": "f.jsonl", "eval_data": "little-hh"}, Path("/x"), "easy")
    own = stage_recipe(settings | {"data": "f.jsonl"}, Path("/x"), "easy")
    assert (noisy.world, own.world, own.eval_data) == ("little-hh", None, "/x/data/held-out")
    swapped = stage_recipe(settings, Path("/x"), "hard")
    assert swapped.replace(output="/x/easy") == easy


def test_none_is_not_given():
    settings = {"model": "little-tldr", "easy_fraction": 0.5, "max_steps": 4}
    none = {"seed": None, "gamma": None, "wrong_sign": None, "swap": None, "train_pairs": None}
    assert load_settings(settings | none, {}) == load_settings(settings, {})
    assert load_settings(settings | {"seed": 3}, none) == load_settings(settings, {})
    own = load_settings(settings, {"easy.max_steps": None})  # but not that of all runs, for this one
    steps = [stage_recipe(own, Path("/x"), name).max_steps for name in ("easy", "reward")]
    assert steps == [None, 4]


@pytest.mark.parametrize("changes, message", [
    ({"wrong_sign": "fix"}, "wrong_sign=fix: must be one of keep, drop, flip"),
    ({"swap": "yes"}, "swap=yes: must be true or false"), ({"method": "dpo"}, "say easy.method"),
    ({"easy_fraction": 2}, "easy_fraction=2 is no share"), ({"gamma": 1}, "give one of them"),
    ({"dpo": {"beta": 1}}, "dpo.beta: there is no such setting"),
    ({"easy.data": "x"}, "easy.data: there is no such"),
    ({"ppo.method": "dpo"}, "ppo.method: there is no such"),
    ({"ppo.model": "x"}, "ppo.model: there is no such setting; .* ppo's model is stage 1's"),
    ({"easy.betta": 1}, "did you mean 'beta'"),
    ({"easy.reference": "hard"}, "reference=hard needs tau"),
    ({"data": None, "model": "x"}, "data is missing")])
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    settings = {"model": "little-tldr", "easy_fraction": 0.5, "output": str(tmp_path / "mpo")}
    with pytest.raises(RecipeError, match=message):
        train_mpo(settings | changes)
    assert not (tmp_path / "mpo").exists()


@pytest.mark.parametrize("changes, message", [
    ({"train_pairs": 10**6}, r"train_pairs=1000000, but there are only \d\d pairs: lower it"),
    ({"easy_fraction": 0.9}, "stage-2.jsonl has 5 prompts to train on, less than one batch of batch_size=8"),
    ({"easy_fraction": 0.1}, "stage-1.jsonl has 5 pairs"),
    ({"easy_fraction": 0.1, "swap": True}, "stage-2.jsonl has 5 prompts"),
    ({"reward.batch_size": 24}, r"fold-\w.jsonl has \d\d pairs")])
def test_too_few_pairs_for_a_stage_are_refused_before_training(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_mpo(settings_of(root, output=str(tmp_path / "mpo")), **changes)
    assert not (tmp_path / "mpo").exists()


def test_kto_makes_two_rows_of_a_pair(root, tmp_path):
    settings = load_settings(settings_of(root), {"easy.method": "kto", "easy.batch_size": 32})
    mpo._write_data(settings, tmp_path / "mpo")
    pairs = len(lines(tmp_path / "mpo" / "data" / "all.jsonl")) // 2
    assert pairs < 32 < 2 * pairs


@pytest.mark.parametrize("place, message", [
    (-3, "stage-1.jsonl has 3 pairs .*less than one batch"), (3, "stage-2.jsonl has [123] prompts")])
def test_a_split_with_too_few_pairs_for_a_stage_is_refused_first(done, root, tmp_path, place, message):
    cut(done, tmp_path / "mpo", "reward-b")
    gamma = float(np.sort(done.pairs.gap.abs())[place - 1 : place + 1].mean())
    settings = load_settings(settings_of(root, gamma=gamma, easy_fraction=None), {})
    with pytest.raises(RecipeError, match=message):
        mpo._split(settings, tmp_path / "mpo")
    assert not (tmp_path / "mpo" / "split.json").exists()


def test_unpaired_data_are_refused(root, tmp_path):
    settings_of(root)
    (tmp_path / "kto.jsonl").write_text("".join(
        json.dumps({"prompt": f"w{i}", "completion": "w5", "label": True}) + "\n" for i in range(3, 40)))
    with pytest.raises(ValueError, match="no column chosen, rejected: MPO needs pairs"):
        train_mpo(settings_of(root, data=str(tmp_path / "kto.jsonl"), output=str(tmp_path / "mpo")))


def test_a_part_of_a_worlds_pairs_is_evaluated_on_the_world(tmp_path):
    rows = [dict(row) for row in load_dataset("little-tldr").select(range(8))]
    (tmp_path / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tr.train("little-tldr", data=str(tmp_path / "part.jsonl"), eval_data="little-tldr", max_steps=1,
                   batch_size=4, eval_prompts=2, output=str(tmp_path / "run"))
    assert run.held_out_prompts() == load_dataset("little-tldr", "test")["prompt"][:2]
    assert "gold/reward" in metrics(run.directory)[-1]
    assert all("gold_policy" in row for row in lines(run.directory / "samples.jsonl"))
    assert importlib.import_module("tralign_mini.runs").split_rows(run.recipe)[0].num_rows == 8


# ----------------------------------------------------------------------------------------- the command line


def tralign(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["tralign", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capsys.readouterr()
    return end.value.code, " ".join((output.out + output.err).split())


def test_the_command_goes_on_with_a_run_and_says_where_its_reports_are(done, monkeypatch, capsys):
    code, output = tralign(monkeypatch, capsys, "mpo", done.directory, "resume=true")
    assert code == 0 and all(f"{done.directory / name / 'report.md'}" in output for name in done.stages)


def test_the_command_takes_settings_of_stages(done, monkeypatch, capsys):
    code, output = tralign(monkeypatch, capsys, "mpo", done.directory, "resume=true", "easy.beta=0.4")
    assert code == 2 and "easy.beta: 0.3 then, 0.4 now" in output


def test_an_mpo_recipe_is_no_single_run(monkeypatch, capsys):
    code, output = tralign(monkeypatch, capsys, "train", "little-tldr-mpo")
    assert code == 2 and "method=mpo is several runs in one directory: tralign mpo RECIPE" in output
