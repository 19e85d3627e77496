"""A PPO run: from a recipe to a run's directory; checkpoints, resuming, guard rails.

    for each iteration:   sample and score -> look whether the policy is sane -> save it, if due -> learn

A checkpoint is written only after the policy in it was sampled from and passed the guard rails, so a run that
went wrong leaves a last checkpoint from before that.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .callbacks import TensorBoard
from .checkpoint import (
    checkpoints,
    read_seal,
    restore_policy,
    save_policy,
    start_hash,
    weight_hash,
    write_seal,
)
from .evaluate import Evaluator, write_samples
from .heap import keep_freed_memory
from .models import compute_dtype, load_policy, load_tokenizer, this_process
from .ppo import PPO, Rollout
from .ppo_models import trained_parameters, value_and_score
from .ppo_recipe import PPORecipe
from .recipe import Recipe
from .runs import (
    GIVEN_PROMPTS,
    Run,
    begin,
    check_lengths,
    load_reference,
    open_directory,
    rewind,
    split_rows,
    with_absolute_paths,
)
from .tokens import prompt_ids


def train_ppo(recipe, *, reward=None, prompts=None, stop=None, **overrides) -> Run:
    """A whole PPO run: load, train, measure, report. Returns the `Run`.

    recipe, overrides, stop: as for `train`, but method is ppo. reward: what is maximised, if not the recipe's
    reward_model: a `RewardModel` or a function of (prompts, texts) that gives a number for each. prompts: to
    train on instead of those of the recipe's data, from which the held-out ones still come. Errors in recipe,
    data or models are ValueErrors; a run that went wrong (a loss that is not finite, KL or entropy beyond the
    guard rails of the recipe) ends in a FloatingPointError, its last checkpoint being from before that.
    """
    if overrides.get("resume") and not isinstance(recipe, (Recipe, dict)) and Path(recipe).is_dir():
        overrides = {"output": str(recipe)} | overrides  # a run's directory may have been moved since
    recipe = Recipe.load(recipe, **{"method": "ppo"} | overrides)
    reward = recipe.reward_model if reward is None else reward
    if reward is None:
        raise ValueError("method=ppo needs something to maximise: reward_model=RUN, the directory of a run "
                         "of method=reward; or, in Python, a function: train_ppo(..., reward=...).")
    if this_process().num_processes > 1:
        raise ValueError("method=ppo runs in one process. Start it without torchrun or accelerate launch.")
    recipe = with_absolute_paths(recipe)
    directory = Path(recipe.output)
    resumed = open_directory(directory, recipe)

    tokenizer = load_tokenizer(recipe.model)
    dataset, _, held_out, source = split_rows(recipe)
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts[:40]!r}: it has to be a list of prompts.")
    given = None if prompts is None else list(prompts)
    prompts = list(dataset["prompt"]) if given is None else given
    prompts, report = _training_prompts(prompts, held_out, tokenizer)
    plan = recipe.plan(len(prompts))
    order = np.random.default_rng(recipe.seed).permutation(len(prompts))[: plan.rows]
    prompts = [prompts[i] for i in order]
    policy = load_policy(recipe)
    tokens = [{"prompt_ids": prompt_ids(tokenizer, prompt, recipe.max_prompt_tokens)} for prompt in prompts]
    check_lengths(policy, recipe, tokenizer, tokens, held_out)
    run = PPORun(recipe, policy, tokenizer, prompts, reward, directory, plan.steps)
    print(f"{plan}\nreward    {run.about}\nevaluation {len(held_out)} prompts, {source}", flush=True)
    if not resumed:
        begin(directory, recipe, report)
        if given is not None:
            (directory / GIVEN_PROMPTS).write_text(json.dumps(given))
    else:
        checkpoint = rewind(directory)
        if checkpoint:
            run.restore(checkpoint)
        print(f"resuming after step {run.step}", flush=True)
    run.train(Evaluator(recipe, tokenizer, held_out), stop)

    result = Run(directory, policy=policy.eval(), tokenizer=tokenizer, reference=run.reference)
    if run.step == plan.steps:
        write_samples(policy, recipe, tokenizer, held_out, directory / "samples.jsonl", seed=recipe.seed,
                      autocast=run.accelerator.autocast())
        result.report()
    return result


class PPORun:
    """The models of a PPO run and its place in time: `step` iterations are done."""

    def __init__(self, recipe: PPORecipe, policy, tokenizer, prompts: list, reward, directory: Path,
                 steps: int):
        self.recipe, self.policy, self.tokenizer, self.prompts = recipe, policy, tokenizer, prompts
        self.directory, self.steps, self.step, self.reference_updates = directory, steps, 0, 0
        self.trust_region = recipe.trust_region()
        self.start = {"model": start_hash(policy)}
        self.reference = load_reference(policy, recipe)  # before other adapters: it wants the policy alone
        value, score, self.about = value_and_score(policy, tokenizer, reward)
        if recipe.gradient_checkpointing and hasattr(value, "activation_checkpointing_enable"):
            value.activation_checkpointing_enable({"use_reentrant": False})
        precision = "bf16" if compute_dtype(recipe) is torch.bfloat16 else "no"
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory(policy)
        self.trained = trained_parameters(value)
        data, values = hashlib.sha256(json.dumps(prompts).encode()), hashlib.sha256()
        for weight in self.trained.values():
            values.update(weight.detach().cpu().numpy().tobytes())
        self.start |= {"data": data.hexdigest(), "value": values.hexdigest()}
        self.ppo = PPO(recipe, policy, self.reference, value, self.trained, score, tokenizer,
                       self.accelerator.autocast)

    def train(self, evaluator, stop=None) -> None:
        """Iterate to the end, or until `stop` is set; a row of metrics.jsonl for each iteration."""
        recipe, first = self.recipe, self.step
        tensorboard = TensorBoard(self.directory / "tensorboard") if recipe.tensorboard else None
        clock = time.perf_counter()
        with tqdm(total=self.steps, initial=self.step) as bar:
            while True:
                rollout = self.ppo.rollout(self._prompts_of(self.step), self.step)
                self._guard(rollout)
                asked = stop is not None and stop.is_set() and self.step > first
                stopping = asked or self.step == self.steps
                if self.step > first and (stopping or self.step % recipe.save_steps == 0):
                    self.save()
                if stopping:
                    return
                row = self._learn(rollout)
                if self.step % recipe.eval_steps == 0 or self.step == self.steps:
                    row |= evaluator(self, self.step)
                row["seconds"], clock = round(time.perf_counter() - clock, 3), time.perf_counter()
                with open(self.directory / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                if tensorboard:
                    tensorboard.write(row)
                bar.set_postfix({name: f"{row[key]:.3f}" for name, key in
                                 (("reward", "reward/model"), ("KL", "kl/sequence"))}, refresh=False)
                bar.update()

    def _prompts_of(self, step: int) -> list:
        """The prompts of an iteration: epoch after epoch, each in an order of its own."""
        n, size = len(self.prompts), self.recipe.batch_size
        places = range(step * size, (step + 1) * size)
        epochs = {place // n for place in places}
        orders = {i: np.random.default_rng([self.recipe.seed, i]).permutation(n) for i in epochs}
        return [self.prompts[orders[place // n][place % n]] for place in places]

    def _learn(self, rollout: Rollout) -> dict:
        """Learn from a rollout; then the reference moves, if due. The iteration's row of metrics.jsonl."""
        recipe, rate = self.recipe, learning_rate(self.recipe, self.step, self.steps)
        for group in self.ppo.optimizer.param_groups:
            group["lr"] = rate
        numbers = self.ppo.update(rollout, self.step)
        self.step += 1
        moved = {}
        if self.trust_region.is_due(self.step):
            moved = self.reference.update(self.trust_region.alpha)
            self.reference_updates += 1
        epoch = round(self.step * recipe.batch_size / len(self.prompts), 6)
        row = {"step": self.step, "epoch": epoch, "loss": numbers["loss/policy"]} | rollout.numbers | numbers
        return row | {"alpha": self.trust_region.alpha, "tau": self.trust_region.tau,
                      "reference_updates": self.reference_updates, **moved, "learning_rate": rate}

    def _guard(self, rollout: Rollout) -> None:
        """FloatingPointError if what the policy just sampled shows that it went wrong."""
        recipe, numbers = self.recipe, rollout.numbers
        kl, entropy = numbers["kl/sequence"], numbers["entropy"]
        wrong = [f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]
        if kl > recipe.max_kl:
            wrong.append(f"KL explosion, {kl:.1f} nats a completion: max_kl={recipe.max_kl:g}")
        if entropy < recipe.min_entropy:
            wrong.append(f"entropy collapse, {entropy:.4f} nats a token: min_entropy={recipe.min_entropy:g}")
        if wrong:
            found = checkpoints(self.directory)
            last = f"{found[-1]} is from before that" if found else "There is no checkpoint yet"
            raise FloatingPointError(
                f"the policy after step {self.step}: {'; '.join(wrong)}. Training stops. {last}. Try a "
                "larger kl_coef, a smaller learning_rate or fewer ppo_epochs.")

    def save(self) -> None:
        """Write a checkpoint; an older whole one stays while it is being written."""
        folder = self.directory / "checkpoints" / f"checkpoint-{self.step}"
        shutil.rmtree(folder, ignore_errors=True)  # cut off by an earlier kill
        folder.mkdir(parents=True)
        save_policy(self.policy, folder)
        self.tokenizer.save_pretrained(folder)
        self.reference.save(folder / "reference")
        tensors = {f"value.{name}": weight.detach().contiguous() for name, weight in self.trained.items()}
        for i, moments in self.ppo.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor.contiguous() for name, tensor in moments.items()}
        save_file(tensors, folder / "ppo.safetensors")
        write_seal(folder, {
            "step": self.step, "reference_updates": self.reference_updates, "kl_coef": self.ppo.kl_coef,
            "weights": weight_hash(self.policy), "start": self.start, "processes": 1})
        for old in checkpoints(self.directory)[:-2]:
            shutil.rmtree(old)

    def restore(self, folder: Path) -> None:
        """Take back, to the bit, what `save` wrote. ValueError if the run began from something else."""
        seal = read_seal(folder, self.start)
        restore_policy(self.policy, folder)
        self.reference.load(folder / "reference")
        self.step, self.reference_updates = seal["step"], seal["reference_updates"]
        self.ppo.kl_coef = seal["kl_coef"]
        moments = defaultdict(dict)
        for key, tensor in load_file(folder / "ppo.safetensors").items():
            kind, name = key.split(".", 1)
            if kind == "value":
                self.trained[name].data.copy_(tensor)
            else:
                i, name = name.split(".")
                moments[int(i)][name] = tensor
        optimizer = self.ppo.optimizer
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(moments)})


def learning_rate(recipe: PPORecipe, step: int, steps: int) -> float:
    """The learning rate of iteration `step`, counted from 0, of `steps`."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    left = (steps - step) / max(steps - recipe.warmup_steps, 1)
    shares = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return recipe.learning_rate * shares[recipe.lr_scheduler]


def _training_prompts(prompts: list, held_out: list, tokenizer) -> tuple[list, dict[str, int]]:
    """Different prompts that have a token and are not held out; and how many there were."""
    taken, kept = {json.dumps(prompt) for prompt in held_out}, {}
    for prompt in prompts:
        key = json.dumps(prompt)
        if prompt and key not in taken and prompt_ids(tokenizer, prompt):
            kept.setdefault(key, prompt)
    report = {"rows in": len(prompts), "different prompts to train on": len(kept)}
    if not kept:
        raise ValueError(f"There is no prompt to train on: of {len(prompts)}, each is empty or held out.")
    return list(kept.values()), report
