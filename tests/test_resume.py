"""A run that was killed, wherever, and resumed is bit-equal to one that never stopped."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import metrics, tiny_llama, tiny_neox, tiny_run, write_model, write_pairs
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

import tralign_mini as tr
from tralign_mini import runs
from tralign_mini.checkpoint import (
    SEAL,
    checkpoints,
    read_seal,
    restore_policy,
    save_policy,
    write_seal,
)

trainer_module = importlib.import_module("tralign_mini.train")
ARCHITECTURES = {"neox": tiny_neox, "llama": tiny_llama}
REFERENCES = {
    "fixed": {"reference": "fixed"},
    "soft": {
        "reference": "soft",
        "alpha": 0.3,
        "tau": 1,
    },  # its adapter is full, and compressed, from step 5 on
    "hard": {"reference": "hard", "tau": 3},  # the kill falls between two updates
}

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def settings_of(folder, architecture="neox", tuning="full", reference="soft", **changes):
    settings = {"tuning": tuning, "max_steps": 7, "save_steps": 4, "eval_prompts": 2, "warmup_steps": 3}
    settings |= {"lora_dropout": 0.2} if tuning != "full" else {}
    settings |= REFERENCES[reference] | changes
    return tiny_run(folder / architecture, ARCHITECTURES[architecture](), **settings)


def straight(folder, *names, **changes):
    """A run that never stopped, made once; (settings, directory)."""
    settings = settings_of(folder, *names, **changes)
    name = "-".join([*names, *(f"{key}={value}" for key, value in changes.items())]) or "plain"
    directory = folder / "straight" / name
    if not directory.exists():
        tr.train(settings, output=str(directory))
    return settings, directory


def kill_after(directory, step, output):
    """A copy of a run as a kill after the checkpoint of `step` leaves it: rows beyond it are there."""
    shutil.copytree(directory, output)
    for found in checkpoints(output):
        if int(found.name.split("-")[1]) > step:
            shutil.rmtree(found)
    assert checkpoints(output)[-1].name == f"checkpoint-{step}"
    for name in ("samples.jsonl", "report.md"):
        (output / name).unlink(missing_ok=True)
    return output


def assert_equal_runs(one, other):
    """Bit-equal metrics, samples, policy and reference."""
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    ends = [checkpoints(directory)[-1] for directory in (one, other)]
    assert ends[0].name == ends[1].name
    assert read_seal(ends[0]) == read_seal(ends[1])
    for name in ("reference.safetensors", "reference.json"):
        files = [end / "reference" / name for end in ends]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


# ---------------------------------------------------------------- killed and resumed equals straight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_resumed_equals_straight(folder, tmp_path, tuning, reference, architecture):
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    settings, directory = straight(folder, architecture, tuning, reference)
    output = kill_after(directory, 4, tmp_path / "run")
    before = metrics(output)
    assert [row["step"] for row in before] == list(range(1, 8))
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[4:] = [line.replace('"loss": ', '"loss": 1') for line in lines[4:]]  # so that an old row would show
    (output / "metrics.jsonl").write_text("".join(lines))
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "kto"},
        {"method": "kto", "tuning": "lora", "micro_batch_size": 2},
        {"method": "ipo", "micro_batch_size": 4},
        {"method": "sft", "reference": "fixed", "alpha": None, "tau": None},
        {"method": "simpo", "reference": "fixed", "alpha": None, "tau": None, "gradient_checkpointing": True},
        {"tuning": "lora", "micro_batch_size": 1, "lora_dropout": 0.5},
        {"lr_scheduler": "cosine", "weight_decay": 0.1, "warmup_steps": 5},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values() if value is not None),
)
def test_resumed_equals_straight_with_other_settings(folder, tmp_path, changes):
    settings, directory = straight(folder, **changes)
    output = kill_after(directory, 4, tmp_path / "run")
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


@pytest.mark.parametrize("step", [3, 6])
def test_resuming_within_and_across_epochs(folder, tmp_path, step):
    """36 pairs in batches of 8: epochs end within the steps 5 and 9; resumed before both, and between."""
    settings, directory = straight(folder, tuning="lora", lora_dropout=0.2, max_steps=10, save_steps=step)
    assert metrics(directory)[-1]["epoch"] > 2
    if step == 3:  # only two checkpoints are kept: stop a run of its own there
        settings, output = settings | {"output": str(tmp_path / "run")}, tmp_path / "run"
        tr.train(settings, stop=Stop(3))
    else:
        output = kill_after(directory, step, tmp_path / "run")
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


def test_a_run_can_be_killed_again_and_again(folder, tmp_path):
    settings, directory = straight(folder, tuning="lora", lora_dropout=0.2)
    output = tmp_path / "run"
    for more, step in ((2, 2), (1, 3), (3, 6)):
        tr.train(settings, output=str(output), resume=True, stop=Stop(more))
        assert metrics(output)[-1]["step"] == step
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


# ---------------------------------------------------------------- killed anywhere


def run_until_killed(settings, output):
    """Checkpoints after the steps 2, 4 and 6; returns what is left."""
    with pytest.raises(Killed):
        tr.train(settings, output=str(output), save_steps=2)
    return output


def kill(*args, **kwargs):
    raise Killed


def test_killed_between_two_steps(folder, tmp_path, monkeypatch):
    settings, directory = straight(folder)
    on_step_end = trainer_module.TrustRegionCallback.on_step_end

    def kill_in_step_6(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 6:  # the reference has moved, row and checkpoint are not written
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.TrustRegionCallback, "on_step_end", kill_in_step_6)
        output = run_until_killed(settings, tmp_path / "run")
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4, 5]
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(
    "where", ["in the weights", "before the reference", "in the reference", "before the seal"]
)
def test_killed_while_a_checkpoint_is_written(folder, tmp_path, monkeypatch, where, tuning):
    settings, directory = straight(folder, tuning=tuning)
    saves = {kind: kind.save for kind in (tr.FrozenReference, tr.AdapterReference)}

    def half(file):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        raise Killed

    def kill_in_weights(policy, target):
        save_policy(policy, target)
        if target.name == "checkpoint-6":
            half(next(target.glob("*model.safetensors")))

    def kill_at_reference(self, target):
        if target.parent.name == "checkpoint-6" and where == "before the reference":
            raise Killed
        saves[type(self)](self, target)
        if target.parent.name == "checkpoint-6":
            half(target / "reference.safetensors")

    def kill_at_seal(target, content):
        if target.name == "checkpoint-6":
            raise Killed
        write_seal(target, content)

    with monkeypatch.context() as patch:
        if where == "in the weights":
            patch.setattr(trainer_module, "save_policy", kill_in_weights)
        elif where == "before the seal":
            patch.setattr(trainer_module, "write_seal", kill_at_seal)
        else:
            for kind in saves:
                patch.setattr(kind, "save", kill_at_reference)
        output = run_until_killed(settings, tmp_path / "run")
    torn = output / "checkpoints" / "checkpoint-6"
    assert torn.exists() and not (torn / SEAL).exists()
    assert tr.Run(output).last_checkpoint.name == "checkpoint-4"
    assert metrics(output)[-1]["step"] == 6
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


def test_killed_in_the_middle_of_a_line(folder, tmp_path):
    settings, directory = straight(folder)
    output = kill_after(directory, 4, tmp_path / "run")
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][: len(lines[5]) // 2])
    assert list(tr.Run(output).history["step"]) == [1, 2, 3, 4, 5]  # and it can be looked at
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


def test_killed_before_the_first_checkpoint(folder, tmp_path, capsys):
    settings, directory = straight(folder)
    output = tmp_path / "run"
    shutil.copytree(directory, output)
    shutil.rmtree(output / "checkpoints")
    (output / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint yet.*resume=true"):
        tr.Run(output).policy  # noqa: B018
    tr.train(settings, output=str(output), resume=True)
    assert "resuming from the beginning" in capsys.readouterr().out
    assert_equal_runs(output, directory)


@pytest.mark.parametrize("when", ["before the samples", "in the report"])
def test_killed_after_the_last_step(folder, tmp_path, monkeypatch, when):
    settings, directory = straight(folder)
    with monkeypatch.context() as patch:
        if when == "before the samples":
            patch.setattr(runs, "write_samples", kill)
        else:
            patch.setattr(tr.Run, "report", kill)
        output = run_until_killed(settings, tmp_path / "run")
    reports = []
    monkeypatch.setattr(tr.AlignmentTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(tr.Run, "report", lambda self: reports.append(self.directory))
    tr.train(settings, output=str(output), resume=True)
    assert reports == [output]
    assert_equal_runs(output, directory)


def test_killed_while_resuming_rewrites_the_metrics(folder, tmp_path, monkeypatch):
    settings, directory = straight(folder)
    output = kill_after(directory, 4, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", kill)
        with pytest.raises(Killed):
            tr.train(settings, output=str(output), resume=True)
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


def test_a_process_killed_by_the_system(folder, tmp_path):
    settings, directory = straight(folder, tuning="lora", lora_dropout=0.2)
    output = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, time\n"
        "import conftest, tralign_mini as tr\n"
        "from tralign_mini.train import TrustRegionCallback\n"
        "def wait(self, args, state, *others, **more):\n"
        "    time.sleep(99 * (state.global_step == 5))\n"
        "TrustRegionCallback.on_step_begin = wait\n"
        "tr.train(json.loads(sys.argv[1]))\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, str(script), json.dumps(settings | {"output": str(output)})]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 180
    file = output / "metrics.jsonl"
    while process.poll() is None and time.time() < deadline:
        if file.exists() and len(file.read_text().splitlines()) == 5:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4, 5]
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


def test_a_torn_checkpoint_never_displaces_a_whole_one(folder, tmp_path, monkeypatch):
    """Trainer keeps the two newest folders: one that was cut off must not be counted among them."""
    settings, directory = straight(folder)
    output = kill_after(directory, 4, tmp_path / "run")
    torn = output / "checkpoints" / "checkpoint-5"
    shutil.copytree(output / "checkpoints" / "checkpoint-4", torn)
    (torn / SEAL).unlink()
    os.utime(torn, (time.time() + 9, time.time() + 9))
    whole = []

    def watched(target, content):
        whole.append([found.name for found in checkpoints(output)])
        write_seal(target, content)

    monkeypatch.setattr(trainer_module, "write_seal", watched)
    tr.train(settings, output=str(output), resume=True)
    assert whole == [["checkpoint-4"]]
    assert_equal_runs(output, directory)


# ---------------------------------------------------------------- stopped on purpose


class Stop(threading.Event):
    """An event that somebody sets while the `steps`-th step from now is running."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def is_set(self):  # asked once after each step
        self.steps -= 1
        return self.steps <= 0


def test_a_stopped_run_resumes_bit_equal(folder, tmp_path):
    settings, directory = straight(folder)
    output, stop = tmp_path / "run", threading.Event()
    stop.set()
    run = tr.train(settings, output=str(output), stop=stop)
    assert len(run.history) == 1 and run.last_checkpoint.name == "checkpoint-1"
    assert not (output / "samples.jsonl").exists()  # it is not finished
    tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)


def test_a_stop_that_nobody_asks_for_changes_nothing(folder, tmp_path):
    settings, directory = straight(folder)
    tr.train(settings, output=str(tmp_path / "run"), stop=threading.Event())
    assert_equal_runs(tmp_path / "run", directory)


def test_resuming_a_finished_run_does_not_train_again(folder, tmp_path, monkeypatch):
    settings, directory = straight(folder)
    output = shutil.copytree(directory, tmp_path / "run")
    monkeypatch.setattr(tr.AlignmentTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    run = tr.train(settings, output=str(output), resume=True)
    assert_equal_runs(output, directory)
    assert len(run.history) == 7


def test_resume_without_a_run_begins_one_and_says_so(folder, tmp_path, capsys):
    settings, directory = straight(folder)
    tr.train(settings, output=str(tmp_path / "run"), resume=True)
    assert "there is no run in" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "run", directory)
    assert tr.Run(tmp_path / "run").recipe.resume is False


# ---------------------------------------------------------------- refused


def contents(directory):
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_without_resume_an_existing_run_is_not_touched(folder):
    settings, directory = straight(folder)
    before = contents(directory)
    with pytest.raises(ValueError, match="already holds a run.*resume=true.*nothing was changed"):
        tr.train(settings, output=str(directory))
    assert contents(directory) == before


def test_other_settings_are_refused_by_name_and_nothing_is_touched(folder):
    settings, directory = straight(folder)
    before = contents(directory)
    with pytest.raises(ValueError, match=r"beta: 0\.05 then, 0\.1 now, max_steps: 7 then, 9 now"):
        tr.train(settings | {"beta": 0.1, "max_steps": 9}, output=str(directory), resume=True)
    assert contents(directory) == before


def test_how_often_to_save_may_change(folder, tmp_path):
    settings, directory = straight(folder)
    output = kill_after(directory, 4, tmp_path / "run")
    tr.train(settings | {"save_steps": 1}, output=str(output), resume=True)
    assert_equal_runs(output, directory)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_another_start_model_is_refused(tmp_path, tuning):
    settings = settings_of(tmp_path, tuning=tuning)
    tr.train(settings, stop=Stop(2))
    changed = tiny_neox()
    with torch.no_grad():
        changed.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.mul_(1.001)
    write_model(Path(settings["model"]), changed)
    with pytest.raises(ValueError, match="the model that .* is not the same any more"):
        tr.train(settings, resume=True)
    write_model(Path(settings["model"]))
    assert len(tr.train(settings, resume=True).history) == 7


def test_other_data_are_refused(tmp_path):
    settings = settings_of(tmp_path)
    tr.train(settings, stop=Stop(2))
    data = Path(settings["data"])
    write_pairs(data, 40, seed=1)
    with pytest.raises(ValueError, match="the data that .* is not the same any more"):
        tr.train(settings, resume=True)
    write_pairs(data, 40)
    assert len(tr.train(settings, resume=True).history) == 7


# ---------------------------------------------------------------- the checkpoints of a run


def test_the_head_of_a_resumed_run_is_that_of_its_checkpoint(folder, tmp_path, monkeypatch):
    settings, directory = straight(folder)
    output = kill_after(directory, 4, tmp_path / "run")
    heads = []

    def watched(policy, target):
        restore_policy(policy, target)
        heads.append(policy.get_output_embeddings().weight.detach().clone())

    monkeypatch.setattr(trainer_module, "restore_policy", watched)
    tr.train(settings, output=str(output), resume=True)
    stored = load_file(directory / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert torch.equal(heads[0], stored["embed_out.weight"])
    assert not torch.equal(heads[0], tiny_neox().get_output_embeddings().weight)


def test_a_checkpoint_is_safetensors_and_json_but_for_trainers_own_state(folder):
    _, directory = straight(folder)
    files = [file for file in checkpoints(directory)[-1].rglob("*") if file.is_file()]
    others = {file.name: file for file in files if file.suffix not in (".safetensors", ".json")}
    assert others.keys() == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for file in others.values():  # readable without running any code
        with safe_globals():
            torch.load(file, weights_only=True)


def test_two_checkpoints_are_kept(folder):
    _, directory = straight(folder, lr_scheduler="constant", save_steps=2)
    assert [found.name for found in checkpoints(directory)] == ["checkpoint-6", "checkpoint-7"]
    assert len(list((directory / "checkpoints").iterdir())) == 2
