"""Tiny models of many architectures, groups of completions, and gradients: what tests of the engine need."""

from __future__ import annotations

import random

import torch
import transformers
from helpers import VOCAB, _build, tiny_llama, tiny_neox
from hypothesis import strategies as st

from tralign_mini.packing import pack

# Softcaps that cap something, so that one that was forgotten shows; windows longer than all rows of the tests
GEMMA = {"num_key_value_heads": 2, "head_dim": 8}
CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}
FAMILIES = {
    "GPTNeoX": {}, "Llama": {}, "Qwen2": {"num_key_value_heads": 2}, "Gemma": GEMMA,
    "Gemma2": GEMMA | CAPS | {"query_pre_attn_scalar": 8, "sliding_window": 128},
    "Gemma3": GEMMA | {"query_pre_attn_scalar": 8, "sliding_window": 128},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 128},
}
BOTH = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
BOTH.remove(("Gemma2", "sdpa"))  # it has a softcap in its attention, which SDPA cannot have


def build(family: str, **config):
    """A tiny random causal LM, float32, in train mode without dropout, as `load_policy` leaves one."""
    if family in ("GPTNeoX", "Llama"):
        model = {"GPTNeoX": tiny_neox, "Llama": tiny_llama}[family](**config)
    else:
        head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        names = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
        config_class = getattr(transformers, names.get(family, f"{family}Config"))
        model = _build(getattr(transformers, head), config_class, 0, FAMILIES.get(family, {}) | config)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    return model.train()


def random_groups(count: int, *, prompt=(1, 12), completion=(1, 9), seed: int = 0) -> list:
    """`count` prompts, each with two completions, of random tokens and random lengths."""
    rng = random.Random(seed)

    def ids(least, most):
        return [rng.randint(3, VOCAB - 1) for _ in range(rng.randint(least, most))]

    return [(ids(*prompt), [ids(*completion), ids(*completion)]) for _ in range(count)]


def sequences_of(groups: list) -> list:
    """The same completions as whole sequences: all first ones, then all second ones."""
    return [(prompt, completions[k]) for k in (0, 1) for prompt, completions in groups]


def packed(groups: list, limit: int = 60, pad: int = 0) -> dict[str, torch.Tensor]:
    return pack(groups, pad, hidden_size=32, limit=limit)


def weighted(logps: torch.Tensor) -> torch.Tensor:
    """A loss in which every completion counts, with a weight of its own."""
    return (logps * torch.linspace(-1, 1.5, len(logps))).mean()


def gradients_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that got one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Every gradient to `tolerance`, relative to its largest number beyond 1; something has to be there."""
    assert actual.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        bound = tolerance * max(1, gradient.abs().max())
        assert (actual[name] - gradient).abs().max() <= bound, name


tokens = st.integers(3, VOCAB - 1)
groups = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=7),
              st.tuples(st.lists(tokens, max_size=6), st.lists(tokens, max_size=6))), min_size=1, max_size=5)
