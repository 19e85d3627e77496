"""The predicted peak memory: each part by hand, the same bytes as in a real step, and what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, tiny_neox, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import adapted
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.workload import workload
from tralign_mini import memory, rehearsal
from tralign_mini.logprobs import completion_logps
from tralign_mini.memory import predict, smaller
from tralign_mini.models import load_policy
from tralign_mini.packing import pack
from tralign_mini.recipe import Recipe
from tralign_mini.reference import make_reference
from tralign_mini.rehearsal import NF4, PASSING, Ledger, Rehearsal
from tralign_mini.sharing import PACKED

STEP, CHECK, SAMPLING = "training step", "check of shared prompts", "sampling for evaluation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    write_model(root / "neox")
    write_model(root / "llama", tiny_llama())
    return root


def recipe_of(folder, model="neox", **changes) -> Recipe:
    defaults = {"model": str(folder / model), "data": "none", "batch_size": 2, "lora_rank": 2,
                "eval_prompts": 1, "max_prompt_tokens": 6, "max_completion_tokens": 4, "dtype": "float32"}
    return Recipe(**defaults | changes)


def parts(recipe, moment=STEP) -> dict[str, float]:
    run = Rehearsal(recipe)
    run.run(run.largest_batch())
    return run.moments[moment]


# Each part by hand, for 2 layers of hidden size h = 32, MLP i = 64, 4 heads, a vocabulary of 64, and float32.

H, INNER, HEADS, VOCAB, LAYERS = 32, 64, 4, 64, 2
LINEAR = 3 * H * H + H * H + 2 * H * INNER  # the weights of a layer's four linear modules
LAYER = LINEAR + 3 * H + H + INNER + H + 4 * H  # with their biases and two norms
WEIGHTS = 2 * VOCAB * H + LAYERS * LAYER + 2 * H
RANKS = (H + 3 * H) + (H + H) + 2 * (H + INNER)  # a layer's LoRA weights for each rank


def test_full_weights_their_copy_gradients_and_two_moments(folder):
    found = parts(recipe_of(folder, batch_size=4, micro_batch_size=2))
    assert found["weights, trained"] == 4 * WEIGHTS
    assert found["reference"] == 4 * WEIGHTS + found["weights, frozen"]  # rotary frequencies
    assert found["optimizer"] == 8 * WEIGHTS
    assert found["gradients"] == 4 * WEIGHTS


def test_adapters_beside_a_frozen_base(folder):
    found = parts(recipe_of(folder, tuning="lora", batch_size=4, micro_batch_size=2))
    trained = LAYERS * RANKS * 2
    assert found["weights, trained"] == found["gradients"] == 4 * trained
    assert found["reference"] == 4 * 4 * trained  # four times the rank
    assert found["optimizer"] == 8 * trained
    assert found["weights, frozen"] == pytest.approx(4 * WEIGHTS, abs=16)


def test_four_bits_for_linear_layers_but_not_for_the_head(folder):
    found = parts(recipe_of(folder, tuning="qlora"))
    assert NF4 == pytest.approx((4 + 8 / 64 + 32 / (64 * 256)) / 8)
    assert found["weights, 4-bit"] == NF4 * LAYERS * LINEAR
    assert found["weights, frozen"] == pytest.approx(4 * (WEIGHTS - LAYERS * LINEAR), abs=16)


def test_a_reward_model_has_one_row_for_a_head_and_no_reference(folder):
    changes = {"method": "reward", "batch_size": 4, "micro_batch_size": 2}
    found = parts(recipe_of(folder, **changes))
    weights = WEIGHTS - VOCAB * H + H
    assert found["weights, trained"] == found["gradients"] == 4 * weights
    assert found["optimizer"] == 8 * weights
    assert not found.keys() & {"reference", "logits"}
    adapter = parts(recipe_of(folder, tuning="lora", **changes))
    assert adapter["weights, trained"] == adapter["gradients"] == 4 * (LAYERS * RANKS * 2 + H)  # a new head
    assert "reference" not in adapter
    moments = predict(recipe_of(folder, **changes)).moments
    assert [*moments] == [STEP, "scoring held-out pairs"]


def after_the_forward_pass(recipe) -> dict[str, float]:
    run = Rehearsal(recipe)
    batch = run.largest_batch()
    counted = int(batch["counted"].sum())
    with run.mode:
        batch = {name: run.mode.from_tensor(tensor) for name, tensor in batch.items()}
        with run.ledger, run.autocast():
            run.ledger.label = "activations"
            logps = run._scores(run.policy, batch, counted)
            assert logps.shape == (counted,)  # still there, and with it the graph
            return dict(run.ledger.now)


def test_what_autograd_keeps_of_a_layer(folder):
    """Two rows of 6 + 2 * 4 tokens; numbers of 4 bytes, for each token of a layer if nothing else is said."""
    rows, length = 2, 14
    tokens, predicted = rows * length, rows * 8
    layer = tokens * (
        H  # its input, for both norms
        + 2 * (H + 2)  # what the norms return, for the linear modules after them; mean and deviation
        + 3 * H  # query, key, value: of these the value is used as it is
        + 2 * H  # query and key, rotated
        + H + HEADS  # what attention returns, and the normaliser of its softmax
        + H  # the same with the heads side by side, for the linear module after it
        + 2 * INNER  # before and after the MLP's activation function
    ) + rows * length * length  # the mask as numbers: attention makes them from True and False in every layer
    rotation = tokens * 2 * 2  # cosine and sine of 2 of a head's 8 numbers, once for all layers
    end = tokens * (H + 2) + predicted * H  # the last norm; what the head gets: predicted places only
    ids = 8 * (2 * predicted + 3 * tokens)  # int64: where, which token; position, group, branch
    found = after_the_forward_pass(recipe_of(folder))
    assert found["activations"] == 4 * (LAYERS * layer + rotation + end) + ids
    assert found["logits"] == pytest.approx(4 * predicted * VOCAB, rel=0.02)  # log-softmax; and their results


def test_checkpointing_keeps_the_inputs_of_layers(folder):
    usual, checkpointed = (after_the_forward_pass(recipe_of(folder, gradient_checkpointing=on))["activations"]
                           for on in (False, True))
    assert checkpointed < usual / 3
    more = after_the_forward_pass(recipe_of(folder, gradient_checkpointing=True, batch_size=3))["activations"]
    assert more > checkpointed


# The same bytes as in a real step: the ledger looks at tensors with numbers, too.


def alive_in_a_real_step(recipe) -> tuple[float, float]:
    """(after the policy's forward pass, at the peak), beyond what is there before."""
    policy = load_policy(recipe)
    reference = make_reference(policy, rank=None if recipe.tuning == "full" else recipe.reference_rank)
    answer, ledger = [3] * recipe.max_completion_tokens, Ledger()
    groups = [([3] * recipe.max_prompt_tokens, [answer, answer])] * recipe.batch_size
    batch = pack(groups, 0, hidden_size=H, limit=PACKED)
    with reference.using() as module:
        for tensor in [*policy.parameters(), *policy.buffers(), *module.parameters(), *module.buffers()]:
            ledger.enter(tensor, {})
    completion_logps(policy, batch)  # looks at the head, once
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16")
    with ledger:
        with bf16:
            loss = completion_logps(policy, batch).sum()
        kept = ledger.now.total()
        del loss
        with bf16, reference.using() as module:
            completion_logps(module, batch)
        with bf16:
            loss = completion_logps(policy, batch).sum()
        loss.backward()
    return kept, ledger.peak.total()


@pytest.mark.parametrize("changes", [
    {}, {"model": "llama"}, {"tuning": "lora"}, {"tuning": "lora", "model": "llama", "lora_dropout": 0.1},
    {"gradient_checkpointing": True}, {"tuning": "lora", "gradient_checkpointing": True},
    {"dtype": "bfloat16"}, {"dtype": "bfloat16", "tuning": "lora", "model": "llama"},
], ids=str)
def test_as_many_bytes_as_a_real_step(folder, changes):
    recipe = recipe_of(folder, batch_size=3, max_prompt_tokens=40, max_completion_tokens=10, **changes)
    kept, peak = alive_in_a_real_step(recipe)
    now = after_the_forward_pass(recipe)
    assert now["activations"] + now["logits"] == pytest.approx(kept, rel=0.01)
    found = parts(recipe)
    resident = ("weights, trained", "weights, frozen", "reference", "optimizer")
    assert sum(found.values()) - sum(found.get(name, 0) for name in resident) == pytest.approx(peak, rel=0.02)


def test_a_storage_counts_once_until_it_is_freed():
    ledger = Ledger()
    with ledger:
        ledger.label = "a"
        one = torch.zeros(100)
        view, two = one[:50], one + 1
        ledger.label = "b"
        three = one + 2
        assert ledger.now == {"a": 800, "b": 400}
        del one, two
        assert ledger.now == {"a": 400, "b": 400}  # the view keeps its storage
        ledger.enter(three, {"c": 1})
        del view
    assert ledger.now == {"a": 0, "b": 0, "c": 1}
    assert ledger.peak == {"a": 800, "b": 400}


def step_of(folder, **changes) -> float:
    return sum(parts(recipe_of(folder, **changes)).values())


@settings(max_examples=6)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4),
       st.sampled_from(["dpo", "kto", "sft", "orpo"]),
       st.sampled_from(["max_prompt_tokens", "max_completion_tokens", "micro_batch_size"]))
def test_longer_rows_or_more_of_them_never_need_less(folder, prompt, completion, rows, method, longer):
    changes = {"max_prompt_tokens": prompt, "max_completion_tokens": completion, "micro_batch_size": rows}
    less = {"batch_size": 5 * 4 * 3 * 2, "method": method} | changes
    assert step_of(folder, **less) < step_of(folder, **less | {longer: less[longer] + 1})


def test_what_makes_a_step_smaller(folder):
    full, lora, qlora = (step_of(folder, tuning=tuning) for tuning in ("full", "lora", "qlora"))
    assert qlora < lora < full
    assert step_of(folder, method="orpo") == pytest.approx(full - 4 * WEIGHTS, rel=0.05)  # no reference
    long = {"max_prompt_tokens": 80, "batch_size": 8}
    usual = step_of(folder, **long)
    assert step_of(folder, **long, gradient_checkpointing=True) < usual
    assert step_of(folder, **long, micro_batch_size=2) < usual


def test_moments_beside_the_step(folder):
    assert CHECK not in predict(recipe_of(folder, method="sft")).moments  # there is nothing to share
    logits = 2 * (6 + 4) * VOCAB * 4  # of both sequences, at all places
    assert parts(recipe_of(folder), CHECK)["temporary"] > 2 * logits  # and their log-softmax
    changes = {"max_prompt_tokens": 2, "max_completion_tokens": 90}
    few, many, more = (parts(recipe_of(folder, eval_prompts=n, **changes), SAMPLING) for n in (32, 64, 999))
    assert many == more  # 64 at once
    grown = ("keys and values", "temporary")
    sampled = [sum(found.get(name, 0) for name in grown) for found in (few, many)]
    assert sampled[1] == pytest.approx(2 * sampled[0], rel=0.01)
    keys_and_values = 64 * (2 + 90) * LAYERS * 2 * H * 4
    assert keys_and_values < sampled[1] < 2 * keys_and_values  # a layer's are copied to append one
    assert many["initial policy"] == 4 * WEIGHTS


def test_in_full_adams_moments_fill_some_of_the_freed_memory(folder):
    step = predict(recipe_of(folder)).moments[STEP]
    passing = sum(step.get(label, 0) for label in PASSING)
    assert step["freed, still held"] == pytest.approx(0.55 * passing)


def test_what_a_cpu_holds_beside_tensors(folder):
    recipe = recipe_of(folder, tuning="qlora", max_prompt_tokens=80)
    bare, found = parts(recipe), predict(recipe).moments[STEP]
    assert found.pop("framework") == 60 * 2**20
    assert found.pop("file, mapped") == 4 * LAYERS * LINEAR  # of which the codes were made
    assert found.pop("freed, still held") == 1.08 * sum(bare.get(label, 0) for label in PASSING)
    assert found == bare
    half = AutoConfig.from_pretrained(folder / "neox")
    half.dtype = "float16"
    half.save_pretrained(folder / "half")
    assert "file, mapped" not in predict(recipe_of(folder, "half", tuning="qlora")).moments[STEP]


def test_rows_that_are_there_instead_of_the_longest(folder):
    recipe = recipe_of(folder, max_prompt_tokens=60, max_completion_tokens=20, batch_size=4, max_steps=2)
    longest = [{"prompt_ids": [3] * 60, "chosen_ids": [3] * 20, "rejected_ids": [4] * 20}] * 8
    short = [{"prompt_ids": [3] * 5, "chosen_ids": [3] * 2, "rejected_ids": [4] * 2}] * 8
    given_rows = (None, longest, short[:7] + longest[:1], short)
    steps = [sum(predict(recipe, rows).moments[STEP].values()) for rows in given_rows]
    assert steps[0] == steps[1] > steps[2] > steps[3]


def test_what_is_said_when_it_does_not_fit(folder, monkeypatch):
    recipe = recipe_of(folder, batch_size=12, max_prompt_tokens=60, max_completion_tokens=20)
    whole = predict(recipe)
    assert whole.fits and whole.total < 2**27

    monkeypatch.setattr(memory, "free_memory", lambda device: whole.total - 2**20)
    prediction = predict(recipe)
    assert not prediction.fits
    (changes, trial), = smaller(recipe, prediction)
    assert trial.fits and changes.keys() == {"micro_batch_size"}
    bigger = min(size for size in (2, 3, 4, 6, 12) if size > changes["micro_batch_size"])
    assert not predict(recipe.replace(micro_batch_size=bigger)).fits

    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    monkeypatch.setattr(rehearsal, "FRAMEWORK", 0)  # more than all the rest of this model
    whole = predict(recipe)
    trials = list(smaller(recipe, whole))
    assert trials[0][0] == {"micro_batch_size": 1} and trials[-1][0]["tuning"] in ("lora", "qlora")
    assert all(one.items() <= other.items() for (one, _), (other, _) in zip(trials, trials[1:], strict=False)
               if "tuning" not in one)  # each adds to the one before
    totals = [whole.total, *(trial.total for _, trial in trials)]
    assert all(later < earlier for earlier, later in zip(totals, totals[1:]))
    assert not any(trial.fits for _, trial in trials)


def test_free_memory_of_a_container(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    unlimited = memory.free_memory(cpu)
    assert unlimited > 2**20
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 200000\n")
    assert memory.free_memory(cpu) == 2**20 - 300000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(cpu) == pytest.approx(unlimited, rel=0.2)


CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma2": {"head_dim": 8}, "mistral": {"sliding_window": 12}, "qwen2": {}, "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_other_architectures(tmp_path, model_type):
    common = {"vocab_size": VOCAB, "hidden_size": H, "intermediate_size": INNER, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(model_type, **common | CONFIGS[model_type])
    config.save_pretrained(tmp_path)
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    found = parts(recipe_of(tmp_path, "", batch_size=4, micro_batch_size=2))
    assert found["weights, trained"] == found["gradients"] == 4 * weights
    assert sum(parts(recipe_of(tmp_path, "", tuning="lora")).values()) < sum(found.values())


def test_an_adapter_to_go_on_from(folder, tmp_path):
    policy = adapted(tiny_neox(), r=3)
    policy.peft_config["default"].base_model_name_or_path = str(folder / "neox")
    policy.save_pretrained(tmp_path / "adapter")
    found = parts(recipe_of(tmp_path, "adapter", tuning="lora"))
    assert found["weights, trained"] == 4 * LAYERS * RANKS * 3
    assert found["reference"] == 4 * LAYERS * RANKS * (4 * 3 + 3)  # and the adapter that it began from
    with pytest.raises(ValueError, match="PEFT adapter.*tuning=lora"):
        predict(recipe_of(tmp_path, "adapter"))


def test_models_that_cannot_be_predicted(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*could not be loaded.*save_pretrained"):
        predict(recipe_of(tmp_path, "nowhere"))
    config = {"vocab_size": VOCAB, "hidden_size": H, "intermediate_size": INNER, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": 2}
    AutoConfig.for_model("mixtral", **config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="memory of a mixtral model cannot be predicted.*max_steps=3"):
        predict(recipe_of(tmp_path, ""))


MEASURE = """
import json, sys
import tralign_mini.models, tralign_mini.train
from benchmarks.measure import Job, measure
print(measure(Job(**json.load(sys.stdin))).peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("method", [{"method": "dpo", "tau": 2}, {"method": "reward"}], ids=["dpo", "reward"])
def test_within_15_percent_of_what_a_fresh_process_measures(tmp_path, method):
    """Lines of the benchmark: 70 M parameters, 8 pairs of 40 + 20 tokens."""
    work = workload("short", 3, tmp_path)
    job = {"side": "ours", "model": work.model, "rows": work.rows, "batch_size": work.pairs, "steps": 3}
    root, environment = Path(__file__).parents[1], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", MEASURE], input=json.dumps(job | method), cwd=root,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipe = recipe_of(tmp_path, "model", batch_size=work.pairs, max_steps=3, method=method["method"])
    step = predict(recipe, work.rows).moments[STEP]
    assert sum(step.values()) == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)
