"""Several runs side by side, from the files in their directories alone."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import plots
from .metrics import Interval
from .pages import (
    CAPTIONS,
    CAVEAT,
    NO_GOLD,
    curve_figures,
    escape,
    interval_text,
    markdown_table,
    number,
    save_figures,
    side_by_side,
)
from .plot_style import png
from .record import Record, read

SAME_TASK = ("model", "data", "max_prompt_tokens", "max_completion_tokens")  # else rows must not be compared
IN_THE_TABLE = ("method", "reference", "alpha", "tau", "beta", "seed")
NO_EFFECT = (
    "output",
    "resume",
    "save_steps",
    "eval_steps",
    "tensorboard",
    "micro_batch_size",
    "gradient_checkpointing",
)
PRINTED = {
    "kl/initial": "KL to initial",
    "kl/reference": "KL to reference",
    "rewards/accuracy": "reward accuracy",
    "self_bleu": "Self-BLEU",
    "length": "words",
}


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
    samples: Mapping[str, tuple[str, Record]] = field(repr=False)  # name of the column -> whose samples

    @property
    def summary(self) -> pd.DataFrame:
        """The table for printing: all texts, rounded, intervals in brackets, no column without a value."""
        table = self.table
        columns = {
            name: table[name].map(
                lambda value: (
                    "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
                )
            )
            for name in ("run", "method", "reference", "alpha", "tau", "beta", "seed", "steps", "updates")
        }
        for name, low, high in (("gold", "low", "high"), ("win_rate", "win_low", "win_high")):
            columns[name.replace("_", " ")] = [
                interval_text(Interval(*row)) for row in table[[name, low, high]].to_numpy()
            ]
        for name, header in PRINTED.items():
            columns[header] = table[name].map(number)
        return pd.DataFrame({name: list(column) for name, column in columns.items() if any(column)})

    @property
    def markdown(self) -> str:
        """Warnings, table and notes."""
        summary = self.summary
        return "\n\n".join(
            [
                *(f"> **Warning.** {escape(warning)}" for warning in self.warnings),
                markdown_table(list(summary), [map(escape, row) for row in summary.to_numpy()]),
                *map(escape, self.notes),
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Write comparison.md and figures/*.png into `folder`; returns comparison.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = ["# Comparison", self.markdown, *save_figures(self.figures, folder)]
        if self.samples:
            text += [
                "## Samples",
                "The first prompts of the evaluation, not chosen; drawn at temperature 1.",
                *side_by_side(self.samples),
            ]
        path = folder / "comparison.md"
        path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        parts = [f"<p><b>Warning.</b> {html.escape(warning)}</p>" for warning in self.warnings]
        parts += [self.summary.to_html(index=False), *(f"<p>{html.escape(note)}</p>" for note in self.notes)]
        for name, figure in self.figures.items():
            image = base64.b64encode(png(figure, dpi=100)).decode()
            parts.append(f'<img alt="{CAPTIONS[name]}" src="data:image/png;base64,{image}">')
        return "\n".join(parts)


def compare(runs: Iterable) -> Comparison:
    """Table and figures of several runs (directories, or objects with `.directory`), from their files."""
    records = [read(run) for run in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if not records:
        raise ValueError("There is nothing to compare: give the directory of at least one run.")
    named = dict(zip(_names([record.directory for record in records]), records, strict=True))
    different = _differences(records)
    shared = None if different or not records[0].samples else records[0].numbers("initial")

    rows = (
        []
        if shared is None
        else [{"run": "initial policy", "method": "", "reference": "", "kl/initial": 0.0, **shared}]
    )
    for name, record in named.items():
        win = record.against_initial()
        rows.append(
            {key: record.recipe.get(key) for key in ("beta", "seed")}
            | {
                "run": name,
                "method": record.method,
                "steps": record.steps,
                "updates": record.updates,
                "reference": record.kind if record.moves or record.kind == "fixed" else "none",
                "alpha": record.recipe["alpha"] if record.moves else None,
                "tau": record.recipe["tau"] if record.moves else None,
                "win_rate": win.value,
                "win_low": win.low,
                "win_high": win.high,
                "rewards/accuracy": record.accuracy(),
                "kl/initial": record.last("kl/initial"),
                "kl/reference": record.last("kl/reference"),
                **record.numbers("policy"),
            }
        )
    table = pd.DataFrame(
        rows,
        columns=[
            "run",
            "method",
            "reference",
            "alpha",
            "tau",
            "beta",
            "seed",
            "steps",
            "updates",
            "gold",
            "low",
            "high",
            "win_rate",
            "win_low",
            "win_high",
            "kl/initial",
            "kl/reference",
            "rewards/accuracy",
            "self_bleu",
            "length",
        ],
    )
    table = table.astype(
        {
            name: "Int64" if name in ("tau", "seed", "steps", "updates") else float
            for name in table.columns[3:]
        }
    )  # Int64, unlike int, knows missing values

    warnings = (
        [f"These runs must not be compared: they differ in {'; '.join(different)}."] if different else []
    )
    warnings += [f"{name}: {warning}" for name, record in named.items() for warning in record.warnings()]
    kinds = {"initial policy": "initial"} | {name: record.kind for name, record in named.items()}
    drawn = table.assign(reference=table["run"].map(kinds))
    figures = {}
    if table["gold"].notna().any():
        figures["gold"] = plots.intervals(
            drawn, value="gold", title="True quality at the end", xlabel="gold reward, mean over the prompts"
        )
        figures["win_rate"] = plots.intervals(
            drawn.drop(columns=["low", "high"]).rename(columns={"win_low": "low", "win_high": "high"}),
            value="win_rate",
            baseline=0.5,
            title="Against the initial policy",
            xlabel="win rate by gold, ties half",
        )
    history = pd.concat(
        [record.history.assign(run=name, reference=record.kind) for name, record in named.items()]
    )
    figures |= curve_figures(history, shared["gold"] if shared else np.nan)
    for figure in figures.values() if different else ():
        figure.suptitle("NOT COMPARABLE: model, data or prompts differ", color="#D55E00", fontweight="bold")
    samples = {name: ("policy", record) for name, record in named.items()}
    return Comparison(
        table,
        figures,
        warnings,
        _notes(table, named, shared),
        {"initial policy": ("initial", records[0])} | samples if shared else {},
    )


def _names(directories: list[Path]) -> list[str]:
    """Names of folders; where two are equal, with the folder above; where that does not help, numbered."""
    names = [path.resolve().name for path in directories]
    names = [
        str(Path(*path.resolve().parts[-2:])) if names.count(name) > 1 else name
        for path, name in zip(directories, names, strict=True)
    ]
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _differences(records: list[Record]) -> list[str]:
    """Why the runs must not be compared: another model, other data, other prompts."""
    found = []
    for key in SAME_TASK:
        values = list(dict.fromkeys(str(record.recipe.get(key)) for record in records))
        if len(values) > 1:
            found.append(f"{key} ({', '.join(values)})")
    prompts = [record.column("prompt") for record in records if record.samples]
    if any(other != prompts[0] for other in prompts):
        found.append("the prompts they were evaluated on")
    return found


def _notes(table: pd.DataFrame, named: dict[str, Record], shared: dict | None) -> list[str]:
    records = list(named.values())
    prompts = ", ".join(dict.fromkeys(str(len(record.samples)) for record in records))
    notes = [f"One seed a row, {prompts} prompts. {CAVEAT}"]
    if table["gold"].isna().all():
        notes.append(NO_GOLD)
    others = dict.fromkeys(key for record in records for key in record.recipe)
    others = [
        key
        for key in others
        if key not in SAME_TASK + IN_THE_TABLE + NO_EFFECT
        and len({str(record.recipe.get(key)) for record in records}) > 1
    ]
    if others:
        notes.append(
            f"The runs also differ in {', '.join(others)}: a difference between them may be due to that."
        )
    return notes + (_at_equal_kl(named, shared["gold"]) if shared and len(records) > 1 else [])


def _at_equal_kl(named: dict[str, Record], initial_gold: float) -> list[str]:
    """Gold reward of each run where it first reaches the KL that all of them reach, interpolated."""
    paths = {}
    for name, record in named.items():
        rows = record.history.reindex(columns=["kl/initial", "gold/reward"]).dropna()
        paths[name] = np.array([(0.0, initial_gold), *rows.to_numpy(float)])
    common = min(path[:, 0].max() for path in paths.values())
    if common <= 0:
        return []
    values = []
    for name, path in paths.items():
        after = int(np.argmax(path[:, 0] >= common))  # the first point is at 0, so there is one before
        (kl_0, gold_0), (kl_1, gold_1) = path[after - 1], path[after]
        values.append(f"{name} {gold_0 + (gold_1 - gold_0) * (common - kl_0) / (kl_1 - kl_0):.2f}")
    return [
        f"Gold reward at equal KL to the initial policy ({common:.2f} nats, as far as all of them went; "
        f"interpolated between evaluations, so no more certain than the values above): {', '.join(values)}."
    ]
