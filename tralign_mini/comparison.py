"""Several runs side by side, from the files in their directories alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import pages
from .overoptimization import frontier, gold_at
from .pages import Side, escape, interval_text, number
from .recipe import READ_BY
from .record import Record, read

SAME_TASK = ("model", "data", "max_prompt_tokens", "max_completion_tokens")  # else rows must not be compared
IN_THE_TABLE = ("method", "reference", "alpha", "tau", "beta", "seed")
NO_EFFECT = ("output", "resume", "save_steps", "eval_steps", "tensorboard", "micro_batch_size",
             "gradient_checkpointing")
SETTINGS = ("run", *IN_THE_TABLE, "steps", "updates")
GOLD, WINS = ("gold", "low", "high"), ("win_rate", "win_low", "win_high")
PRINTED = {"kl/initial": "KL to initial", "kl/reference": "KL to reference",
           "rewards/accuracy": "reward accuracy", "self_bleu": "Self-BLEU", "length": "words"}


@dataclass
class Comparison:
    """Several runs side by side: `.table`, `.figures`, `.warnings` (read them first) and `.notes`.

    table: a row for the initial policy, if all runs share it, then one for each run. `gold` with `low` and
    `high` is the mean gold reward of the policy's samples; `win_rate` with `win_low` and `win_high` is
    against the initial policy; `kl/...` in nats a completion; `length` in words. NaN: not measured.
    """

    table: pd.DataFrame
    figures: dict[str, Figure]
    warnings: list[str]
    notes: list[str]
    sides: dict[str, Side] = field(repr=False)  # those with samples, if the initial policy is one for all

    @property
    def summary(self) -> pd.DataFrame:
        """The table for printing: all texts, rounded, intervals in brackets, no column without a value."""
        columns = {name: [_setting(value) for value in self.table[name]] for name in SETTINGS}
        for header, names in {"gold": GOLD, "win rate": WINS}.items():
            columns[header] = [interval_text(*row) for row in self.table[list(names)].to_numpy()]
        columns |= {header: [number(value) for value in self.table[name]] for name, header in PRINTED.items()}
        return pd.DataFrame({name: column for name, column in columns.items() if any(column)})

    def save(self, folder: str | Path) -> Path:
        """Write comparison.md and figures/*.png into `folder`; returns comparison.md."""
        table = pages.markdown_table(self.summary, [map(escape, row) for row in self.summary.to_numpy()])
        text = [table, *map(escape, self.notes), *pages.save_figures(self.figures, Path(folder))]
        text += pages.side_by_side(self.sides) if self.sides else []
        return pages.write_page(Path(folder) / "comparison.md", "Comparison", self.warnings, text)


def compare(runs: Iterable) -> Comparison:
    """Table and figures of several runs (directories, or objects with `.directory`), from their files."""
    records = list(map(read, directories_of(runs)))
    if not records:
        raise ValueError("There is nothing to compare: give the directory of at least one run.")
    named = dict(zip(names_of([record.directory for record in records]), records))
    different = differences(records)
    shared = None if different or not records[0].samples else records[0].numbers("initial")

    rows = [_row(name, record) for name, record in named.items()]
    if shared:
        rows.insert(0, {"run": "initial policy", "method": "", "reference": "", "kl/initial": 0.0, **shared})
    table = pd.DataFrame(rows, columns=[*SETTINGS, *GOLD, *WINS, *PRINTED])
    whole = ("tau", "seed", "steps", "updates")  # Int64, unlike int, knows missing values
    table = table.astype({name: "Int64" if name in whole else float for name in table.columns[3:]})

    warnings = [f"{name}: {warning}" for name, record in named.items() for warning in record.warnings()]
    if different:
        warnings.insert(0, f"These runs must not be compared: they differ in {'; '.join(different)}.")
    histories = [record.history.assign(run=name, reference=record.kind) for name, record in named.items()]
    figures = pages.curve_figures(pd.concat(histories), shared["gold"] if shared else np.nan)
    for figure in figures.values() if different else ():
        figure.suptitle("NOT COMPARABLE: model, data or prompts differ", color="#D55E00", fontweight="bold")
    sides = {name: ("policy", record) for name, record in named.items() if record.samples}
    sides = {"initial policy": ("initial", records[0])} | sides if shared else {}
    return Comparison(table, figures, warnings, _notes(table, named, shared), sides)


def _setting(value) -> str:
    return "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _row(name: str, record: Record) -> dict:
    """A run's row of the table."""
    row = {"run": name, "method": record.method, "steps": record.steps, "updates": record.updates}
    row |= {"reference": record.kind if record.has_reference else "none"}
    row |= {key: record.recipe[key] if record.moves else None for key in ("alpha", "tau")}
    row |= {"seed": record.recipe["seed"]}
    row |= {"beta": record.recipe["beta"] if record.recipe["method"] in READ_BY["beta"] else None}
    row |= {key: record.last(key) for key in ("kl/initial", "kl/reference")}
    row |= dict(zip(WINS, record.against_initial())) | record.numbers("policy")
    return row | {"rewards/accuracy": record.accuracy()}


def directories_of(runs) -> list[Path]:
    """Of one run or of several, each a path or an object with `.directory`."""
    one = isinstance(runs, (str, Path)) or hasattr(runs, "directory")
    return [Path(getattr(run, "directory", run)) for run in ([runs] if one else runs)]


def names_of(directories: list[Path]) -> list[str]:
    """Names of folders; where two are equal, with the folder above; where that does not help, numbered."""
    paths = [path.resolve() for path in directories]
    short = [path.name for path in paths]
    names = [str(Path(*path.parts[-2:])) if short.count(path.name) > 1 else path.name for path in paths]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
            for i, name in enumerate(names)]


def _values(records: list[Record], key: str) -> list[str]:
    """The different values of a setting."""
    return list(dict.fromkeys(str(record.recipe[key]) for record in records))


def differences(records: list[Record]) -> list[str]:
    """Why the runs must not be compared: another model, other data, other prompts."""
    values = {key: _values(records, key) for key in SAME_TASK}
    found = [f"{key} ({', '.join(several)})" for key, several in values.items() if len(several) > 1]
    prompts = [record.column("prompt") for record in records if record.samples]
    if any(other != prompts[0] for other in prompts):
        found.append("the prompts they were evaluated on (tralign evaluate samples all of them anew)")
    return found


def _notes(table: pd.DataFrame, named: dict[str, Record], shared: dict | None) -> list[str]:
    records = list(named.values())
    prompts = ", ".join(dict.fromkeys(str(len(r.samples)) for r in records if r.samples)) or "no"
    notes = [f"One seed a row, {prompts} prompts. {pages.CAVEAT}"]
    if table["gold"].isna().all():
        notes.append(pages.NO_GOLD)
    common = [key for key in records[0].recipe if all(key in record.recipe for record in records)]
    others = [key for key in common if key not in SAME_TASK + IN_THE_TABLE + NO_EFFECT]
    others = ", ".join(key for key in others if len(_values(records, key)) > 1)
    if others:
        notes.append(f"The runs also differ in {others}: a difference between them may be due to that.")
    return notes + (_at_equal_kl(named) if shared and len(records) > 1 else [])


def _at_equal_kl(named: dict[str, Record]) -> list[str]:
    """Gold reward of each run where it first reaches the KL that all of them reach, interpolated."""
    paths = {name: frontier(record) for name, record in named.items()}
    common = min((distance**2).max(initial=0.0) for distance, _ in paths.values())
    if common <= 0:
        return []
    values = [f"{name} {gold_at(distance**2, gold, common):.2f}" for name, (distance, gold) in paths.items()]
    return [f"Gold reward at equal KL to the initial policy ({common:.2f} nats, as far as all of them went; "
            f"interpolated between evaluations, so no more certain than the values above): "
            f"{', '.join(values)}."]
