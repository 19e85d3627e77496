"""Tiny random models and a tiny tokenizer, built in code: `from helpers import tiny_neox`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 64
PAD, EOS, UNK = 0, 1, 2  # three different tokens, so that a confusion of padding and EOS shows


def two_processes(script: str, folder: Path, *arguments: str) -> None:
    """Run a script as two gloo processes on the CPU that can import the tests; AssertionError if it fails."""
    (folder / "worker.py").write_text(script)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(folder / "worker.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces: `w3` ... `w63` are the tokens 3 ... 63, any other word is <unk>."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_neox(seed: int = 0, **config) -> GPTNeoXForCausalLM:
    """A random GPT-NeoX (Pythia's architecture), float32, eval mode; the weights depend on `seed` alone."""
    return _build(GPTNeoXForCausalLM, GPTNeoXConfig, seed, config)


def tiny_llama(seed: int = 0, **config) -> LlamaForCausalLM:
    """A random Llama, float32, eval mode; the weights depend on `seed` alone."""
    return _build(LlamaForCausalLM, LlamaConfig, seed, {"num_key_value_heads": 2} | config)


def _build(model_class, config_class, seed, settings):
    # initializer_range is ten times the default: nearly uniform predictions would hide a wrong position or
    # token
    config = config_class(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2,
        "tie_word_embeddings": False, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS,
    } | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).float().eval()


def words(rng: random.Random, least: int, most: int) -> str:
    """A text of `least` to `most` known words."""
    return " ".join(f"w{rng.randint(3, VOCAB - 1)}" for _ in range(rng.randint(least, most)))


def write_pairs(path: Path, pairs: int = 40, seed: int = 0) -> Path:
    """Random preference pairs as JSONL, each with a prompt of its own (its first word is its number)."""
    rng = random.Random(seed)
    rows = [
        {"prompt": f"w{3 + i % 60} w{3 + i // 60} " + words(rng, 1, 7)}
        | {side: words(rng, 1, 6) for side in ("chosen", "rejected")}
        for i in range(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(folder: Path, model=None) -> Path:
    """A model folder with its tokenizer, as `from_pretrained` takes it."""
    (tiny_neox() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_run(folder: Path, start=None, /, *, pairs: int = 40, **settings) -> dict:
    """Settings for `tr.train`: 8 steps of 8 pairs on a tiny model; the files are made once a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model", start)
        write_pairs(folder / "pairs.jsonl", pairs)
    defaults = {
        "model": str(folder / "model"), "data": str(folder / "pairs.jsonl"), "output": str(folder / "run"),
        "batch_size": 8, "max_steps": 8, "learning_rate": 1e-3, "lora_rank": 2, "max_prompt_tokens": 16,
        "max_completion_tokens": 8, "eval_steps": 4, "eval_prompts": 4, "save_steps": 3,
    }
    return defaults | settings


def metrics(directory: Path) -> list[dict]:
    """The rows of metrics.jsonl without the one field that is a time."""
    rows = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_close(one: list[dict], other: list[dict], tolerance: float = 1e-5) -> None:
    """Rows of metrics with the same keys and, to the tolerance (relative beyond 1), the same numbers."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            close = value if value is None else pytest.approx(value, abs=tolerance, rel=tolerance)
            assert right[key] == close, (left["step"], key)


def without(rows: list[dict], *keys: str) -> list[dict]:
    """The rows without some of their columns."""
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def run_once(folder: Path, name: str, **settings) -> list[dict]:
    """The rows of metrics of a run in `folder/name`, which is made the first time that it is asked for."""
    import tralign_mini as tr

    output = folder / name
    if not output.exists():
        tr.train(tiny_run(folder, output=str(output), **settings))
    return metrics(output)


def random_rows(method: str, count: int = 24, prompts: int | None = None, seed: int = 0) -> list[dict]:
    """Tokenized rows as `prepare` makes them; `prompts`: how many different prompts (default: one a row)."""
    rng = random.Random(seed)

    def ids(least, most):
        return [rng.randint(3, VOCAB - 1) for _ in range(rng.randint(least, most))]

    beginnings = [[3 + i, *ids(1, 6)] for i in range(prompts or count)]
    if method in ("kto", "sft"):
        rows = [{"prompt_ids": rng.choice(beginnings) if prompts else beginnings[i],
                 "completion_ids": [*ids(1, 6), EOS]} for i in range(count)]
        return [row | {"label": rng.random() < 0.4} for row in rows] if method == "kto" else rows
    return [{"prompt_ids": beginnings[i % len(beginnings)], "chosen_ids": [*ids(1, 6), EOS],
             "rejected_ids": [*ids(1, 6), EOS]} for i in range(count)]


def unpacked(batch: dict) -> list[tuple[list[int], list[int]]]:
    """The (prompt_ids, completion_ids) that a batch scores, whole sequences or packed rows, in its order."""
    if "position_ids" not in batch:
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"], strict=True)
        return [(ids[attended & ~counted].tolist(), ids[counted].tolist()) for ids, attended, counted in rows]
    out, rows = [], batch["input_ids"].flatten()
    for source, target, counted in zip(batch["source"], batch["target"], batch["counted"], strict=True):
        group = batch["group"].flatten() == batch["group"].flatten()[source[0]]
        out.append((rows[group & (batch["branch"].flatten() == 0)].tolist(), target[counted].tolist()))
    return out


def make_trainer(directory: Path, *, policy=None, reference_model=None, rows=None, evaluate=None, cache=None,
                 control=None, **settings):
    """An `AlignmentTrainer` on a tiny GPT-NeoX in memory; `reference_model` defaults to a copy of it."""
    from tralign_mini.recipe import WITHOUT_REFERENCE, Recipe
    from tralign_mini.reference import FrozenReference
    from tralign_mini.train import AlignmentTrainer

    defaults = {"model": "none", "data": "none", "batch_size": 8, "max_steps": 4, "learning_rate": 1e-3}
    recipe = Recipe(**defaults | settings)
    policy = tiny_neox().train() if policy is None else policy
    if reference_model is None and recipe.method not in WITHOUT_REFERENCE:
        reference_model = policy
    rows = random_rows(recipe.method) if rows is None else rows
    reference = None if reference_model is None else FrozenReference(reference_model)
    hooks = {"evaluate": evaluate, "cache": cache, "control": control}
    return AlignmentTrainer(policy, reference, rows, recipe, tiny_tokenizer(), directory, **hooks)


def logps_by_hand(model, sequences: list) -> torch.Tensor:
    """log p(completion | prompt), one sequence at a time, from the definition."""
    out = []
    for prompt, completion in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
        tokens = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])
        out.append(tokens.sum())
    return torch.stack(out)
