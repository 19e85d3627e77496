"""A PPO run on a tiny model, with a reward that anybody can check: how often the word w5 is said."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from helpers import tiny_neox, tiny_run, tiny_tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

from tralign_mini.ppo import PPO
from tralign_mini.ppo_models import trained_parameters, value_and_score
from tralign_mini.ppo_recipe import PPORecipe
from tralign_mini.reference import make_reference

PROMPTS = ["w3 w4", "w7 w8 w9 w10", "w11", "w12 w13 w14", "w15 w16", "w17", "w18 w19 w20 w21 w22", "w23 w24"]


def says_w5(prompts, texts) -> list[float]:
    """The callable reward: how many of the words are w5."""
    return [float(text.split().count("w5")) for text in texts]


def tiny_reward_model(folder: Path, seed: int = 5) -> Path:
    """A folder with a random reward model of the tiny policy's shape."""
    config = GPTNeoXConfig(**tiny_neox().config.to_dict() | {"num_labels": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPTNeoXForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def ppo_recipe(**settings) -> PPORecipe:
    defaults = {"model": "none", "data": "none", "batch_size": 8, "minibatches": 2, "learning_rate": 1e-3,
                "max_prompt_tokens": 16, "max_completion_tokens": 8}
    return PPORecipe(**defaults | settings)


def tiny_ppo(policy=None, reward=says_w5, reference=None, **settings) -> PPO:
    """A PPO over a tiny GPT-NeoX (or `policy`), its reference and its value function."""
    policy = tiny_neox().train() if policy is None else policy
    reference = make_reference(policy) if reference is None else reference
    tokenizer = tiny_tokenizer()
    value, score, _ = value_and_score(policy, tokenizer, reward)
    trained = trained_parameters(value)
    return PPO(ppo_recipe(**settings), policy, reference, value, trained, score, tokenizer, nullcontext)


def ppo_settings(folder: Path, **settings) -> dict:
    """Settings for `train_ppo(..., reward=says_w5)`: 6 iterations of 8 prompts."""
    return tiny_run(folder, method="ppo", max_steps=6, minibatches=2, **settings)
