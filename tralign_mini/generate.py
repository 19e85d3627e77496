"""Sampling from a policy, in batches.

What is drawn is the policy's own distribution (ancestral sampling: no top-k, no top-p, no penalties), because
KL, gold reward and win rate are expectations under exactly that distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .adapters import eval_mode
from .logprobs import refuse_virtual_tokens
from .tokens import prompt_ids


class Samples(NamedTuple):
    """One completion a prompt, in the order of the prompts."""

    texts: list[str]  # decoded completions, without special tokens
    sequences: list[tuple[list[int], list[int]]]  # (prompt_ids, completion_ids); EOS too if it was sampled


def sample(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict]], *,
           max_completion_tokens: int, max_prompt_tokens: int | None = None, temperature: float = 1.0,
           seed: int = 0, batch_size: int = 64) -> Samples:
    """Sample one completion for each prompt (a string or a list of chat messages); temperature 0 is greedy.

    model: a causal LM of transformers or a PeftModel, as it stands (active adapter included). A completion
    ends at the tokenizer's EOS or after `max_completion_tokens`. `sequences` are the very tokens that were
    drawn. The model's own generation settings are not used. Same seed and same batch size: same samples. The
    global random state, every module's train/eval mode and the model's settings are left as they were.
    """
    refuse_virtual_tokens(model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if max_completion_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_completion_tokens and batch_size must be at least 1, not "
                         f"{max_completion_tokens} and {batch_size}.")
    if not 0 <= temperature < inf:
        raise ValueError(f"temperature={temperature} is not a number from 0 (greedy) up.")
    if eos is None:
        raise ValueError("The tokenizer has no EOS token, so no completion could end. Set one.")
    prompt_tokens = [prompt_ids(tokenizer, prompt, max_prompt_tokens) for prompt in prompts]
    if [] in prompt_tokens:
        raise ValueError(f"Prompt {prompt_tokens.index([])} has no tokens to go on from. Drop it.")
    refuse_too_long(model.config, max(map(len, prompt_tokens), default=0), max_completion_tokens)

    pad = eos if pad is None else pad
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    drawing |= {"max_new_tokens": max_completion_tokens, "eos_token_id": eos, "pad_token_id": pad}
    settings = GenerationConfig(**drawing)
    device = model.get_input_embeddings().weight.device

    completions: list[list[int]] = [[]] * len(prompt_tokens)
    longest_first = sorted(range(len(prompt_tokens)), key=lambda i: -len(prompt_tokens[i]))
    accelerators = range(torch.accelerator.device_count())
    with _generating(model, settings) as causal_lm, torch.random.fork_rng(devices=accelerators):
        torch.manual_seed(seed)
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            rows = [torch.tensor(prompt_tokens[i], device=device) for i in batch]
            ids = pad_sequence(rows, True, pad, padding_side="left")
            mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side="left")
            output = causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for i, row in zip(batch, output[:, ids.shape[1] :].tolist()):
                completions[i] = row[: row.index(eos) + 1] if eos in row else row
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    return Samples(texts, list(zip(prompt_tokens, completions)))


def refuse_too_long(config, prompt_tokens: int, max_completion_tokens: int) -> None:
    """ValueError beyond the model's positions, where it would fail or answer nonsense."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and prompt_tokens + max_completion_tokens > positions:
        raise ValueError(
            f"the longest prompt has {prompt_tokens} tokens, with {max_completion_tokens} more for an answer "
            f"more than the {positions} positions of the model. Lower max_prompt_tokens to "
            f"{max(positions - max_completion_tokens, 1)}, or max_completion_tokens.")


@contextmanager
def _generating(model: nn.Module, settings: GenerationConfig) -> Iterator[nn.Module]:
    """Eval mode and `settings` as the only generation config, all back afterwards; yields the causal LM.

    `generate` fills each setting that the given config leaves open from the model's own one (a repetition
    penalty, a forced token), so the model gets ours for the time being. PeftModel.generate would put its own
    back: go around it.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = causal_lm.generation_config
    causal_lm.generation_config = settings
    try:
        with eval_mode(model):
            yield causal_lm
    finally:
        causal_lm.generation_config = own
