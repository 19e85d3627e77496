"""Measuring a policy on its own samples: KL to the initial policy and to the reference, and the gold reward.

KL(policy || other) is the mean over samples y ~ policy (temperature 1, no top-k or top-p) of log
policy(y|x) / other(y|x), a sum over the tokens of the completion. Log-ratios on the *training* completions
are something else: nobody sampled those from the policy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel

from .adapters import eval_mode, using_initial
from .checkpoint import quietly
from .data import collate
from .generate import Samples, sample
from .json_lines import write_rows
from .logprobs import completion_logps
from .models import load_base
from .recipe import Recipe
from .worlds import gold_reward

SCORED_AT_ONCE = 32  # sequences in one forward pass


def initial_policy(policy: torch.nn.Module, recipe: Recipe) -> AbstractContextManager[torch.nn.Module]:
    """The policy that training began from: adapters switched back, or a full model loaded from disk."""
    if isinstance(policy, PeftModel):
        return using_initial(policy)
    with quietly():
        return nullcontext(load_base(recipe.model, torch.float32).eval())


def draw(model: torch.nn.Module, tokenizer, recipe: Recipe, prompts: list, *, seed: int,
         temperature: float = 1.0) -> Samples:
    """One completion of `model` for each prompt, within the lengths of the recipe."""
    limits = {key: getattr(recipe, key) for key in ("max_prompt_tokens", "max_completion_tokens")}
    return sample(model, tokenizer, prompts, seed=seed, temperature=temperature, **limits)


@torch.no_grad()
def sequence_logps(model: torch.nn.Module, sequences: list, pad_token_id: int) -> torch.Tensor:
    """Summed log-probabilities of sampled completions, (n,) float64, without dropout."""
    device, parts = next(model.parameters()).device, []
    with eval_mode(model):
        for start in range(0, len(sequences), SCORED_AT_ONCE):
            batch = collate(sequences[start : start + SCORED_AT_ONCE], pad_token_id)
            parts.append(completion_logps(model, {name: tensor.to(device) for name, tensor in batch.items()}))
    return torch.cat(parts).double().cpu()


class Evaluator:
    """What a row of metrics.jsonl gets every `eval_steps`: on the same held-out prompts each time."""

    def __init__(self, recipe: Recipe, tokenizer, prompts: list):
        self.recipe, self.tokenizer, self.prompts = recipe, tokenizer, prompts

    def __call__(self, trainer, step: int) -> dict[str, float]:
        recipe, policy, pad = self.recipe, trainer.policy, self.tokenizer.pad_token_id
        with trainer.accelerator.autocast():
            texts, sequences = draw(policy, self.tokenizer, recipe, self.prompts, seed=recipe.seed + step)
            policy_logps, row = sequence_logps(policy, sequences, pad), {}
            others = {"kl/initial": initial_policy(policy, recipe)}
            if trainer.reference is not None:
                others["kl/reference"] = trainer.reference.using()
            for name, other in others.items():
                with other as model:
                    row[name] = (policy_logps - sequence_logps(model, sequences, pad)).mean().item()
        row["length/completion"] = sum(len(ids) for _, ids in sequences) / len(sequences)
        if recipe.world:
            row["gold/reward"] = sum(gold_reward(recipe.world, self.prompts, texts)) / len(texts)
        return row


def write_samples(policy, recipe: Recipe, tokenizer, prompts: list, path: Path, *, seed: int,
                  autocast=None) -> None:
    """Answers of the initial policy and of the policy to the same prompts, one JSON object a line."""
    with autocast or nullcontext():
        with initial_policy(policy, recipe) as initial:
            texts = {"initial": draw(initial, tokenizer, recipe, prompts, seed=seed).texts}
        texts["policy"] = draw(policy, tokenizer, recipe, prompts, seed=seed).texts
    columns = {"prompt": prompts} | texts
    if recipe.world:
        columns |= {f"gold_{who}": gold_reward(recipe.world, prompts, texts[who]) for who in texts}
    write_rows(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def evaluate(run, *, prompts: int | None = None, seed: int | None = None) -> Path:
    """Sample a finished run again, on more prompts or with another seed, and write its report anew.

    run: a `Run` or its directory; prompts: how many held-out prompts (default: the recipe's eval_prompts).
    """
    from .runs import Run

    run = run if isinstance(run, Run) else Run(run)
    if run.recipe.method == "reward":
        raise ValueError(f"{run.directory} is a reward model: it writes no answers. Its accuracy is in "
                         "report.md; let it judge others with --judge reward:RUN.")
    held_out, seed = run.held_out_prompts(prompts), run.recipe.seed if seed is None else seed
    write_samples(run.policy, run.recipe, run.tokenizer, held_out, run.directory / "samples.jsonl", seed=seed)
    return run.report()
