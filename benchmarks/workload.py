"""What is trained in a measurement: pairs of a known shape, and models of known size with random weights.

Both sides get the same token ids. TRL tokenizes texts itself, so the ids travel as a text of numbers and
come back through `number_tokenizer`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPREAD = 0.25  # standard deviation of the lengths over their mean; nothing beyond two of them
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the project: real pairs, if there
HH_FILE, HH_TOKENIZER = SHARED / "hh_harmless_base_test.jsonl.gz", SHARED / "gpt_neox_20b_tokenizer.json"
EOS, PAD = 0, 1  # in Pythia's vocabulary and in the embedded world's


@dataclass(frozen=True)
class Shape:
    """Mean lengths in tokens, and the pairs of an optimizer step and of each of its micro-batches."""

    prompt: int
    completion: int
    pairs: int
    micro: int | None = None  # None: the step is one micro-batch


SHAPES = {
    "tldr": Shape(350, 40, 4),
    "tldr-16": Shape(350, 40, 16, micro=4),  # real steps have more pairs to share the optimizer's work
    "hh": Shape(125, 45, 4),
    "short": Shape(40, 20, 8),
    "ultrafeedback": Shape(300, 400, 2),
}
# hidden size, layers, heads: the GPT-NeoX models of the Pythia suite (arXiv 2304.01373)
PYTHIA = {
    "70m": (512, 6, 8), "1b": (2048, 16, 8), "2.8b": (2560, 32, 32), "6.9b": (4096, 32, 32),
    "12b": (5120, 36, 40),
}
VOCABULARY = {"6.9b": 50432, "12b": 50688}  # the smaller ones have 50304
WORLD, WORLD_PAIRS = "little-tldr", 64
NAMES = (*SHAPES, "hh-file", WORLD)


@dataclass(frozen=True)
class Workload:
    """Pairs, the model that trains on them (a folder), how many make an optimizer step and a micro-batch."""

    name: str
    model: str
    rows: list[dict]
    pairs: int
    micro: int | None = None


def workload(name: str, steps: int, folder: Path, seed: int = 0) -> Workload:
    """One of `NAMES`, with different pairs for so many steps. FileNotFoundError if its data are not there."""
    if name == WORLD:
        from tralign_mini.models import model_path

        return Workload(name, model_path(WORLD), world_rows(steps * WORLD_PAIRS, seed), WORLD_PAIRS)
    config, model = neox_config(), Path(folder, "model")
    if not model.exists():
        number_tokenizer(config.vocab_size).save_pretrained(save_model(config, model, seed=seed))
    if name == "hh-file":
        pairs = SHAPES["hh"].pairs
        return Workload(name, str(model), file_rows(steps * pairs, seed), pairs)
    shape = SHAPES[name]
    rows = random_rows(shape, steps * shape.pairs, config.vocab_size, seed)
    return Workload(name, str(model), rows, shape.pairs, shape.micro)


def random_rows(shape: Shape, count: int, vocabulary: int, seed: int = 0) -> list[dict]:
    """`count` pairs of random tokens, as `prepare` makes them; each completion ends with EOS."""
    lengths, tokens = np.random.default_rng(seed), random.Random(seed)

    def ids(mean: int) -> list[int]:
        drawn = np.clip(lengths.normal(1, SPREAD), 1 - 2 * SPREAD, 1 + 2 * SPREAD)
        return [tokens.randrange(2, vocabulary) for _ in range(max(2, round(mean * drawn)))]

    def row() -> dict:
        chosen, rejected = (ids(shape.completion)[:-1] + [EOS] for _ in range(2))
        return {"prompt_ids": ids(shape.prompt), "chosen_ids": chosen, "rejected_ids": rejected}

    return [row() for _ in range(count)]


def file_rows(count: int, seed: int = 0) -> list[dict]:
    """`count` pairs of the real HH file (test split of harmless-base), with Pythia's tokenizer."""
    from transformers import PreTrainedTokenizerFast

    if not HH_FILE.exists() or not HH_TOKENIZER.exists():
        raise FileNotFoundError(f"{HH_FILE.name} and {HH_TOKENIZER.name} are not in ../shared/data")
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(HH_TOKENIZER), **special)
    return _prepared(str(HH_FILE), tokenizer, count, seed)


def world_rows(count: int, seed: int = 0) -> list[dict]:
    """`count` training pairs of the embedded world, with the tokenizer of its model."""
    from tralign_mini.models import load_tokenizer

    return _prepared(WORLD, load_tokenizer(WORLD), count, seed)


def _prepared(data: str, tokenizer, count: int, seed: int) -> list[dict]:
    from tralign_mini import load_dataset, prepare

    dataset = load_dataset(data).shuffle(seed=seed)
    limits = {"max_prompt_tokens": 512, "max_completion_tokens": 512}
    rows, _ = prepare(dataset.select(range(min(len(dataset), 4 * count))), tokenizer, method="dpo", **limits)
    # a truncated completion has no EOS, and TRL would add one
    whole = [row for row in rows if row["chosen_ids"][-1] == row["rejected_ids"][-1] == EOS]
    return whole[:count]


def neox_config(size: str = "70m", **changes):
    """The configuration of a Pythia model."""
    from transformers import GPTNeoXConfig

    hidden, layers, heads = PYTHIA[size]
    settings = {
        "vocab_size": VOCABULARY.get(size, 50304), "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 2048,
        "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False,
    }
    return GPTNeoXConfig(**settings | changes)


def save_model(config, folder: Path, *, seed: int = 0, dtype=None, device: str = "cpu") -> Path:
    """A folder as `from_pretrained` takes it, with random weights that depend on the seed."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    model.save_pretrained(folder)
    return Path(folder)


def number_tokenizer(vocabulary: int):
    """A tokenizer whose texts are token ids between spaces: "17 4 <eos>" is [17, 4, 0]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": EOS, "<pad>": PAD} | {str(i): i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def as_texts(row: dict) -> dict:
    """A row of ids as the texts from which `number_tokenizer` makes these ids: prompt, chosen, rejected."""

    def text(ids: list[int]) -> str:
        return " ".join("<eos>" if token == EOS else str(token) for token in ids)

    texts = {part: text(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
    return texts | {"prompt": texts["prompt"] + " "}


def in_order_of_training(rows: list[dict], steps: int, batch_size: int, seed: int = 0) -> list[dict]:
    """The rows as a run of ours sees them: a seeded permutation for each epoch."""
    epochs = -(-steps * batch_size // len(rows))
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(len(rows)) for e in range(epochs)])
    return [rows[i] for i in order[: steps * batch_size]]
