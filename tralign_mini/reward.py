"""A Bradley-Terry reward model: one number for a prompt and its completion, learnt from pairs.

It is one more `method` of a run, `tr.train(..., method="reward")`: the base model with a new linear head in
place of the vocabulary's (arXiv 2203.02155, section 3.5). The number is read at the completion's last token,
so a checkpoint is an ordinary sequence classifier:

    AutoModelForSequenceClassification.from_pretrained(folder)                          # tuning=full
    AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)        # lora, qlora

gives the same numbers on whole texts (the second with `config.pad_token_id = tokenizer.pad_token_id`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel

from .logprobs import checked, predictions
from .losses import bradley_terry_loss
from .models import is_adapter, load_base, load_tokenizer, loading, set_pad_token
from .tokens import collate, prepare, tokenize

SCORED_AT_ONCE = 64  # sequences in one forward pass


def completion_rewards(model, batch) -> torch.Tensor:
    """The reward of each completion, read at its last token, differentiable: (n,) float32.

    model: a sequence classifier of transformers with one label, or a PeftModel of one. batch: whole sequences
    or packed rows, as for `logprobs.completion_logps`. ValueError for a completion without a token.
    """
    inputs, source, _, counted = predictions(model, batch)
    if not counted.any(1).all():
        first = counted.any(1).int().argmin().item()
        raise ValueError(f"completion {first} of the batch has no token to read its reward at. Give every "
                         "completion at least one (EOS if it is empty).")
    last = batch["last"] if "last" in batch else torch.where(counted, source + 1, 0).amax(1)
    return read_at(model, inputs, last)


def read_at(model, inputs: dict, places: torch.Tensor) -> torch.Tensor:
    """What a classifier's head says at flat positions of its input, (places,) float32."""
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(classifier, classifier.base_model_prefix)
    hidden = backbone(**inputs, use_cache=False)[0].flatten(0, 1).index_select(0, places)  # (places, hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # rewards of 8 bits would tie
        return classifier.score(hidden.float()).squeeze(-1)


def plain_completion_rewards(model, batch) -> torch.Tensor:
    """`completion_rewards` of whole sequences the plain way: the classifier's own forward finds the token."""
    input_ids, attention_mask, _ = checked(batch)
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, 0].float()


REWARDS = ("rewards", completion_rewards, plain_completion_rewards)  # for sharing.row_limit


@torch.no_grad()
def sequence_rewards(model: torch.nn.Module, sequences: Sequence, pad_token_id: int) -> torch.Tensor:
    """Rewards of [(prompt_ids, completion_ids), ...]: (n,) float32 on the CPU, without dropout."""
    device, modes = next(model.parameters()).device, [(module, module.training) for module in model.modules()]
    by_length = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    rewards = torch.empty(len(sequences))
    model.eval()
    try:
        for first in range(0, len(sequences), SCORED_AT_ONCE):
            part = by_length[first : first + SCORED_AT_ONCE]
            batch = collate([sequences[i] for i in part], pad_token_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            rewards[part] = completion_rewards(model, batch).cpu()
    finally:
        for module, training in modes:
            module.training = training
    return rewards


def calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error of a reward model on pairs, from its margins r(chosen) - r(rejected).

    The model's confidence in a pair is sigmoid(|margin|), and it is right if the margin is positive (half
    right at 0). Pairs are sorted by confidence into bins of equal mass; the error is the mean over the bins
    of |mean confidence - share right|, weighted by their pairs. A calibrated model has 0 up to noise, which
    is about 0.4 sqrt(bins / n) with n pairs.
    ValueError without a margin.
    """
    margins = np.asarray(margins, dtype=float)
    if margins.ndim != 1 or not len(margins):
        raise ValueError("calibration_error needs a flat list of margins, at least one; found the shape "
                         f"{margins.shape}.")
    order = np.argsort(np.abs(margins), kind="stable")
    confidence = 1 / (1 + np.exp(-np.abs(margins[order])))
    gaps = confidence - (np.sign(margins[order]) + 1) / 2
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, min(bins, len(gaps)))) / len(gaps))


class HeldOutPairs:
    """What a row of metrics.jsonl gets every `eval_steps` when a reward model is trained."""

    def __init__(self, recipe, tokenizer, dataset):
        limits = {key: getattr(recipe, key) for key in ("max_prompt_tokens", "max_completion_tokens")}
        rows, _ = prepare(dataset, tokenizer, method="reward", **limits)
        sides = ("chosen_ids", "rejected_ids")
        self.sequences = [(row["prompt_ids"], row[side]) for side in sides for row in rows]
        self.pad_token_id = tokenizer.pad_token_id

    def __call__(self, trainer, step: int) -> dict[str, float]:
        with trainer.accelerator.autocast():
            chosen, rejected = sequence_rewards(trainer.policy, self.sequences, self.pad_token_id).chunk(2)
        loss = bradley_terry_loss(chosen, rejected).losses.mean().item()
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected)
        return {"eval/loss": loss, "eval/accuracy": right.mean().item(),
                "eval/calibration": calibration_error((chosen - rejected).tolist())}


class RewardModel:
    """A trained reward model, ready to score: `model` (a sequence classifier or PeftModel), `tokenizer`."""

    def __init__(self, model, tokenizer, *, max_prompt_tokens: int = 512, max_completion_tokens: int = 512):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.limits = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}

    @classmethod
    def load(cls, source) -> RewardModel:
        """From a run of method=reward (`Run` or its directory) or from a folder with such a model or adapter.

        A folder does not say that an adapter's base had 4 bits: its base is loaded in float32. ValueError if
        it is something else, with what it is.
        """
        from .runs import Run

        if isinstance(source, cls):
            return source
        if not isinstance(source, Run) and not (Path(source) / "recipe.yaml").is_file():
            return cls(*_load_folder(str(source)))
        run = source if isinstance(source, Run) else Run(source)
        recipe = run.recipe
        if recipe.method != "reward":
            raise ValueError(f"{run.directory} is a run of method={recipe.method}: it made a policy, which "
                             "gives no rewards. Give a run of method=reward.")
        return cls(run.policy, run.tokenizer, max_prompt_tokens=recipe.max_prompt_tokens,
                   max_completion_tokens=recipe.max_completion_tokens)

    def score(self, prompts: Sequence, completions: Sequence) -> list[float]:
        """The reward of each completion of its prompt: texts, or chat messages (a completion's text will do).

        Cut as in training. ValueError for lists that are empty or of two lengths.
        """
        is_text = isinstance(prompts, str) or isinstance(completions, str)
        if is_text or len(prompts) != len(completions) or not len(prompts):
            sizes = [f"{len(x)} (a {type(x).__name__})" for x in (prompts, completions)]
            raise ValueError(f"score got {sizes[0]} prompts and {sizes[1]} completions: give two lists of "
                             "one length, at least 1, in which completion i answers prompt i.")
        sequences = []
        for prompt, completion in zip(prompts, completions):
            if not isinstance(prompt, str) and isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            sequences.append(tokenize(self.tokenizer, prompt, completion, **self.limits)[:2])
        return self.score_ids(sequences).tolist()

    def score_ids(self, sequences: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Rewards of (prompt_ids, completion_ids) as `sample` drew them: (n,) float32, on the CPU."""
        return sequence_rewards(self.model, sequences, self.tokenizer.pad_token_id)


def score(prompts: Sequence, completions: Sequence, *, model) -> list[float]:
    """Rewards of completions by `model`: a `RewardModel` or anything that `RewardModel.load` takes."""
    return RewardModel.load(model).score(prompts, completions)


def _load_folder(folder: str):
    with loading(folder):
        tokenizer, config = load_tokenizer(folder, separate_pad=True), None
        if is_adapter(folder):
            config = PeftConfig.from_pretrained(folder)
            if config.task_type != "SEQ_CLS":
                raise ValueError(f"it is an adapter of the kind {config.task_type} and gives no rewards")
        base = load_base(config.base_model_name_or_path if config else folder, torch.float32, classifier=True,
                         head_seed=0 if config else None)  # the adapter's folder brings the head
        model = PeftModel.from_pretrained(base, folder) if config else base
    set_pad_token(model, tokenizer)
    return model, tokenizer
