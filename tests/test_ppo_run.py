"""A PPO run: its directory, resuming to the bit, guard rails, a reference that moves."""

from __future__ import annotations

import json
import math
import shutil
import threading

import pytest
from helpers import metrics
from peft import AutoPeftModelForCausalLM
from ppo_helpers import ppo_recipe, ppo_settings, says_w5, tiny_reward_model
from transformers import AutoModelForCausalLM

import tralign_mini as tr
from tralign_mini.checkpoint import checkpoints, read_seal
from tralign_mini.ppo_recipe import PPORecipe
from tralign_mini.ppo_run import learning_rate, train_ppo
from tralign_mini.recipe import Recipe, RecipeError

REFERENCES = {"fixed": {}, "soft": {"reference": "soft", "alpha": 0.3, "tau": 2},
              "hard": {"reference": "hard", "tau": 2}}
RUNS = [("full", "soft"), ("full", "fixed"), ("lora", "hard"), ("lora", "soft")]
COLUMNS = """loss/policy loss/value reward/mean reward/model kl/sequence kl/k3 kl/update entropy clip_fraction
    ratio/max value/explained_variance kl_coef eos_rate length/rollout learning_rate grad_norm
    reference_updates""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ppo")


def straight(folder, tuning="full", reference="soft"):
    """A run that never stopped, made once; (settings, directory)."""
    settings = ppo_settings(folder, tuning=tuning, save_steps=2, eval_prompts=2, eval_steps=3, warmup_steps=2,
                            kl_target=0.5, **REFERENCES[reference])
    directory = folder / f"{tuning}-{reference}"
    if not directory.exists():
        train_ppo(settings, reward=says_w5, output=str(directory))
    return settings, directory


# ---------------------------------------------------------------- what a run leaves


def test_a_run_is_an_ordinary_run(folder):
    settings, directory = straight(folder)
    run = tr.Run(directory)
    rows = metrics(directory)
    assert isinstance(run.recipe, PPORecipe) and [row["step"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert row.keys() >= set(COLUMNS)
        assert row["ratio/first"] == 1.0 and row["ratio/max"] > 1
        measured = row["step"] % 3 == 0
        assert ("kl/initial" in row) == ("kl/reference" in row) == ("length/completion" in row) == measured
    assert [row["reference_updates"] for row in rows] == [0, 1, 1, 2, 2, 3]
    assert [row["epoch"] for row in rows] == pytest.approx([8 * i / 38 for i in range(1, 7)], abs=1e-6)
    assert [folder.name for folder in checkpoints(directory)] == ["checkpoint-4", "checkpoint-6"]
    assert "PPO on pairs.jsonl, soft reference" in (directory / "report.md").read_text()
    assert len((directory / "samples.jsonl").read_text().splitlines()) == 2
    # the checkpoint is the policy: plain transformers loads it, and Run gives the same
    loaded = AutoModelForCausalLM.from_pretrained(run.last_checkpoint)
    assert all((a == b).all() for a, b in zip(loaded.parameters(), run.policy.parameters()))
    assert run.reference.updates == 3
    assert list(tr.compare([directory]).table["method"])[-1] == "TR-PPO"


def test_lora_run_saves_the_policys_adapter_alone(folder):
    _, directory = straight(folder, "lora", "fixed")
    last = checkpoints(directory)[-1]
    assert not [path for path in last.iterdir() if path.name in ("value", "reward")]
    loaded = AutoPeftModelForCausalLM.from_pretrained(last)
    assert list(loaded.peft_config) == ["default"]
    assert any(weight.any() for name, weight in loaded.named_parameters() if "lora_B" in name)


def test_kl_coefficient_follows_the_target(folder):
    rows = metrics(straight(folder)[1])
    for before, after in zip(rows, rows[1:]):
        error = max(-0.2, min(before["kl/sequence"] / 0.5 - 1, 0.2))
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + 0.1 * error))
    assert rows[0]["kl_coef"] == 0.05


# ---------------------------------------------------------------- the reference


def test_reference_moves_when_due(folder):
    """Straight after a hard update the KL to the reference is 0; with a fixed one it grows from the start."""
    hard = metrics(straight(folder, "full", "hard")[1])
    assert [row["kl/sequence"] == 0 for row in hard] == [True, False, True, False, True, False]
    assert all(row["kl/k3"] == 0 for row in hard[::2]) and all(row["kl/k3"] > 0 for row in hard[1::2])
    fixed = metrics(straight(folder, "full", "fixed")[1])
    assert fixed[0]["kl/k3"] == 0 and all(row["kl/k3"] > 0 for row in fixed[1:])
    assert fixed[0]["reference_updates"] == fixed[-1]["reference_updates"] == 0
    # up to the first move they are one run
    assert [row["loss"] for row in hard[:2]] == [row["loss"] for row in fixed[:2]]
    assert hard[2]["reward/mean"] != fixed[2]["reward/mean"]


def test_lora_reference_starts_at_the_policy_and_moves(folder):
    rows = metrics(straight(folder, "lora", "hard")[1])
    assert [abs(row["kl/sequence"]) < 1e-5 for row in rows] == [True, False, True, False, True, False]


# ---------------------------------------------------------------- killed and resumed equals straight


@pytest.mark.parametrize(("tuning", "reference"), RUNS)
def test_resumed_equals_straight(folder, tmp_path, no_report, tuning, reference):
    settings, directory = straight(folder, tuning, reference)
    output = tmp_path / "run"
    shutil.copytree(directory, output)
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    (output / "samples.jsonl").unlink()
    rows = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(rows[:5]) + '{"step": 6, "lo')  # cut off by the kill
    train_ppo(str(output), reward=says_w5, resume=True)
    assert metrics(output) == metrics(directory)
    assert (output / "samples.jsonl").read_bytes() == (directory / "samples.jsonl").read_bytes()
    ends = [checkpoints(d)[-1] for d in (output, directory)]
    assert read_seal(ends[0]) == read_seal(ends[1])
    for name in ("ppo.safetensors", "reference/reference.safetensors", "reference/reference.json"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


def test_stopped_and_resumed_equals_straight(folder, tmp_path, no_report):
    settings, directory = straight(folder)
    output, stop = tmp_path / "run", threading.Event()

    def reward(prompts, texts):
        reward.calls += 1
        if reward.calls == 3:  # the rollout of the third iteration
            stop.set()
        return says_w5(prompts, texts)

    reward.calls = 0
    run = train_ppo(settings, reward=reward, stop=stop, output=str(output))
    assert len(run.history) == 2 and run.last_checkpoint.name == "checkpoint-2"
    assert not (output / "samples.jsonl").exists()
    train_ppo(settings, reward=says_w5, output=str(output), resume=True)
    assert metrics(output) == metrics(directory)


def test_a_resume_with_other_prompts_is_refused(folder, tmp_path):
    settings, directory = straight(folder)
    output = tmp_path / "run"
    shutil.copytree(directory, output)
    prompts = [f"w{i} w3" for i in range(5, 40)]
    with pytest.raises(ValueError, match="the data that .* is not the same any more"):
        train_ppo(settings, reward=says_w5, output=str(output), resume=True, prompts=prompts)


# ---------------------------------------------------------------- guard rails


@pytest.mark.parametrize(("settings", "message"), [
    ({"max_kl": 2.0, "learning_rate": 0.003, "kl_coef": 0.0}, "KL explosion, .* max_kl=2"),
    ({"min_entropy": 2.0, "learning_rate": 0.05, "kl_coef": 0.0}, "entropy collapse, .* min_entropy=2"),
])
def test_guard_rails_stop_and_the_last_checkpoint_is_from_before(tmp_path, no_report, settings, message):
    settings = ppo_settings(tmp_path, save_steps=1, **settings) | {"max_steps": 30}
    with pytest.raises(FloatingPointError, match=message) as error:
        train_ppo(settings, reward=says_w5)
    run = tr.Run(tmp_path / "run")
    steps = len(run.history)
    assert steps < 30 and f"after step {steps}" in str(error.value)
    assert str(run.last_checkpoint) in str(error.value)
    assert run.last_checkpoint.name == f"checkpoint-{steps - 1}"  # not the policy that went wrong
    assert run.policy is not None  # whole: its hash is checked


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path, no_report):
    def reward(prompts, texts):
        reward.calls += 1
        return [math.nan if reward.calls > 4 else value for value in says_w5(prompts, texts)]

    reward.calls = 0
    with pytest.raises(FloatingPointError, match="after step 4: reward/mean is nan"):
        train_ppo(ppo_settings(tmp_path, save_steps=2), reward=reward)
    run = tr.Run(tmp_path / "run")
    assert run.last_checkpoint.name == "checkpoint-2" and len(run.history) == 4
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    train_ppo(str(tmp_path / "run"), reward=says_w5, resume=True)
    assert len(tr.Run(tmp_path / "run").history) == 6


# ---------------------------------------------------------------- reward model, stage before, own prompts


def test_train_dispatches_and_a_reward_model_is_maximised(tmp_path):
    reward = tiny_reward_model(tmp_path / "reward")
    settings = ppo_settings(tmp_path, reward_model=str(reward), kl_coef=0.01)
    settings |= {"max_steps": 12, "learning_rate": 5e-3}
    run = tr.train(settings)
    rewards = run.history["reward/model"]
    assert rewards.iloc[-3:].mean() > rewards.iloc[:3].mean() + 0.1
    assert run.recipe.reward_model == str(reward)


def test_stage_two_starts_from_a_stage_one_adapter(tmp_path, no_report):
    """A LoRA run's checkpoint as `model`: initial policy and reference are that adapter, not the base."""
    first = train_ppo(ppo_settings(tmp_path, tuning="lora", output=str(tmp_path / "one")), reward=says_w5)
    prompts = [f"w{i} w3" for i in range(10, 40)]
    second = train_ppo(ppo_settings(tmp_path, tuning="lora", eval_steps=1, model=str(first.last_checkpoint),
                                    output=str(tmp_path / "two")), reward=says_w5, prompts=prompts)
    rows = metrics(second.directory)
    assert abs(rows[0]["kl/sequence"]) < 1e-5  # the reference is the start
    assert all(row["kl/initial"] == pytest.approx(row["kl/reference"], abs=1e-4) for row in rows)
    report = json.loads((tmp_path / "two" / "data_report.json").read_text())
    assert report["different prompts to train on"] == 30


def test_qlora_trains(tmp_path, no_report):
    pytest.importorskip("bitsandbytes")
    run = train_ppo(ppo_settings(tmp_path, tuning="qlora") | {"max_steps": 2}, reward=says_w5)
    assert all(row["ratio/first"] == 1.0 for row in metrics(run.directory))
    assert any(weight.any() for name, weight in run.policy.named_parameters() if "lora_B.default" in name)


def test_held_out_prompts_are_not_trained_on(tmp_path, no_report):
    seen = set()

    def reward(prompts, texts):
        seen.update(prompts)
        return says_w5(prompts, texts)

    run = train_ppo(ppo_settings(tmp_path), reward=reward)
    assert seen and not seen & set(run.held_out_prompts())


def test_prompts_given_in_python_are_not_evaluated_on(tmp_path, no_report):
    prompts = [f"w{i} w{i + 1}" for i in range(3, 23)]
    rows = [json.dumps({"prompt": prompt, "chosen": "w5", "rejected": "w6"}) for prompt in prompts]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text("\n".join(rows))
    settings = ppo_settings(tmp_path, eval_data=str(tmp_path / "other"), eval_prompts=2)
    run = train_ppo(settings, reward=says_w5, prompts=prompts[8:])
    assert run.held_out_prompts(20) == prompts[:8]
    with pytest.raises(ValueError, match="prompts is the text 'w3 w4': it has to be a list"):
        train_ppo(settings, reward=says_w5, prompts="w3 w4", output=str(tmp_path / "other"))


# ---------------------------------------------------------------- settings and refusals


def test_recipe_round_trip_and_change_of_method(tmp_path):
    recipe = Recipe.load("little-tldr", method="ppo", kl_coef=0.1, minibatches=4)
    assert isinstance(recipe, PPORecipe) and recipe.kl_coef == 0.1
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path) == recipe and isinstance(recipe.replace(seed=3), PPORecipe)
    other = Recipe.load(tmp_path, method="dpo")
    assert type(other) is Recipe and other.method == "dpo"
    assert "prompts" in str(recipe.plan(1000)) and "KL coefficient 0.1" in str(recipe.plan(1000))
    assert [note for note in recipe.notes() if note.startswith("beta=0.3 is not used")]


@pytest.mark.parametrize(("settings", "message"), [
    ({"minibatches": 3}, "minibatches=3 does not divide batch_size=8"),
    ({"lora_dropout": 0.1, "tuning": "lora"}, "lora_dropout=0.1 with method=ppo"),
    ({"kl_coef": 0, "kl_target": 6}, "kl_target=6.0 with kl_coef=0"),
    ({"gamma": 0}, "gamma=0"), ({"lam": 1.1}, "lam=1.1"), ({"kl_coeff": 1}, "did you mean 'kl_coef'"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load({"model": "m", "data": "d", "method": "ppo", "batch_size": 8} | settings)


def test_nothing_to_maximise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="something to maximise"):
        train_ppo(ppo_settings(tmp_path))
    assert not (tmp_path / "run").exists()


def test_steering_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be steered"):
        tr.train(ppo_settings(tmp_path, reward_model="none"), control=lambda step: None)


def test_a_policy_is_no_reward(folder, tmp_path):
    _, directory = straight(folder)
    with pytest.raises(ValueError, match="run of method=ppo: it made a policy"):
        train_ppo(ppo_settings(tmp_path, reward_model=str(directory)))


@pytest.mark.parametrize(("scheduler", "expected"), [
    ("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
])
def test_learning_rate_by_hand(scheduler, expected):
    recipe = ppo_recipe(learning_rate=2.0, lr_scheduler=scheduler, warmup_steps=2)
    assert [learning_rate(recipe, step, 6) / 2 for step in range(6)] == pytest.approx(expected)
