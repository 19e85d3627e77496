"""From a recipe to a directory that holds everything of a run, and back from the directory."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    logps_by_hand,
    metrics,
    tiny_llama,
    tiny_neox,
    tiny_run,
    tiny_tokenizer,
    words,
    write_model,
    write_pairs,
)
from lora_helpers import adapted, dense
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tralign_mini as tr
from tralign_mini import models, runs
from tralign_mini.evaluate import Evaluator
from tralign_mini.generate import sample
from tralign_mini.worlds import data_directory

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """The directories whose report was asked for; none is written."""
    asked = []
    monkeypatch.setattr(tr.Run, "report", lambda self: asked.append(self.directory))
    return asked


@pytest.fixture
def trained_on(monkeypatch):
    """What the trainers of this test were given: (rows, evaluation prompts)."""
    seen = []

    class Watched(tr.AlignmentTrainer):
        def __init__(self, policy, reference, rows, *args, **kwargs):
            super().__init__(policy, reference, rows, *args, **kwargs)
            seen.append((rows, kwargs["evaluate"].prompts))

    monkeypatch.setattr(runs, "AlignmentTrainer", Watched)
    return seen


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------- a run and its directory


def test_a_run_leaves_everything_in_its_directory(tmp_path, reports, capsys):
    run = tr.train(tiny_run(tmp_path, reference="soft", tau=4))
    assert {path.name for path in run.directory.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "data_report.json", "checkpoints", "samples.jsonl"}
    assert reports == [run.directory]
    assert len(run.history) == 8 and repr(run).endswith("8 steps)")
    assert run.history["kl/initial"].notna().tolist() == [False, False, False, True] * 2
    printed = capsys.readouterr().out
    assert "every 4 steps: 2 updates" in printed and "rows out (dpo)" in printed
    assert "4 training rows with the same prompts are left out" in printed
    data = json.loads((run.directory / "data_report.json").read_text())
    assert data["rows_out"] == 36 and data["method"] == "dpo"
    assert not run.policy.training


def test_the_samples_are_those_of_the_two_policies(tmp_path):
    run = tr.train(tiny_run(tmp_path, learning_rate=3e-3, seed=5))
    rows = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    prompts = run.held_out_prompts()
    assert [row["prompt"] for row in rows] == prompts and len(prompts) == 4
    for who, model in (("policy", run.policy), ("initial", tiny_neox())):
        texts = sample(model, tiny_tokenizer(), prompts, max_completion_tokens=8, max_prompt_tokens=16,
                       seed=5).texts
        assert [row[who] for row in rows] == texts
    assert [row["policy"] for row in rows] != [row["initial"] for row in rows]


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
def test_a_run_opened_from_disk_has_the_same_policy_and_reference(tmp_path, tuning, make):
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    run = tr.train(tiny_run(tmp_path, make(), tuning=tuning, reference="soft", alpha=0.3, learning_rate=3e-3))
    opened = tr.Run(run.directory)
    assert opened.policy is not run.policy and not opened.policy.training
    assert torch.equal(logits(opened.policy), logits(run.policy))
    start = make() if tuning == "full" else models.load_policy(run.recipe).eval()
    assert (logits(start) - logits(run.policy)).abs().max() > 1e-3
    with opened.reference.using() as theirs, run.reference.using() as ours:
        assert torch.equal(logits(theirs), logits(ours))
        assert (logits(ours) - logits(start)).abs().max() > 1e-3
        between = logits(ours)
    assert (between - logits(run.policy)).abs().max() > 1e-5  # policy and reference are two
    assert opened.reference.updates == 8
    assert opened.tokenizer.eos_token_id == run.tokenizer.eos_token_id
    assert opened.recipe == run.recipe


def test_a_run_without_a_reference_has_none(tmp_path):
    run = tr.train(tiny_run(tmp_path, method="simpo", eval_prompts=1))
    assert run.reference is None and tr.Run(run.directory).reference is None


def test_relative_paths_become_absolute_so_that_a_run_is_readable_from_anywhere(tmp_path, monkeypatch):
    settings = tiny_run(tmp_path, model="model", data="pairs.jsonl", output="runs/one", eval_prompts=2)
    monkeypatch.chdir(tmp_path)
    tr.train(settings)
    stored = yaml.safe_load(Path("runs/one/recipe.yaml").read_text())
    assert stored["model"] == str(tmp_path / "model") and stored["data"] == str(tmp_path / "pairs.jsonl")
    monkeypatch.chdir("/")
    run = tr.Run(tmp_path / "runs" / "one")
    assert len(run.held_out_prompts()) == 2 and len(run.history) == 8
    assert logits(run.policy).isfinite().all()
    assert (
        len(
            tr.train(settings | {"model": stored["model"], "data": stored["data"]}, resume=True,
                     output=str(run.directory)).history
        )
        == 8
    )


def test_a_folder_by_the_name_of_a_world_does_not_hide_it(tmp_path, monkeypatch):
    """As in data/, where little-tldr is a folder, but not that of a model."""
    (tmp_path / "little-tldr").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []

    def stop(recipe):
        asked.append((recipe.model, recipe.data))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "split_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        tr.train({"model": "little-tldr"}, output=str(tmp_path / "run"))
    assert asked == [("little-tldr", "little-tldr")]


# ---------------------------------------------------------------- held-out prompts


def rows_of(folder, name, pairs, seed):
    """Pairs of which each prompt has two."""
    rng = random.Random(seed)
    rows = [{"prompt": f"w{3 + i // 2} w{3 + seed}"} | {s: words(rng, 1, 5) for s in ("chosen", "rejected")}
            for i in range(pairs)]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["prompt"] for row in rows]


def prompts_of(rows):
    return {tuple(row["prompt_ids"]) for row in rows}


def ids_of(prompts):
    return {tuple(tiny_tokenizer()(prompt)["input_ids"]) for prompt in prompts}


def test_without_a_test_split_prompts_leave_the_training_rows_with_all_their_pairs(tmp_path, trained_on):
    every = rows_of(tmp_path, "pairs", 60, 0)
    write_model(tmp_path / "model")
    settings = tiny_run(tmp_path, data=str(tmp_path / "pairs.jsonl"), eval_prompts=2, max_steps=2)
    run = tr.train(settings)
    [(rows, prompts)] = trained_on
    assert len(prompts) == 2 and run.held_out_prompts() == prompts
    assert not prompts_of(rows) & ids_of(prompts)
    assert len(rows) == 56 and prompts_of(rows) | ids_of(prompts) == ids_of(every)


def test_prompts_of_the_test_split_leave_the_training_rows_too(tmp_path, trained_on):
    data = tmp_path / "data"
    train = rows_of(data, "train", 40, 0)
    test = rows_of(data, "test", 8, 1)
    text = (data / "test.jsonl").read_text()
    shared = json.dumps({"prompt": train[0], "chosen": "w3", "rejected": "w4"}) + "\n"
    (data / "test.jsonl").write_text(shared + text)
    write_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl")
    tr.train(tiny_run(tmp_path, data=str(data), eval_prompts=3, max_steps=2))
    [(rows, prompts)] = trained_on
    assert prompts == [train[0], test[0], test[2]]  # the first different ones
    assert len(rows) == 38 and not prompts_of(rows) & ids_of(prompts)


def test_more_prompts_than_the_run_had_are_still_in_no_training_row(tmp_path, trained_on):
    rows_of(tmp_path, "pairs", 60, 0)
    write_model(tmp_path / "model")
    run = tr.train(tiny_run(tmp_path, data=str(tmp_path / "pairs.jsonl"), eval_prompts=1, max_steps=2))
    [(rows, prompts)] = trained_on
    assert not prompts_of(rows) & ids_of(run.held_out_prompts(3))
    assert run.held_out_prompts(3)[:1] == prompts


def test_a_damaged_test_split_is_an_error_and_not_a_missing_one(tmp_path):
    data = tmp_path / "data"
    rows_of(data, "train", 40, 0)
    (data / "test.jsonl").write_text('{"prompt": "w3", "chosen"')
    with pytest.raises(ValueError, match="test.jsonl, row 1: not valid JSON"):
        tr.train(tiny_run(tmp_path, data=str(data)))


def test_train_pairs_takes_the_first_of_the_seeded_order(tmp_path, trained_on):
    settings = tiny_run(tmp_path, eval_prompts=2, max_steps=1)
    for name, few, seed in (("all", None, 0), ("few", 16, 0), ("others", 16, 1)):
        tr.train(settings, output=str(tmp_path / name), train_pairs=few, seed=seed)
    everything, few, others = (rows for rows, _ in trained_on)
    assert len(everything) == 38 and few == everything[:16]
    assert prompts_of(few) != prompts_of(others)


# ---------------------------------------------------------------- from an adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT folder whose adapter changes the base a lot."""
    root = tmp_path_factory.mktemp("adapter")
    write_model(root / "base")
    base = models.load_base(str(root / "base"), torch.float32)
    adapted(base).save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_from_an_adapter_the_initial_policy_is_that_adapter_and_not_the_base(
    tmp_path, adapter, monkeypatch, tuning
):
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    by_hand = {}

    def measure(self, trainer, step, call=Evaluator.__call__):
        policy = trainer.policy.eval()
        drawn = sample(policy, self.tokenizer, self.prompts, max_completion_tokens=8, max_prompt_tokens=16,
                       seed=step)
        own = logps_by_hand(policy, drawn.sequences)
        start = models.load_policy(tr.Recipe(model=str(adapter), data="none", tuning=tuning)).eval()
        by_hand["adapter"] = (own - logps_by_hand(start, drawn.sequences)).mean().item()
        with start.disable_adapter():
            by_hand["base"] = (own - logps_by_hand(start, drawn.sequences)).mean().item()
        policy.train()
        return call(self, trainer, step)

    monkeypatch.setattr(Evaluator, "__call__", measure)
    settings = tiny_run(tmp_path, model=str(adapter), tuning=tuning, reference="soft", tau=3, eval_steps=99)
    run = tr.train(settings)
    last = metrics(run.directory)[-1]
    assert last["kl/initial"] == pytest.approx(by_hand["adapter"], abs=1e-4)
    assert abs(by_hand["base"] - by_hand["adapter"]) > 0.1
    first = metrics(run.directory)[0]
    assert first["logratio/chosen"] == pytest.approx(0, abs=1e-5)  # and so is the reference
    opened = tr.Run(run.directory)
    assert torch.equal(logits(opened.policy), logits(run.policy))
    for name, product in dense(opened.policy, "initial").items():
        assert torch.allclose(product, dense(run.policy, "initial")[name])


def test_a_checkpoint_is_a_folder_to_train_on_from(tmp_path, adapter):
    first = tr.train(tiny_run(tmp_path, tuning="lora", eval_prompts=1))
    second = tr.train(tiny_run(tmp_path, model=str(first.last_checkpoint), output=str(tmp_path / "second"),
                               tuning="lora", learning_rate=1e-30, max_steps=1, eval_prompts=1))
    assert torch.allclose(logits(second.policy), logits(first.policy), atol=1e-6)
    full = tr.train(tiny_run(tmp_path, output=str(tmp_path / "full"), eval_prompts=1))
    whole = AutoModelForCausalLM.from_pretrained(full.last_checkpoint).eval()
    assert torch.equal(logits(whole), logits(full.policy))


# ---------------------------------------------------------------- messages; nothing is left behind


def refused(folder, match, **settings):
    with pytest.raises(ValueError, match=match):
        tr.train(tiny_run(folder, **settings))
    assert not (folder / "run" / "recipe.yaml").exists()  # the output is still free


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError,
                       match=r"is not a run's directory: there is no recipe.yaml.*`output` folder"):
        tr.Run(tmp_path)


def test_an_output_that_is_taken(tmp_path):
    settings = tiny_run(tmp_path, max_steps=1, eval_prompts=1)
    tr.train(settings)
    with pytest.raises(ValueError, match=r"already holds a run.*resume=true.*another output"):
        tr.train(settings)


def test_a_longer_run_begins_at_the_weights_of_this_one(tmp_path):
    settings = tiny_run(tmp_path, max_steps=1, eval_prompts=1)
    run = tr.train(settings)
    with pytest.raises(ValueError, match=r"max_steps: 1 then, 2 now.*begin at its weights: model=") as caught:
        tr.train(settings, resume=True, max_steps=2)
    model = re.search(r"model=(\S+)-N\.", str(caught.value))[1] + "-1"
    more = tr.train(settings, model=model, output=str(tmp_path / "more"))
    assert more.history["logps/chosen"][0] != run.history["logps/chosen"][0]


def test_data_of_one_prompt_which_is_held_out(tmp_path):
    row = json.dumps({"prompt": "w3", "chosen": "w4", "rejected": "w5"})
    (tmp_path / "one.jsonl").write_text("\n".join([row] * 20))
    refused(tmp_path, "No row is left to train on. Is each prompt held out.*eval_data=FOLDER",
            data=str(tmp_path / "one.jsonl"))


def test_prompts_beyond_the_positions_of_the_model(tmp_path):
    refused(tmp_path, r"longest prompt has \d+ tokens.*more than the 128 positions.*Lower max_prompt_tokens",
            max_completion_tokens=126)


def test_a_tokenizer_without_eos(tmp_path):
    settings = tiny_run(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(settings["model"])
    refused(tmp_path, "no end-of-sequence token")


def test_an_adapter_in_full(tmp_path, adapter):
    refused(tmp_path, "is a PEFT adapter, and tuning=full", model=str(adapter))


def test_a_model_that_is_not_there(tmp_path):
    refused(tmp_path, r"could not be loaded; looked for as a local folder", model="./no-model")
    refused(tmp_path, r"could not be loaded; looked for .* Hub", model="nobody/no-model")


def test_an_adapter_with_dora_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    write_model(tmp_path / "base")
    base = models.load_base(str(tmp_path / "base"), torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    get_peft_model(base, config).save_pretrained(tmp_path / "dora")
    monkeypatch.setattr(tr.AlignmentTrainer, "train", lambda *args, **kwargs: pytest.fail("it was trained"))
    refused(tmp_path, "use_dora=True.*magnitude", model=str(tmp_path / "dora"), tuning="lora")


def test_data_of_the_wrong_kind(tmp_path):
    (tmp_path / "kto.jsonl").write_text(
        json.dumps({"prompt": "w3", "completion": "w4", "label": True}) + "\n")
    refused(tmp_path, "'dpo' needs the columns.*Use method=kto", data=str(tmp_path / "kto.jsonl"))


def test_data_smaller_than_a_batch(tmp_path):
    refused(tmp_path, "less than one batch of batch_size=64", batch_size=64)


# ---------------------------------------------------------------- the embedded default


@pytest.mark.skipif(
    not (data_directory("little-tldr") / "model" / "model.safetensors").exists()
    or not (data_directory("little-tldr") / "train.jsonl.gz").exists(),
    reason="the embedded world is not built here: python data/make.py makes it",
)
def test_the_embedded_default_makes_no_network_call(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a network call: {args}")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run = tr.train("little-tldr", max_steps=2, eval_prompts=4, batch_size=4, output=str(tmp_path / "run"),
                   micro_batch_size=4, train_pairs=16)
    opened = tr.Run(run.directory)
    assert opened.recipe.model == "little-tldr"
    assert run.history["gold/reward"].notna().iloc[-1]
    samples = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all({"gold_initial", "gold_policy"} <= row.keys() for row in samples)
    shutil.rmtree(run.directory)


def test_local_paths_are_made_absolute_and_names_are_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("little-tldr", "pairs.jsonl", "taste"):  # a folder does not hide the world of its name
        (tmp_path / name).mkdir()
    settings = {"method": "ppo", "eval_data": "pairs.jsonl", "reward_model": "taste", "max_steps": 1}
    recipe = runs.with_absolute_paths(tr.Recipe.load("little-tldr-ppo", **settings))
    assert (recipe.model, recipe.data) == ("little-tldr", "little-tldr")
    assert (recipe.eval_data, recipe.reward_model) == (str(tmp_path / "pairs.jsonl"), str(tmp_path / "taste"))
    assert runs.with_absolute_paths(recipe) == recipe
