"""A run: from a recipe to a directory that holds everything of it, and back from the directory."""

from __future__ import annotations

import json
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from .changes import FILE as CHANGES
from .changes import read_changes, region_at
from .checkpoint import checkpoints, remove_unfinished, restore_policy
from .data import NAMES, load_dataset, prepare
from .evaluate import Evaluator, write_samples
from .generate import refuse_too_long
from .json_lines import drop_after, read_rows
from .models import is_adapter, load_policy, load_tokenizer, this_process
from .recipe import WITHOUT_REFERENCE, Recipe
from .reference import make_reference
from .reference_cache import cache_directory
from .reward import HeldOutPairs
from .tokens import prompt_ids
from .train import AlignmentTrainer
from .worlds import WORLDS

GIVEN_PROMPTS = "prompts.json"  # in a run's directory: those that a Python program gave to train_ppo
NOT_OF_THE_RUN = ("resume", "output", "save_steps", "tensorboard")  # may differ when a run is resumed


class Run:
    """A run's directory, opened: `history`, `recipe`, `policy`, `report()`. ValueError if it is not one."""

    def __init__(self, directory: str | Path, **in_memory):
        self.directory = Path(directory)
        if not (self.directory / "recipe.yaml").is_file():
            raise ValueError(f"{self.directory} is not a run's directory: there is no recipe.yaml in it. "
                             "Give the `output` folder of a run.")
        self.recipe = Recipe.load(self.directory)
        vars(self).update(in_memory)  # policy, tokenizer, reference after `train`, instead of loading them

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, {len(self.history)} steps)"

    @property
    def history(self) -> pd.DataFrame:
        """metrics.jsonl as a table: a row for each optimizer step, NaN where a column was not measured."""
        return pd.DataFrame(read_rows(self.directory / "metrics.jsonl"))

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.recipe.model, separate_pad=self.recipe.method == "reward")

    @cached_property
    def policy(self):
        """The trained policy, in eval mode: in memory after `train`, else loaded from the last checkpoint."""
        checkpoint, policy = self.last_checkpoint, load_policy(self.recipe)
        restore_policy(policy, checkpoint)
        return policy.eval()

    @cached_property
    def reference(self):
        """The reference as it stood at the last checkpoint (`reference.using()` gives a model), or None."""
        reference = load_reference(self.policy, self.recipe)
        if reference is not None:
            reference.load(self.last_checkpoint / "reference")
        return reference

    @property
    def last_checkpoint(self) -> Path:
        found = checkpoints(self.directory)
        if not found:
            raise ValueError(f"{self.directory} has no whole checkpoint yet: go on with resume=true.")
        return found[-1]

    def held_out_prompts(self, count: int | None = None) -> list:
        """The first `count` evaluation prompts (default: the recipe's), none of which the run trained on."""
        train, _, prompts, _ = split_rows(self.recipe)
        if count is not None:
            given = self.directory / GIVEN_PROMPTS
            given = json.loads(given.read_text()) if given.is_file() else []
            trained = {json.dumps(prompt) for prompt in [*train["prompt"], *given]}
            prompts = split_rows(self.recipe.replace(eval_prompts=count))[2]
            prompts = [prompt for prompt in prompts if json.dumps(prompt) not in trained]
        return prompts

    def report(self) -> Path:
        """Write report.md and its figures from the files of the directory; its path."""
        from .report import report

        return report(self.directory)


def load_reference(policy, recipe: Recipe):
    """The reference of a run at its start, equal to `policy`; None for a method that compares with none."""
    if recipe.method in WITHOUT_REFERENCE:
        return None
    # an adapter that training goes on from has its own rank: the derived 4 * lora_rank is not about it
    derived = is_adapter(recipe.model) and recipe.reference_rank == 4 * recipe.lora_rank
    return make_reference(policy, rank=None if recipe.tuning == "full" or derived else recipe.reference_rank)


def split_rows(recipe: Recipe):
    """(training data set, held-out data set, its prompts, where these come from); no prompt is in both.

    The prompts are the first different ones of the test split (of `eval_data`, if given); without one a tenth
    of the training prompts, at most `eval_prompts`, chosen by the seed.
    """
    train = load_dataset(recipe.data, "train")
    try:
        test, source = load_dataset(recipe.eval_data or recipe.data, "test"), "the test split"
    except (ValueError, ConnectionError) as error:  # a damaged test split, or no network, is not the same
        if recipe.eval_data or not re.search("has no split|Unknown split", str(error)):
            raise
        test, source = None, "prompts taken out of the training data, which have no test split"
    rest = train if test is None else test
    known = {json.dumps(prompt): prompt for prompt in rest["prompt"] if prompt}
    keys = list(known)
    if test is None:
        tenth = np.random.default_rng(recipe.seed).permutation(len(keys))[: max(1, len(keys) // 10)]
        keys = [keys[i] for i in tenth]
    keys = keys[: recipe.eval_prompts]
    held_out = set(keys)
    rest = rest.select([i for i, prompt in enumerate(rest["prompt"]) if json.dumps(prompt) in held_out])
    kept = [i for i, prompt in enumerate(train["prompt"]) if json.dumps(prompt) not in held_out]
    if left_out := len(train) - len(kept):
        train = train.select(kept)
        source += f"; {left_out} training rows with the same prompts are left out"
    return train, rest, [known[key] for key in keys], source


def train(recipe, *, stop=None, control=None, **overrides) -> Run:
    """A whole run: load, train, measure, report. Returns the `Run`.

    recipe: name of a shipped recipe, path of a YAML file or of a run, dict or `Recipe`; overrides: any of
    its settings. stop: a `threading.Event` that ends the run after the current step, with a checkpoint, ready
    for `resume=True`. control: steers alpha and tau, see `AlignmentTrainer`; `replay` runs the same again.
    Errors in the recipe, data or model are ValueErrors.
    """
    if overrides.get("resume") and not isinstance(recipe, (Recipe, dict)) and Path(recipe).is_dir():
        overrides = {"output": str(recipe)} | overrides  # a run's directory may have been moved since
    recipe = Recipe.load(recipe, **overrides)
    if recipe.method == "ppo":
        if control is not None:
            raise ValueError("method=ppo cannot be steered or replayed: its reference moves by the recipe.")
        from .ppo_run import train_ppo  # here: it imports this module

        return train_ppo(recipe, stop=stop)
    directory = Path(recipe.output)
    recipe = with_absolute_paths(recipe)
    main = this_process().is_main_process
    resumed = open_directory(directory, recipe)
    this_process().wait_for_everyone()  # all have looked, before the main process makes the directory

    reward = recipe.method == "reward"
    dataset, held_out, prompts, source = split_rows(recipe)
    tokenizer = load_tokenizer(recipe.model, separate_pad=reward)
    limits = {key: getattr(recipe, key) for key in ("max_prompt_tokens", "max_completion_tokens")}
    rows, data_report = prepare(dataset, tokenizer, method=recipe.method, **limits)
    plan = recipe.plan(len(rows))
    if main:
        print(f"{plan}\nevaluation {len(prompts)} prompts, {source}\n\n{data_report}", flush=True)
    rows = [rows[i] for i in np.random.default_rng(recipe.seed).permutation(len(rows))[: plan.rows]]
    policy = load_policy(recipe)
    check_lengths(policy, recipe, tokenizer, rows, prompts)
    reference = load_reference(policy, recipe)
    evaluator = HeldOutPairs(recipe, tokenizer, held_out) if reward else Evaluator(recipe, tokenizer, prompts)
    trainer = AlignmentTrainer(policy, reference, rows, recipe, tokenizer, directory, evaluate=evaluator,
                               stop=stop, cache=cache_directory(), control=control)
    checkpoint = rewind(directory) if resumed else None
    if main and not resumed:
        begin(directory, recipe, data_report.to_dict())
    elif main:
        print(f"resuming from {checkpoint.name if checkpoint else 'the beginning'}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    run = Run(directory, policy=policy.eval(), tokenizer=tokenizer, reference=reference) if main else None
    if main and trainer.state.global_step == plan.steps:
        if not reward:  # which writes no texts
            write_samples(policy, recipe, tokenizer, prompts, directory / "samples.jsonl", seed=recipe.seed,
                          autocast=trainer.accelerator.autocast())
        run.report()
    return run


def replay(directory: str | Path, output: str | Path) -> Run:
    """The run of `directory` again, in `output`, with every change of alpha and tau at its step."""
    changes, recipe = read_changes(directory), Recipe.load(str(directory))
    return train(recipe, output=str(output), resume=False,
                 control=lambda step: region_at(changes, step, recipe.trust_region()))


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its local paths made absolute: a run must stay readable from another folder."""
    known = {"model": WORLDS, "reward_model": (), "data": NAMES, "eval_data": NAMES}
    values = {key: value for key in known if (value := getattr(recipe, key, None)) not in (None, *known[key])}
    paths = {key: str(Path(value).resolve()) for key, value in values.items() if Path(value).exists()}
    return recipe.replace(**paths) if paths else recipe


def begin(directory: Path, recipe: Recipe, data_report: dict) -> None:
    """Make a run's directory; once its recipe.yaml is there, it is a run, and a whole one."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data_report.json").write_text(json.dumps(data_report, indent=1))
    recipe.replace(resume=False).save(directory / "recipe.yaml.tmp")
    os.replace(directory / "recipe.yaml.tmp", directory / "recipe.yaml")


def check_lengths(policy, recipe: Recipe, tokenizer, rows: list[dict], prompts: list) -> None:
    """Say before training, and not at the first evaluation, that a prompt is too long."""
    asked = [len(prompt_ids(tokenizer, prompt, recipe.max_prompt_tokens)) for prompt in prompts]
    longest = max(asked + [len(row["prompt_ids"]) for row in rows])
    refuse_too_long(policy.config, longest, recipe.max_completion_tokens)


def open_directory(directory: Path, recipe: Recipe) -> bool:
    """Whether there is a run to go on with; refuses to overwrite one, or to resume it with another recipe."""
    if not (directory / "recipe.yaml").is_file():
        if recipe.resume and this_process().is_main_process:
            print(f"resume=true, but there is no run in {directory}: starting from the beginning", flush=True)
        return False
    if not recipe.resume:
        raise ValueError(f"output={directory} already holds a run. Say resume=true to go on with it, or "
                         "choose another output; nothing was changed.")
    refuse_another_recipe(directory, recipe)
    return True


def refuse_another_recipe(directory: Path, recipe: Recipe) -> None:
    """ValueError if the run in `directory` was begun with other settings: a resumed run is the same run."""
    stored, wanted = Recipe.load(directory).model_dump(), recipe.model_dump()
    different = ", ".join(f"{key}: {stored[key]} then, {wanted[key]} now" for key in stored
                          if stored[key] != wanted[key] and key not in NOT_OF_THE_RUN)
    if different:
        raise ValueError(f"output={directory} holds a run with other settings ({different}). A resumed run "
                         "is the same run: give the old settings, or another output for a new run, which may "
                         f"begin at its weights: model={directory}/checkpoints/checkpoint-N.")


def rewind(directory: Path) -> Path | None:
    """The last whole checkpoint; rows of metrics.jsonl and cut-off checkpoints after it are dropped."""
    found = checkpoints(directory)
    step = int(found[-1].name.split("-")[1]) if found else 0
    if this_process().is_main_process:
        remove_unfinished(directory)
        drop_after(directory / "metrics.jsonl", step)
        drop_after(directory / CHANGES, step)
    return found[-1] if found else None
