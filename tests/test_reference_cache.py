"""Log-probs of a reference that never moves: computed once, kept, and read by exactly the runs they fit."""

from __future__ import annotations

import gc
import json
import random
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import assert_close, metrics, tiny_neox, tiny_run, without
from safetensors.torch import load_file, save_file

import tralign_mini as tr
from tralign_mini import runs
from tralign_mini.checkpoint import checkpoints
from tralign_mini.reference import AdapterReference, FrozenReference
from tralign_mini.reference_cache import _hash, cache_directory, cached_logps

pytestmark = pytest.mark.usefixtures("no_report")
ROWS = [{"prompt_ids": [3] * (1 + i % 3), "chosen_ids": [i], "rejected_ids": [i, 4]} for i in range(7)]
CONDITIONS = {"start": "abc", "dtype": "torch.float32", "average": False}


class Model:
    """Computes two numbers of each row that no other row has, and counts what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows):
        self.asked.append(rows)
        return torch.tensor([[-row["chosen_ids"][0] / 3, len(row["prompt_ids"]) - 0.1] for row in rows])


def expected(rows=ROWS):
    return Model()(rows).tolist()


def ask(directory, rows=ROWS, conditions=CONDITIONS, at_once=3, **options):
    model = Model()
    return cached_logps(directory, rows, conditions, model, at_once, **options), model.asked


def test_computed_once_and_then_read_to_the_bit(tmp_path, capsys):
    first, asked = ask(tmp_path / "new" / "folder")
    assert first == expected() and [len(rows) for rows in asked] == [3, 3, 1]
    assert "read from" not in capsys.readouterr().out
    again, asked = ask(tmp_path / "new" / "folder")
    assert again == first and asked == []
    [file] = (tmp_path / "new" / "folder").iterdir()
    assert f"of 7 rows read from {file}" in capsys.readouterr().out


def test_rows_in_any_order_are_the_same_rows(tmp_path):
    _, straight = ask(tmp_path / "a")
    shuffled = random.Random(1).sample(ROWS, 7)
    found, asked = ask(tmp_path / "b", shuffled)
    assert found == expected(shuffled) and asked == straight  # in one order, so with the same bits
    found, asked = ask(tmp_path / "a", shuffled)
    assert found == expected(shuffled) and asked == []


def test_rows_of_similar_length_are_computed_together(tmp_path):
    rows = [{"prompt_ids": [30] * n, "chosen_ids": [9]} for n in (9, 1, 8, 2, 7, 3)]
    _, asked = ask(tmp_path, rows, at_once=2)
    assert [[len(row["prompt_ids"]) for row in part] for part in asked] == [[1, 2], [3, 7], [8, 9]]


def test_the_same_row_twice_has_the_same_numbers_twice(tmp_path):
    rows = [ROWS[0], ROWS[1], ROWS[0]]
    assert ask(tmp_path, rows)[0] == ask(tmp_path, rows)[0] == expected(rows)


@pytest.mark.parametrize("change", [
    {"start": "abd"}, {"dtype": "torch.bfloat16"}, {"average": True}, {"config": {"theta": 1e6}}], ids=str)
def test_other_conditions_are_other_numbers(tmp_path, change):
    ask(tmp_path)
    assert len(ask(tmp_path, conditions=CONDITIONS | change)[1]) == 3
    assert ask(tmp_path)[1] == [] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("rows", [
    ROWS[:-1], [*ROWS, ROWS[0]], [*ROWS[:-1], ROWS[-1] | {"rejected_ids": [6, 5]}],
    [*ROWS[:-1], ROWS[-1] | {"prompt_ids": [3, 3]}]], ids=["fewer", "more", "other token", "longer prompt"])
def test_other_rows_are_other_numbers(tmp_path, rows):
    ask(tmp_path)
    found, asked = ask(tmp_path, rows)
    assert len(asked) >= 2 and found == expected(rows)


def test_where_a_token_belongs_is_part_of_the_key(tmp_path):
    one, other = ({"prompt_ids": [1, 2], "chosen_ids": [3]}, {"prompt_ids": [1], "chosen_ids": [2, 3]})
    ask(tmp_path, [one])
    assert len(ask(tmp_path, [other])[1]) == 1


def damage_bits(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "something else": lambda file: file.write_text("hello"),
    "zeros at the end": lambda file: file.write_bytes(file.read_bytes()[:-24] + bytes(24)),
    "other bits": damage_bits,
    "another name": lambda file: save_file({"numbers": torch.zeros(7, 2)}, file),
    "without a hash": lambda file: save_file({"logps": torch.zeros(7, 2)}, file),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_said_and_computed_again(tmp_path, how, capsys):
    ask(tmp_path)
    [file] = tmp_path.iterdir()
    sound = file.read_bytes()
    DAMAGE[how](file)
    assert file.read_bytes() != sound
    found, asked = ask(tmp_path)
    assert found == expected() and len(asked) == 3
    assert f"{file} cannot be used" in (said := capsys.readouterr().out) and "computed again" in said
    assert file.read_bytes() == sound and ask(tmp_path)[1] == []


def test_numbers_that_are_not_finite_are_not_read_again(tmp_path, capsys):
    bad = [ROWS[0] | {"chosen_ids": [float("nan")]}]
    ask(tmp_path, bad)
    assert len(ask(tmp_path, bad)[1]) == 1 and "cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["a file is there", "no file can be made there"])
def test_a_folder_that_cannot_be_written_costs_the_next_run_and_not_this_one(tmp_path, where, capsys):
    (tmp_path / "file").touch()
    directory = tmp_path / "file" if where == "a file is there" else Path("/proc/self")
    if not directory.exists():
        pytest.skip("no /proc here")
    found, asked = ask(directory)
    assert found == expected() and len(asked) == 3
    assert "are not kept for the next run" in (said := capsys.readouterr().out) and "TRALIGN_CACHE" in said


def test_a_process_that_is_not_the_main_one_is_silent_and_writes_nothing(tmp_path, capsys):
    found, asked = ask(tmp_path, main=False)
    assert found == expected() and len(asked) == 3 and not list(tmp_path.iterdir())
    ask(tmp_path)
    capsys.readouterr()
    assert ask(tmp_path, main=False) == (expected(), [])
    assert capsys.readouterr() == ("", "")


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("TRALIGN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_directory() == Path.home() / ".cache" / "tralign_mini"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "tralign_mini"
    monkeypatch.setenv("TRALIGN_CACHE", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here"


# ----------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Trainer collects garbage after every run: half the time of these short ones, if it looks everywhere."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch):
    """How often a reference was asked, without the evaluations: `using` of each class."""
    counts = Counter()
    monkeypatch.setattr(runs, "Evaluator", lambda *args: None)
    monkeypatch.setattr(runs, "write_samples", lambda *args, **kwargs: None)
    for reference in (FrozenReference, AdapterReference):

        @contextmanager
        def using(self, original=reference.using):
            counts["reference"] += 1
            with original(self) as model:
                yield model

        monkeypatch.setattr(reference, "using", using)
    return counts


class Runs:
    """`self("name", ...)` trains and returns the rows of metrics; without a cache, where it is False."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def settings(self, name, **settings):
        defaults = {"max_steps": 6, "save_steps": 2, "eval_steps": 100, "eval_prompts": 2}
        return tiny_run(self.folder, output=str(self.folder / name), **defaults | settings)

    def __call__(self, name, cache=True, **settings):
        with self.monkeypatch.context() as patch:
            if not cache:
                patch.setattr(runs, "cache_directory", lambda: None)
            tr.train(self.settings(name, **settings))
        return metrics(self.folder / name)


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Runs(tmp_path, monkeypatch)


def loosen(cache):
    """Make every number in the cache another one, with a hash that fits."""
    for file in cache.iterdir():
        logps = load_file(file)["logps"] - torch.linspace(0, 5, 2)
        save_file({"logps": logps}, file, {"sha256": _hash(logps)})


CLIMBS = {"desirable_weight": 9}  # so that z0 is not clamped at 0


@pytest.mark.parametrize("settings", [
    {"method": "dpo"}, {"tuning": "lora"}, {"method": "kto"} | CLIMBS,
    {"method": "ipo", "logps": "mean", "beta": 0.3, "micro_batch_size": 2},
    {"method": "kto", "micro_batch_size": 2} | CLIMBS, {"method": "kto", "tuning": "lora"} | CLIMBS,
], ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_run_with_the_cache_equals_one_without(run, cache, settings, asked):
    computed = run("uncached", cache=False, **settings)
    assert not cache.exists() and asked["reference"] >= 6  # in every micro-batch
    asked.clear()
    cached = run("first", **settings)
    assert asked["reference"] > 0 and len(list(cache.iterdir())) == 1
    asked.clear()
    again = run("second", **settings)
    assert asked["reference"] == 0
    for rows in (computed, cached):  # before the first step the rewards are zero, exactly or up to rounding
        rows[0].pop("rewards/accuracy", None)
    assert_close(computed, cached, 1e-5)
    assert again[1:] == cached[1:] and again[0]["loss"] == cached[0]["loss"]
    if settings.get("method") == "kto":
        assert max(row["kto/z0"] for row in cached) > 1e-3


def test_the_reference_is_asked_once_for_all_runs_from_one_start(run, cache, asked):
    first = run("first", beta=0.1)
    asks = asked["reference"]
    assert asks == 5  # 40 pairs less the held-out ones, 8 at a time, and not one more in training
    for settings in ({"beta": 0.4}, {"learning_rate": 3e-4}, {"max_steps": 11}):
        rows = run(str(settings), **{"beta": 0.1} | settings)
        assert asked["reference"] == asks, settings
        assert [row["loss"] for row in rows[1:6]] != [row["loss"] for row in first[1:]]
    run("seed", seed=3)
    assert asked["reference"] == 2 * asks  # prompts are held out by the seed: other rows


@pytest.mark.parametrize("settings", [{}, {"method": "kto", "tuning": "lora"}], ids=["full", "lora kto"])
def test_a_reference_that_moves_neither_reads_nor_writes(run, cache, asked, settings):
    moving = {"reference": "soft", "alpha": 0.3, "tau": 2} | settings
    without_cache = run("uncached", cache=False, **moving)
    assert run("empty", **moving) == without_cache and not cache.exists()
    fixed = run("fixed", **settings)
    loosen(cache)
    before = {file: file.read_bytes() for file in cache.iterdir()}
    asked.clear()
    assert run("moving", **moving) == without_cache and asked["reference"] >= 6
    assert {file: file.read_bytes() for file in cache.iterdir()} == before
    wrong = run("wrong", **settings)  # what it would have read is wrong enough to show
    assert wrong[0]["loss"] != pytest.approx(fixed[0]["loss"], abs=1e-3)


def test_tau_beyond_the_last_step_never_moves_and_is_the_same_to_the_bit(run, cache, asked):
    fixed = run("fixed")
    asked.clear()
    late = run("late", reference="soft", alpha=0.5, tau=7)
    assert asked["reference"] == 0 and without(late, "alpha", "tau") == without(fixed, "alpha", "tau")
    run("in time", reference="soft", alpha=0.5, tau=6)
    assert asked["reference"] == 6


def test_what_the_numbers_depend_on_is_in_the_key(run, cache, asked):
    """Each of these gives another file; another output or learning rate does not."""
    changes = [{}, {"logps": "mean"}, {"dtype": "bfloat16"}, {"max_prompt_tokens": 5},
               {"max_completion_tokens": 3}, {"tuning": "lora"}, {"method": "kto"}]
    for i, change in enumerate(changes):
        run(f"run {i}", **{"method": "ipo", "beta": 0.3, "max_steps": 1} | change)
        assert len(list(cache.iterdir())) == i + 1, change
    run("rate", method="dpo", max_steps=1, learning_rate=1e-5)
    assert len(list(cache.iterdir())) == len(changes)


def test_another_4_bit_type_of_the_same_weights_is_another_start(run, cache, asked):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 4-bit models here")
    settings = {"max_steps": 1, "tuning": "qlora"}
    computed, _ = run("uncached", cache=False, **settings), run("lora", **settings | {"tuning": "lora"})
    assert run("qlora", **settings)[0]["loss"] == pytest.approx(computed[0]["loss"], abs=1e-5)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
                                    {"num_attention_heads": 2}], ids=["rope", "heads"])
def test_the_same_weights_with_another_config_are_another_start(run, cache, asked, change):
    """A changed config.json changes log-probs, and no hash of weights knows it."""
    run("before", max_steps=1)
    path = run.folder / "model" / "config.json"
    config = json.loads(path.read_text()) | change
    if "rope_parameters" in change:
        config["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    path.write_text(json.dumps(config))
    asked.clear()
    rows = run("after", max_steps=1)
    assert asked["reference"] > 0 and abs(rows[0]["logratio/chosen"]) < 1e-5  # of one model with itself


def test_another_start_of_the_same_shape_is_another_start(run, cache, asked):
    run("before", max_steps=1)
    tiny_neox(seed=5).save_pretrained(run.folder / "model")
    rows = run("after", max_steps=1)
    assert abs(rows[0]["logratio/chosen"]) < 1e-5 and len(list(cache.iterdir())) == 2


def test_a_copy_of_the_start_is_the_same_start(run, cache, asked):
    run("before", max_steps=1)
    shutil.copytree(run.folder / "model", run.folder / "copy")
    asked.clear()
    run("after", max_steps=1, model=str(run.folder / "copy"))
    assert asked["reference"] == 0


def test_a_reference_that_learns_from_a_damaged_cache_is_said_and_right(run, cache, asked, capsys):
    first = run("first")
    [file] = cache.iterdir()
    damage_bits(file)
    assert run("second") == first and "cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [
    {}, {"tuning": "lora", "lora_dropout": 0.2}, {"method": "kto", "micro_batch_size": 2},
    {"method": "kto"}], ids=["full", "lora", "kto", "kto in one pass"])
def test_a_run_that_is_resumed_without_its_cache_is_bit_equal(run, cache, settings):
    straight = run("straight", **settings)
    shutil.copytree(run.folder / "straight", run.folder / "resumed")
    for folder in checkpoints(run.folder / "resumed"):
        if folder.name == "checkpoint-6":
            shutil.rmtree(folder)
    shutil.rmtree(cache)
    tr.train(run.settings("resumed", **settings), resume=True)
    assert metrics(run.folder / "resumed") == straight
    assert cache.exists()
