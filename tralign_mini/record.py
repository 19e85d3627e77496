"""A finished or stopped run as the files in its directory tell it; no model is loaded, nothing is sampled."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from .json_lines import read_rows
from .metrics import Interval, mean_interval, self_bleu, win_rate
from .plan import WITHOUT_REFERENCE
from .recipe import Recipe

UNKNOWN = Interval(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Record:
    """recipe.yaml, metrics.jsonl, samples.jsonl and data_report.json of one run."""

    directory: Path
    recipe: dict
    history: pd.DataFrame  # a row for each optimizer step
    samples: list[dict]  # a row for each evaluation prompt; empty if the run did not get that far
    data_report: dict

    @property
    def prompts_from(self) -> str:
        """The data set whose held-out prompts were sampled: an embedded world's have a gold reward."""
        return self.recipe.get("eval_data") or self.recipe["data"]

    @property
    def has_reference(self) -> bool:
        return self.recipe["method"] not in WITHOUT_REFERENCE

    @property
    def kind(self) -> str:
        """Its reference: "fixed", "soft", "hard", or "none"; "initial" for SFT: it makes initial policies."""
        without = "initial" if self.recipe["method"] == "sft" else "none"
        return self.recipe["reference"] if self.has_reference else without

    @property
    def moves(self) -> bool:
        return self.kind in ("soft", "hard")

    @property
    def method(self) -> str:
        return ("TR-" if self.moves else "") + self.recipe["method"].upper()

    @property
    def steps(self) -> int:
        return int(self.last("step"))

    @property
    def updates(self) -> int:
        return int(self.last("reference_updates", 0))

    def last(self, column: str, default: float = np.nan) -> float:
        """The last measured value of a column."""
        values = self.history[column].dropna() if column in self.history else ()
        return float(values.iloc[-1]) if len(values) else default

    def accuracy(self) -> float:
        """Reward accuracy on the training pairs, mean over the last tenth of the steps."""
        values = self.history.get("rewards/accuracy", pd.Series(dtype=float)).dropna().astype(float)
        return float(values.tail(max(len(values) // 10, 1)).mean())

    def column(self, name: str) -> list:
        """One column of the samples; empty if they have none."""
        return [row[name] for row in self.samples if name in row]

    def numbers(self, who: str) -> dict[str, float]:
        """gold, low, high, self_bleu, length (words) of "initial" or "policy"; NaN: not measured."""
        gold, texts = self.column(f"gold_{who}"), self.column(who)
        interval = mean_interval(gold) if gold else UNKNOWN
        bleu = self_bleu(texts) if len(texts) > 1 else np.nan
        length = float(np.mean([len(text.split()) for text in texts])) if texts else np.nan
        return dict(zip(("gold", "low", "high"), interval), self_bleu=bleu, length=length)

    def gain(self) -> Interval:
        """Gold reward of the policy minus that of the initial policy, prompt by prompt."""
        gold = self.column("gold_policy")
        return mean_interval(np.subtract(gold, self.column("gold_initial"))) if gold else UNKNOWN

    def against_initial(self) -> Interval:
        """Win rate of the policy against the initial policy by gold reward, prompt by prompt."""
        gold = self.column("gold_policy")
        return win_rate(gold, self.column("gold_initial")) if gold else UNKNOWN

    def warnings(self) -> list[str]:
        """What has to be known before any number is read."""
        found = []
        if self.moves and self.updates < 2:
            times, nearly = ("moved only once", "nearly ") if self.updates else ("never moved", "")
            found.append(f"The reference {times} in {self.steps} steps (tau={self.recipe['tau']}): this is "
                         f"{nearly}plain {self.recipe['method'].upper()} and says little about a moving one.")
        if not self.samples and self.recipe["method"] != "reward":  # which writes no texts
            found.append("There is no samples.jsonl: the run was stopped before its end, or never evaluated.")
        return found


def read(run) -> Record:
    """The files of a run: its directory, or an object with `.directory`. ValueError if it is none."""
    directory = Path(getattr(run, "directory", run))
    if not directory.is_dir():
        raise ValueError(f"{directory} is not there. Give the directory of a run: its recipe's `output`.")
    missing = [name for name in ("recipe.yaml", "metrics.jsonl") if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} is not the directory of a run: it has no {' and no '.join(missing)}. "
                         "Give a recipe's `output`; a run that has just started has no metrics.jsonl yet.")
    history = pd.DataFrame(read_rows(directory / "metrics.jsonl"))
    if history.empty:
        raise ValueError(f"{directory / 'metrics.jsonl'} is empty: the run has not finished its first step.")
    report = directory / "data_report.json"
    data_report = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    recipe, samples = Recipe.load(directory).model_dump(), read_rows(directory / "samples.jsonl")
    return Record(directory, recipe, history, samples, data_report)


def read_sampled(run) -> Record:
    """The same of a run, with those samples alone that have texts; ValueError says how to get some."""
    record = read(run)
    sampled = [row for row in record.samples or () if {"prompt", "initial", "policy"} <= row.keys()]
    if not sampled:
        raise ValueError(f"{record.directory} has no samples.jsonl with prompts and answers. If the run "
                         f"still has a checkpoint: tralign evaluate {record.directory}")
    return replace(record, samples=sampled)


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt to be shown: chat messages as a line each."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
