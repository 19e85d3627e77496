"""KL is measured on the policy's own samples, where it is due, and measuring leaves no trace."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers import logps_by_hand, metrics, run_once, tiny_neox, tiny_run, without

import tralign_mini as tr
from tralign_mini.evaluate import Evaluator


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """The directories whose report was asked for; none is written."""
    asked = []
    monkeypatch.setattr(tr.Run, "report", lambda self: asked.append(self.directory))
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_kl_is_the_mean_log_ratio_on_the_policys_own_samples(tmp_path, monkeypatch, tuning):
    """Measured once more by hand: sampled again with the same seed, scored one by one."""
    by_hand = {}

    def measure(self, trainer, step, call=Evaluator.__call__):
        policy, pad = trainer.policy, self.tokenizer
        drawn = tr.sample(policy, pad, self.prompts, max_completion_tokens=8, max_prompt_tokens=16, seed=step)
        policy.eval()
        own = logps_by_hand(policy, drawn.sequences)
        with trainer.reference.using() as reference:
            by_hand["kl/reference"] = (own - logps_by_hand(reference, drawn.sequences)).mean().item()
        by_hand["kl/initial"] = (own - logps_by_hand(tiny_neox(), drawn.sequences)).mean().item()
        policy.train()
        return call(self, trainer, step)

    monkeypatch.setattr(Evaluator, "__call__", measure)
    settings = tiny_run(
        tmp_path, reference="soft", tau=5, tuning=tuning, learning_rate=3e-3, max_steps=8, eval_steps=99
    )
    row = metrics(tr.train(settings).directory)[-1]
    assert row["kl/initial"] == pytest.approx(by_hand["kl/initial"], abs=1e-5)
    assert row["kl/reference"] == pytest.approx(by_hand["kl/reference"], abs=1e-5)
    assert row["kl/initial"] > 0.01 and row["kl/initial"] != pytest.approx(row["kl/reference"], rel=0.01)


@pytest.mark.parametrize(("tuning", "tolerance"), [("full", 0), ("lora", 1e-5)])
def test_kl_to_the_reference_is_zero_right_after_a_hard_update(folder, tuning, tolerance):
    rows = run_once(folder, f"hard-4-{tuning}", reference="hard", tau=4, tuning=tuning)
    for row in (rows[3], rows[7]):
        assert abs(row["kl/reference"]) <= tolerance
        assert abs(row["kl/initial"]) > 1e-3


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_measuring_leaves_no_trace(folder, monkeypatch, tuning):
    settings = {"tuning": tuning, "reference": "soft", "alpha": 0.3, "lora_dropout": 0.3}

    def watched(self, trainer, step, call=Evaluator.__call__):
        def state():
            policy = trainer.policy
            return (
                [m.training for m in policy.modules()],
                [p.requires_grad for p in policy.parameters()],
                getattr(policy, "active_adapter", None),
                random.getstate(),
                torch.get_rng_state().tolist(),
            )

        before = state()
        row = call(self, trainer, step)
        assert state() == before
        return row

    monkeypatch.setattr(Evaluator, "__call__", watched)
    often = run_once(folder, f"often-{tuning}", eval_steps=1, **settings)
    rarely = run_once(folder, f"rarely-{tuning}", eval_steps=1000, **settings)
    measured = ("kl/initial", "kl/reference", "length/completion")
    assert all("kl/initial" in row for row in often)
    assert without(often, *measured) == without(rarely, *measured)


def test_dropout_of_the_adapter_acts(folder):
    """Otherwise the test above, and those of resuming, could not see a disturbed random state."""
    with_it = run_once(
        folder, "rarely-lora", tuning="lora", reference="soft", alpha=0.3, lora_dropout=0.3, eval_steps=1000
    )
    without_it = run_once(folder, "no-dropout", tuning="lora", reference="soft", alpha=0.3, eval_steps=1000)
    assert with_it[-1]["loss"] != without_it[-1]["loss"]


def test_a_finished_run_is_sampled_again_and_reported(tmp_path, reports):
    run = tr.train(tiny_run(tmp_path, learning_rate=3e-3, eval_prompts=2))

    def rows():
        return [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]

    first = rows()
    tr.evaluate(run.directory)  # opened from disk, with the run's own seed
    assert rows() == first
    tr.evaluate(run, prompts=4, seed=7)
    assert [row["prompt"] for row in rows()][:2] == [row["prompt"] for row in first] == run.held_out_prompts()
    assert [row["policy"] for row in rows()][:2] != [row["policy"] for row in first]
    assert reports == [run.directory] * 3


def test_a_reward_model_has_no_answers_to_evaluate(tmp_path, reports):
    run = tr.train(tiny_run(tmp_path, method="reward", max_steps=1))
    with pytest.raises(ValueError, match="is a reward model: it writes no answers"):
        tr.evaluate(run)
