"""FlexAttention for packed rows is tried in a run that is long enough, and taken if it is exact and faster.

There is no GPU to try it on, and on a CPU it has no gradient: a stand-in computes, with a whole mask, what
FlexAttention should from a block mask.
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from engine_helpers import build, packed, random_groups, sequences_of
from helpers import assert_close, make_trainer, metrics, random_rows
from lora_helpers import adapted, shake
from torch.nn.attention.flex_attention import create_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tralign_mini import attention, flex
from tralign_mini.logprobs import completion_logps, plain_completion_logps
from tralign_mini.packing import lay_out
from tralign_mini.tokens import collate

GROUPS = random_groups(6)


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


def preferred(model, monkeypatch, *, seconds=(2.0, 1.0), times=1000, check=lambda: None):
    """`prefer_flex` where a pass with SDPA takes the first of `seconds`, with FlexAttention the other."""
    real = flex._pass

    def timed(*arguments):
        return seconds[attention.by_flex(arguments[0])], real(*arguments)[1]

    monkeypatch.setattr(flex, "_pass", timed)
    batches = [packed(GROUPS[:2]), packed(GROUPS[2:])]
    return flex.prefer_flex([model], batches, completion_logps, times, check)


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_taken_where_it_is_faster_and_for_packed_rows_only(stand_in, monkeypatch, lora):
    model = build("Llama")
    if lora:
        model = adapted(model)
        shake(model, 1)
    before = completion_logps(model, packed(GROUPS)).detach()
    taken, line = preferred(model, monkeypatch)
    assert taken and line == "packed rows with FlexAttention: 2.00 times as fast as with SDPA"
    assert all(weight.grad is None for weight in model.parameters())
    stand_in["calls"] = 0
    torch.testing.assert_close(completion_logps(model, packed(GROUPS)).detach(), before)
    assert stand_in["calls"] == model.config.num_hidden_layers
    whole = collate([(prompt, answers[0]) for prompt, answers in GROUPS], 0)
    plain_completion_logps(model, whole), completion_logps(model, whole)
    model.generate(whole["input_ids"][:1, :3], max_new_tokens=2, do_sample=False)
    assert stand_in["calls"] == model.config.num_hidden_layers


def test_it_is_left_where_it_is_not_faster(stand_in, monkeypatch):
    model = build("Llama")
    taken, line = preferred(model, monkeypatch, seconds=(1.0, 0.99))
    assert not taken and line == "packed rows with SDPA: FlexAttention is 1.01 times as fast"
    assert stand_in["calls"] and not attention.by_flex(model)


def test_it_is_not_even_tried_in_a_short_run(stand_in, monkeypatch):
    model = build("Llama")
    assert preferred(model, monkeypatch, seconds=(2.0, 1.0), times=299) == (False, "")
    assert stand_in["calls"] == 0 and not attention.by_flex(model)
    assert preferred(model, monkeypatch, seconds=(2.0, 1.0), times=300)[0]


@pytest.mark.parametrize("fault", ["gradient", "values", "refuses"])
def test_what_is_wrong_or_fails_leaves_sdpa_and_says_so(stand_in, monkeypatch, fault):
    model = build("Llama")
    stand_in["gradient"] = 0.7 if fault == "gradient" else 1.0

    def check():
        assert attention.by_flex(model)  # what is checked is FlexAttention
        if fault == "values":
            raise ValueError("log-probs differ by 0.3\nmore")

    if fault == "refuses":
        monkeypatch.setattr(attention, "flex_attention_forward", None)
    taken, line = preferred(model, monkeypatch, check=check)
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


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_that_takes_it_learns_the_same(stand_in, monkeypatch, tmp_path, capsys, method):
    rows, found = random_rows(method), []
    for name, gain in (("sdpa", float("inf")), ("flex", 0.0)):
        monkeypatch.setattr(flex, "LONG", 0)
        monkeypatch.setattr(flex, "GAIN", gain)
        trainer = make_trainer(tmp_path / name, rows=rows, method=method, reference="soft", alpha=0.5, tau=2)
        stand_in["calls"] = 0
        trainer.train()
        assert (stand_in["calls"] > 0) == (name == "flex") == attention.by_flex(trainer.reference.model)
        found.append(metrics(tmp_path / name))
    printed = capsys.readouterr().out
    assert "packed rows with SDPA" in printed and "packed rows with FlexAttention" in printed
    assert_close(*found)


def test_a_run_whose_flex_attention_is_wrong_keeps_sdpa(stand_in, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flex, "LONG", 0)
    stand_in["wrong by"] = 0.5
    trainer = make_trainer(tmp_path)
    assert "FlexAttention fails here: on the longest row" in capsys.readouterr().out
    assert not attention.by_flex(trainer.policy) and trainer.row_limit
