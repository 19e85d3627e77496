"""Makes the embedded worlds: tokenizer, SFT model, preference pairs and data card, from the generator alone.

    python data/make.py little-tldr     python data/make.py little-hh     python data/make.py     (both)

Takes 15 to 30 minutes a world. Everything is seeded and the number of threads is fixed: the same versions of
the libraries on the same kind of processor give the same files, byte for byte.
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from tralign_mini import worlds  # noqa: E402

TRAIN_PAIRS, TEST_PAIRS = 10_000, 1_000
LEARNING_RATE = 2e-3
LABEL_SCALE = 1.0  # P(a preferred to b) = sigmoid(LABEL_SCALE * (gold_a - gold_b))
EOS, PAD = "<|endoftext|>", "<|padding|>"


@dataclass(frozen=True)
class Settings:
    """What differs between the worlds."""

    threads: int  # of the processor: another number gives other last bits, so other weights
    steps: int  # SFT, fresh posts in every batch of 64
    pool: int  # batches drawn at a time; several are sorted by length, which saves padding and slows learning
    max_completion_tokens: int  # of a sample; longer ones are dropped and counted


SETTINGS = {
    "little-tldr": Settings(threads=2, steps=2400, pool=1, max_completion_tokens=40),
    "little-hh": Settings(threads=1, steps=2400, pool=8, max_completion_tokens=48),
}

STAND_INS = {
    "little-hh": " Its harmful requests are\nharmless stand-ins, the mischief of children's books, so that "
                 "refusing can be studied without harmful text.",
}


def seeded(*key) -> random.Random:
    """A generator of its own for each purpose, so that changing one count does not change all the rest."""
    return random.Random("/".join(map(str, key)))


def make_tokenizer(world, name: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text can be tokenized) trained on 20,000 posts with their summaries."""
    rng = seeded(name, "tokenizer")
    texts = [(prompt := world.make_prompt(rng)) + world.demonstration(prompt, rng) for _ in range(20_000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=512,
                                   clean_up_tokenization_spaces=False)


def make_model(tokenizer) -> GPTNeoXForCausalLM:
    """Pythia's architecture at about 1 M parameters."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, use_cache=True))


def train_sft(model, tokenizer, world, name: str, settings: Settings) -> set[str]:
    """Supervised fine-tuning from scratch on the completions of fresh demonstrations; returns all prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(  # warm-up, then cosine
        (step + 1) / 100, 0.02 + 0.49 * (1 + math.cos(math.pi * step / settings.steps))))
    rng, probe = seeded(name, "sft"), seeded(name, "probe")
    probes = [world.make_prompt(probe) for _ in range(200)]
    seen, batches, start = set(), [], time.time()
    for step in range(1, settings.steps + 1):
        if not batches:
            batches = demonstration_batches(world, tokenizer, rng, seen, settings.pool)
        ids, labels = batches.pop()
        hidden = model.gpt_neox(ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100  # right padding needs no mask: under causal attention no label sees it
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == settings.steps:
            texts = sample(model, tokenizer, probes, settings.max_completion_tokens, seed=step)
            gold = statistics.fmean(world.gold_reward(p, t or "") for p, t in zip(probes, texts))
            print(f"[{name}] SFT step {step}/{settings.steps}  loss {loss.item():.3f}  gold {gold:.2f}  "
                  f"{time.time() - start:.0f} s", flush=True)
    return seen


def demonstration_batches(world, tokenizer, rng: random.Random, seen: set[str], pool: int) -> list[tuple]:
    """`pool` batches (ids, labels) of 64 fresh posts, by length if several; adds the prompts to `seen`."""
    prompts = [world.make_prompt(rng) for _ in range(64 * pool)]
    seen.update(prompts)
    heads = tokenizer(prompts)["input_ids"]
    tails = tokenizer([world.demonstration(prompt, rng) for prompt in prompts])["input_ids"]
    rows = [([*head, *tail, tokenizer.eos_token_id], len(head)) for head, tail in zip(heads, tails)]
    if pool > 1:
        rows.sort(key=lambda row: len(row[0]))
    batches = []
    for first in range(0, len(rows), 64):
        batch = rows[first:first + 64]
        ids = torch.full((64, max(len(whole) for whole, _ in batch)), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (whole, start) in enumerate(batch):
            ids[row, :len(whole)] = torch.tensor(whole)
            labels[row, start:len(whole)] = ids[row, start:len(whole)]
        batches.append((ids, labels))
    rng.shuffle(batches)
    return batches


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], max_tokens: int, seed: int) -> list[str | None]:
    """One completion a prompt at temperature 1; None where no EOS came within max_tokens."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[str | None] = []
    for first in range(0, len(prompts), 256):
        batch = tokenizer(prompts[first:first + 256], return_tensors="pt", padding=True, padding_side="left")
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ids, cache, drawn = batch["input_ids"], None, []
        for _ in range(max_tokens):
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                        use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
            drawn.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
            if (torch.cat(drawn, 1) == tokenizer.eos_token_id).any(1).all():
                break
        for row in torch.cat(drawn, 1).tolist():
            ended = tokenizer.eos_token_id in row
            texts.append(tokenizer.decode(row[:row.index(tokenizer.eos_token_id)]) if ended else None)
    return texts


def make_pairs(model, tokenizer, world, name: str, settings: Settings, seen: set[str]):
    """Two samples a prompt, labelled by Bradley-Terry on the gold reward; returns (train, test, dropped)."""
    rng, coin = seeded(name, "pairs"), seeded(name, "labels")
    rows, used = [], set()
    dropped = dict.fromkeys(("no end", "empty", "identical", "tokenization"), 0)
    while len(rows) < TRAIN_PAIRS + TEST_PAIRS:
        prompts = []
        while len(prompts) < 1024:
            prompt = world.make_prompt(rng)
            if prompt not in seen and prompt not in used:
                used.add(prompt)
                prompts.append(prompt)
        first, second = (sample(model, tokenizer, prompts, settings.max_completion_tokens, seed=len(used) + i)
                         for i in (0, 1))
        for prompt, a, b in zip(prompts, first, second):
            reason = why_not(tokenizer, prompt, a, b)
            if reason:
                dropped[reason] += 1
                continue
            gap = world.gold_reward(prompt, a) - world.gold_reward(prompt, b)
            if coin.random() > 1 / (1 + math.exp(-LABEL_SCALE * gap)):
                a, b = b, a
            rows.append({"prompt": prompt, "chosen": a, "rejected": b})
        print(f"[{name}] pairs {min(len(rows), TRAIN_PAIRS + TEST_PAIRS)}", flush=True)
    rows = rows[:TRAIN_PAIRS + TEST_PAIRS]
    return rows[:TRAIN_PAIRS], rows[TRAIN_PAIRS:], dropped


def why_not(tokenizer, prompt: str, a: str | None, b: str | None) -> str | None:
    """Why two samples are no pair, or None."""
    if a is None or b is None:
        return "no end"
    if not a.strip() or not b.strip():
        return "empty"
    if a == b:
        return "identical"
    head = tokenizer(prompt)["input_ids"]
    if any(head + tokenizer(text)["input_ids"] != tokenizer(prompt + text)["input_ids"] or text[0] != " "
           for text in (a, b)):
        return "tokenization"
    return None


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Gzipped JSON lines without a time stamp: the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def build(name: str) -> None:
    """One world, from nothing to its folder in data/."""
    world, settings, start = worlds.world(name), SETTINGS[name], time.time()
    torch.set_num_threads(settings.threads)
    folder = REPOSITORY / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(world, name)
    tokenizer.save_pretrained(folder / "model")  # now: sampling leaves its padding in it
    model = make_model(tokenizer)
    print(f"[{name}] {len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    seen = train_sft(model, tokenizer, world, name, settings)
    model.save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").chmod(0o644)
    model = GPTNeoXForCausalLM.from_pretrained(folder / "model")  # the pairs come from the shipped files
    train, test, dropped = make_pairs(model, tokenizer, world, name, settings, seen)
    write_jsonl(folder / "train.jsonl.gz", train)
    write_jsonl(folder / "test.jsonl.gz", test)
    numbers = measure(world, tokenizer, train, test)
    text = card(folder, world, settings, model, numbers, dropped, test[0])
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"[{name}] {json.dumps(numbers | dropped, indent=1)}\n[{name}] {time.time() - start:.0f} s")


def measure(world, tokenizer, train: list[dict], test: list[dict]) -> dict[str, str]:
    """The numbers of the data card, all computed from the rows that are shipped."""
    rows = train + test
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = ([row[column] for row in rows] for column in ("chosen", "rejected"))

    def golds(completions: list[str]) -> list[float]:
        return [world.gold_reward(prompt, text) for prompt, text in zip(prompts, completions)]

    def lengths(texts: list[str], eos: int) -> str:
        counts = [len(ids) + eos for ids in tokenizer(texts)["input_ids"]]
        return f"{statistics.fmean(counts):.1f} ({max(counts)})"

    won, lost = golds(chosen), golds(rejected)
    chance, best = golds(chosen[1:] + chosen[:1]), golds([world.ideal(prompt) for prompt in prompts])
    decided = [a - b for a, b in zip(won, lost) if a != b]
    return {
        "training pairs": f"{len(train):,}",
        "held-out pairs": f"{len(test):,}",
        "gold reward, samples of the SFT model": f"{statistics.fmean(won + lost):.2f}",
        "gold reward, chance (each chosen text moved to another prompt)": f"{statistics.fmean(chance):.2f}",
        "gold reward, optimum": f"{statistics.fmean(best):.2f}",
        "gold reward, chosen": f"{statistics.fmean(won):.2f}",
        "gold reward, rejected": f"{statistics.fmean(lost):.2f}",
        "pairs of equal gold reward (label is a coin flip)": f"{1 - len(decided) / len(rows):.1%}",
        "labels flipped, of the other pairs": f"{sum(gap < 0 for gap in decided) / len(decided):.1%}",
        "tokens a prompt, mean (max)": lengths(prompts, 0),
        "tokens a completion with EOS, mean (max)": lengths(chosen + rejected, 1),
    }


def card(folder: Path, world, settings: Settings, model, numbers: dict, dropped: dict, example: dict) -> str:
    """The data card, README.md."""
    name = folder.name
    files = [folder / "train.jsonl.gz", folder / "test.jsonl.gz", *sorted((folder / "model").iterdir())]
    table = "\n".join(f"| {what} | {value} |" for what, value in numbers.items())
    hashes = "\n".join(f"| {file.relative_to(folder)} | {hashlib.sha256(file.read_bytes()).hexdigest()} |"
                       for file in files)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    texts = {**example, "ideal": world.ideal(example["prompt"])}
    examples = "\n".join(f"- {what}, gold reward {world.gold_reward(example['prompt'], text):g}: `{text}`"
                         for what, text in texts.items() if what != "prompt")
    return f"""---
license: apache-2.0
---

# {name}

Synthetic preference pairs and a tiny SFT model, made by one command from nothing but a generator of texts:
`python data/make.py {name}`. No person wrote or judged any of it.{STAND_INS.get(name, "")}

## The task

{world.__doc__.strip()}

The code is `{world.__name__.replace(".", "/")}.py`. Distinct prompts: at least {world.distinct_prompts():,}.

## Files

- `train.jsonl.gz`, `test.jsonl.gz`: one JSON object a line: `prompt`, `chosen`, `rejected`. All prompts are
  distinct, and none was seen in supervised fine-tuning. The test prompts are the ones to evaluate on.
- `model/`: GPT-NeoX, {model.num_parameters():,} parameters in float32, and its byte-level BPE tokenizer.

## How it was made

1. The tokenizer is trained on 20,000 prompts with imperfect demonstrations.
2. The model is trained from random weights on {settings.steps:,} batches of 64 fresh demonstrations:
   cross-entropy on the completion, AdamW at {LEARNING_RATE:g} with cosine decay.
3. For each fresh prompt two completions of at most {settings.max_completion_tokens} tokens are sampled at
   temperature 1. Prompts are dropped whose samples have no end, are empty or identical, or do not tokenize
   together with the prompt as they do alone. Dropped: {reasons}.
4. Bradley-Terry: a is preferred to b with probability sigmoid({LABEL_SCALE:g} (gold(a) - gold(b))).

The gold rewards are not in the files: `worlds.gold_reward({name!r}, prompts, completions)` computes them.

## Numbers

| what | value |
|---|---|
{table}

## Example

```
{example["prompt"]}
```

{examples}

## SHA-256

| file | hash |
|---|---|
{hashes}

Licence: Apache-2.0.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", nargs="*", choices=[*worlds.WORLDS, "all"], default="all")
    chosen = parser.parse_args().world
    torch.use_deterministic_algorithms(True)
    for name in worlds.WORLDS if "all" in chosen else chosen:
        build(name)
