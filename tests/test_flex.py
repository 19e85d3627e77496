"""FlexAttention for packed rows is tried in a run that is long enough, and taken if it is exact and faster.

There is no GPU to try it on, and on a CPU it has no gradient: a stand-in computes, with a whole mask, what
FlexAttention should from a block mask.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from engine_helpers import build, packed, random_groups, sequences_of
from helpers import assert_close, make_trainer, metrics, random_rows, tiny_tokenizer, write_model
from lora_helpers import adapted, shake
from torch.nn.attention.flex_attention import create_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tralign_mini import attention, flex
from tralign_mini.logprobs import completion_logps, plain_completion_logps
from tralign_mini.models import load_policy
from tralign_mini.packing import lay_out
from tralign_mini.recipe import Recipe
from tralign_mini.reference import make_reference
from tralign_mini.tokens import collate
from tralign_mini.train import AlignmentTrainer

GROUPS = random_groups(6)
FAMILIES = ("GPTNeoX", "Llama", "Qwen2", "Gemma", "GPT2", "OPT", "Mistral")


@pytest.fixture
def stand_in(monkeypatch):
    """FlexAttention's place is taken; yields the settings of the stand-in and the number of its calls."""
    state = {"calls": 0, "wrong by": 0.0, "gradient": 1.0}

    def attend(module, query, key, value, mask, **options):
        state["calls"] += 1
        allowed = create_mask(mask.mask_mod, len(query), 1, query.shape[2], key.shape[2], device=query.device)
        options["is_causal"] = False
        out, _ = sdpa_attention_forward(module, query, key, value, allowed, **options)
        return out.detach() * (1 + state["wrong by"]) + state["gradient"] * (out - out.detach()), None

    monkeypatch.setattr(attention, "flex_attention_forward", attend)
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    return state


@pytest.fixture
def seconds(monkeypatch):
    """What passes take by the clock: [with SDPA, with FlexAttention]."""
    spans, real = [2.0, 1.0], flex._passes

    def timed(policy, *arguments):
        return spans[attention.by_flex(policy)], real(policy, *arguments)[1]

    monkeypatch.setattr(flex, "_passes", timed)
    return spans


def preferred(model, *, times=1000, check=lambda: None):
    batches = [packed(GROUPS[:2]), packed(GROUPS[2:])]
    return flex.prefer_flex([model], batches, completion_logps, times, check)


@pytest.mark.parametrize(("family", "lora"), [*((name, False) for name in FAMILIES), ("Llama", True)])
def test_it_is_taken_where_it_is_faster_and_for_packed_rows_only(stand_in, seconds, family, lora):
    model = build(family)
    if lora:
        model = adapted(model, lora_dropout=0.5)  # in neither of the two
        shake(model, 1)
    random_state = torch.get_rng_state()
    taken, line = preferred(model)
    assert taken and line == "packed rows with FlexAttention: 2.00 times as fast as with SDPA"
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    stand_in["calls"] = 0
    completion_logps(model, packed(GROUPS))
    assert stand_in["calls"] == model.config.num_hidden_layers
    whole = collate([(prompt, answers[0]) for prompt, answers in GROUPS], 0)
    plain_completion_logps(model, whole), completion_logps(model, whole)
    model.generate(whole["input_ids"][:1, :3], max_new_tokens=2, do_sample=False)
    assert stand_in["calls"] == model.config.num_hidden_layers


def test_it_is_left_where_it_is_not_faster(stand_in, seconds):
    model = build("Llama")
    seconds[:] = 1.0, 0.99
    taken, line = preferred(model)
    assert not taken and line == "packed rows with SDPA: FlexAttention is 1.01 times as fast"
    assert stand_in["calls"] and not attention.by_flex(model)


def test_it_is_not_even_tried_in_a_short_run(stand_in, seconds):
    model = build("Llama")
    assert preferred(model, times=299) == (False, "")
    assert stand_in["calls"] == 0 and not attention.by_flex(model)
    assert preferred(model, times=300)[0]


@pytest.mark.parametrize("fault", ["gradient", "values", "refuses"])
def test_what_is_wrong_or_fails_leaves_sdpa_and_says_so(stand_in, seconds, monkeypatch, fault):
    model = build("Llama")
    stand_in["gradient"] = 0.7 if fault == "gradient" else 1.0

    def check():
        assert attention.by_flex(model)  # what is checked is FlexAttention
        if fault == "values":
            raise ValueError("log-probs differ by 0.3\nmore")

    if fault == "refuses":
        monkeypatch.setattr(attention, "flex_attention_forward", None)
    taken, line = preferred(model, check=check)
    assert not taken and not attention.by_flex(model)
    reason = {"gradient": r"its gradients differ by \d+", "values": "log-probs differ by 0.3$",
              "refuses": "'NoneType' object is not callable$"}[fault]
    assert line.startswith("packed rows with SDPA; FlexAttention fails here: ")
    assert re.search(reason, line)


@torch.no_grad()  # on a CPU FlexAttention has no gradient
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU FlexAttention is compiled, which takes g++")
@pytest.mark.parametrize("loaded_with", ["sdpa", "flex_attention"])
def test_the_real_one_gives_the_same_values(loaded_with):
    model = build("GPTNeoX", attn_implementation=loaded_with)
    if loaded_with == "sdpa":
        attention.set_flex([model], True)
    found = completion_logps(model, lay_out(GROUPS, 0, [[0, 3, 5], [1, 2, 4]]))
    model.set_attn_implementation("sdpa")
    expected = plain_completion_logps(model, collate(sequences_of(GROUPS), 0))
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=1e-5)


# --------------------------------------------------------------------------------------------------- in a run


RUNS = {
    "dpo": {"reference": "soft", "alpha": 0.5, "tau": 2},
    "kto": {"method": "kto", "reference": "hard", "tau": 2},
    "in micro-batches": {"micro_batch_size": 2, "gradient_checkpointing": True},
    "in bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture
def in_long_runs(stand_in, monkeypatch):
    """Tried in every run, however short, and faster."""
    monkeypatch.setattr(flex, "LONG", 0)
    monkeypatch.setattr(flex, "GAIN", 0)
    return stand_in


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_that_takes_it_learns_the_same(in_long_runs, monkeypatch, tmp_path, capsys, settings):
    found = []
    for name in ("flex", "sdpa"):
        trainer = make_trainer(tmp_path / name, **settings)
        in_long_runs["calls"] = 0
        trainer.train()
        assert (in_long_runs["calls"] > 0) == (name == "flex") == attention.by_flex(trainer.reference.model)
        found.append(metrics(tmp_path / name))
        monkeypatch.setattr(flex, "GAIN", float("inf"))
    printed = capsys.readouterr().out
    assert "packed rows with SDPA" in printed and "packed rows with FlexAttention" in printed
    assert_close(*found, tolerance=2e-3 if "dtype" in settings else 1e-5)


def test_lora_in_bfloat16(in_long_runs, tmp_path, capsys):
    """Autocast keeps copies of weights, which a pass without gradients must not leave to one with them."""
    policy = adapted(build("Llama"), lora_dropout=0.1)
    shake(policy, 1)
    recipe = Recipe(model="none", data="none", batch_size=8, max_steps=2, dtype="bfloat16", tuning="lora")
    trainer = AlignmentTrainer(policy, make_reference(policy), random_rows("dpo"), recipe, tiny_tokenizer(),
                               tmp_path / "lora")
    assert attention.by_flex(trainer.policy) and trainer.row_limit
    assert capsys.readouterr().out.startswith("packed rows with FlexAttention: ")


def test_a_reward_model(in_long_runs, tmp_path):
    recipe = Recipe(model=str(write_model(tmp_path / "model")), data="none", method="reward")
    trainer = make_trainer(tmp_path, policy=load_policy(recipe), method="reward")
    assert attention.by_flex(trainer.policy)


def test_what_a_run_found_is_kept_for_when_it_goes_on(in_long_runs, monkeypatch, tmp_path, capsys):
    make_trainer(tmp_path)
    kept = json.loads((tmp_path / "attention.json").read_text())
    assert kept["flex"] is True and kept["why"] == capsys.readouterr().out.strip()
    monkeypatch.setattr(flex, "prefer_flex", None)
    again = make_trainer(tmp_path)
    assert attention.by_flex(again.policy) and attention.by_flex(again.reference.model)


def test_another_trainer_of_the_same_policy_begins_with_sdpa(in_long_runs, monkeypatch, tmp_path):
    policy = make_trainer(tmp_path / "1").policy
    monkeypatch.setattr(flex, "LONG", float("inf"))
    in_long_runs["calls"] = 0
    make_trainer(tmp_path / "2", policy=policy)
    assert in_long_runs["calls"] == 0 and not attention.by_flex(policy)


def test_processes_that_disagree_all_take_sdpa(in_long_runs, monkeypatch, tmp_path, capsys):
    real = AlignmentTrainer._least
    monkeypatch.setattr(AlignmentTrainer, "_least", lambda self, number: real(self, number) * (number > 1))
    trainer = make_trainer(tmp_path)
    assert not attention.by_flex(trainer.policy) and trainer.row_limit
    assert "packed rows with SDPA: not every process" in capsys.readouterr().out


def test_the_policys_whole_sequences_are_no_reason_to_try(in_long_runs, tmp_path):
    """KTO in micro-batches: only the reference has packed rows."""
    trainer = make_trainer(tmp_path, method="kto", micro_batch_size=4)
    assert trainer.row_limit and not attention.by_flex(trainer.policy) and in_long_runs["calls"] == 0


def test_a_run_whose_flex_attention_is_wrong_keeps_sdpa(in_long_runs, tmp_path, capsys):
    in_long_runs["wrong by"] = 0.5
    trainer = make_trainer(tmp_path)
    assert "FlexAttention fails here: on the longest row" in capsys.readouterr().out
    assert not attention.by_flex(trainer.policy) and trainer.row_limit
