"""Measuring a policy on its own samples: KL to the initial policy and to the reference, and the gold reward.

KL(policy || other) is the mean over samples y ~ policy (temperature 1, no top-k or top-p) of log
policy(y|x) / other(y|x), a sum over the tokens of the completion. Log-ratios on the *training* completions
are something else: nobody sampled those from the policy.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel

from .checkpoint import quietly
from .data import collate
from .generate import Samples, sample
from .logprobs import completion_logps
from .models import load_base
from .recipe import Recipe
from .reference import using_initial
from .worlds import gold_reward

SCORED_AT_ONCE = 32  # sequences in one forward pass


@contextmanager
def initial_policy(policy: torch.nn.Module, recipe: Recipe):
    """The policy that training began from: adapters switched back, or a full model loaded from disk."""
    if isinstance(policy, PeftModel):
        with using_initial(policy) as initial:
            yield initial
    else:
        with quietly():
            initial = load_base(recipe.model, torch.float32).eval()
        yield initial


@torch.no_grad()
def sequence_logps(model: torch.nn.Module, sequences: list, pad_token_id: int) -> torch.Tensor:
    """Summed log-probabilities of sampled completions, (n,) float64, without dropout."""
    device, modes = next(model.parameters()).device, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        parts = []
        for start in range(0, len(sequences), SCORED_AT_ONCE):
            batch = collate(sequences[start : start + SCORED_AT_ONCE], pad_token_id)
            parts.append(completion_logps(model, {name: tensor.to(device) for name, tensor in batch.items()}))
        return torch.cat(parts).double().cpu()
    finally:
        for module, training in modes:
            module.training = training


class Evaluator:
    """What a row of metrics.jsonl gets every `eval_steps`: on the same held-out prompts each time."""

    def __init__(self, recipe: Recipe, tokenizer, prompts: list):
        self.recipe, self.tokenizer, self.prompts = recipe, tokenizer, prompts

    def sample(self, model: torch.nn.Module, seed: int) -> Samples:
        """One completion of `model` for each prompt, at temperature 1."""
        recipe = self.recipe
        return sample(
            model,
            self.tokenizer,
            self.prompts,
            max_completion_tokens=recipe.max_completion_tokens,
            max_prompt_tokens=recipe.max_prompt_tokens,
            seed=seed,
        )

    def __call__(self, trainer, step: int) -> dict[str, float]:
        pad = self.tokenizer.pad_token_id
        with trainer.accelerator.autocast():
            samples = self.sample(trainer.policy, seed=self.recipe.seed + step)
            policy_logps = sequence_logps(trainer.policy, samples.sequences, pad)
            others = {"kl/initial": initial_policy(trainer.policy, self.recipe)}
            if trainer.reference is not None:
                others["kl/reference"] = trainer.reference.using()
            row = {}
            for name, other in others.items():
                with other as model:
                    row[name] = (policy_logps - sequence_logps(model, samples.sequences, pad)).mean().item()
        row["length/completion"] = sum(len(ids) for _, ids in samples.sequences) / len(samples.sequences)
        if self.recipe.world:
            rewards = gold_reward(self.recipe.world, self.prompts, samples.texts)
            row["gold/reward"] = sum(rewards) / len(rewards)
        return row


def write_samples(
    policy, recipe: Recipe, tokenizer, prompts: list, path: Path, *, seed: int, autocast=None
) -> None:
    """Answers of the initial policy and of the policy to the same prompts, one JSON object a line."""
    evaluator = Evaluator(recipe, tokenizer, prompts)
    with autocast or nullcontext():
        answers = {"policy": evaluator.sample(policy, seed).texts}
        with initial_policy(policy, recipe) as initial:
            answers["initial"] = evaluator.sample(initial, seed).texts
    rows = [
        {"prompt": p, "initial": a, "policy": b}
        for p, a, b in zip(prompts, answers["initial"], answers["policy"])
    ]
    if recipe.world:
        gold = {who: gold_reward(recipe.world, prompts, texts) for who, texts in answers.items()}
        for row, a, b in zip(rows, gold["initial"], gold["policy"]):
            row |= {"gold_initial": a, "gold_policy": b}
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def evaluate(run, *, prompts: int | None = None, seed: int | None = None) -> Path:
    """Sample a finished run again, on more prompts or with another seed, and write its report anew.

    run: a `Run` or its directory; prompts: how many held-out prompts (default: the recipe's eval_prompts).
    """
    from .runs import Run

    run = run if isinstance(run, Run) else Run(run)
    held_out = run.held_out_prompts(prompts)
    seed = run.recipe.seed if seed is None else seed
    write_samples(run.policy, run.recipe, run.tokenizer, held_out, run.directory / "samples.jsonl", seed=seed)
    return run.report()
