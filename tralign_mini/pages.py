"""What reports are made of: figures saved and linked, tables, samples side by side, escaped text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import plots
from .plot_style import png
from .record import Record, prompt_text

SHOWN_PROMPTS, SHOWN_CHARACTERS = 5, 1500
CAVEAT = "Intervals (95 %) cover the prompts only, not the seeds."
NO_GOLD = ("These data have no gold reward, so true quality was not measured: neither reward accuracy nor KL "
           "is quality.")
CAPTIONS = {
    "gold": "Mean gold reward at the end, with 95 % intervals over the prompts",
    "win_rate": "Win rate against the initial policy, with 95 % intervals over the prompts",
    "training": "Training curves",
    "kl": "KL to the initial policy and to the reference, on the policy's own samples",
    "gold_over_steps": "Gold reward over the steps",
    "overoptimization": "Gold reward against the distance from the initial policy",
}


def curve_figures(history: pd.DataFrame, initial_gold: float) -> dict[str, Figure]:
    """The figures over steps and over KL for which something was measured."""
    kl, gold = (plots.has(history, column) for column in ("kl/initial", "gold/reward"))
    initial_gold = None if np.isnan(initial_gold) else initial_gold
    figures = {"kl": plots.kl_curves(history)} if kl else {}
    if gold:
        figures["gold_over_steps"] = plots.gold_curves(history, initial_gold)
    if kl and gold:
        figures["overoptimization"] = plots.overoptimization(history, initial_gold)
    return figures


def write_page(path: Path, parts: list[str]) -> Path:
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def warning_lines(warnings: list[str]) -> list[str]:
    return [f"> **Warning.** {escape(warning)}" for warning in warnings]


def save_figures(figures: dict[str, Figure], folder: Path) -> list[str]:
    """Write figures/<name>.png; returns the links to them."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(png(figure))
    return [f"![{CAPTIONS[name]}](figures/{name}.png)" for name in figures]


def side_by_side(columns: Mapping[str, tuple[str, Record]], remarks: Sequence[str] = ()) -> list[str]:
    """The first prompts, and under each what every one of `columns` answered, with its gold reward; a remark
    on each may follow."""
    _, record = next(iter(columns.values()))
    text = ["## Samples", "The first prompts of the evaluation, not chosen; drawn at temperature 1."]
    for i, row in enumerate(record.samples[:SHOWN_PROMPTS]):
        prompt = prompt_text(row["prompt"])
        if len(prompt) > SHOWN_CHARACTERS:  # what is answered stands at the end
            prompt = "[…] " + prompt[-SHOWN_CHARACTERS:]
        ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", prompt))])
        answers = []
        for who, of in columns.values():
            sample, answer = of.samples[i], of.samples[i][who]
            gold = f"**{sample[f'gold_{who}']:.2f}** " if f"gold_{who}" in sample else ""
            cut = " […]" if len(answer) > SHOWN_CHARACTERS else ""
            answers.append(gold + (escape(answer[:SHOWN_CHARACTERS].strip() + cut) or "*(empty)*"))
        text += [f"### Prompt {i + 1}", f"{ticks}text\n{prompt.strip()}\n{ticks}"]
        text += [markdown_table(map(escape, columns), [answers]), *remarks[i : i + 1]]
    return text


def escape(text: str) -> str:
    """Any text as one line of markdown that shows it as it is, inside and outside of tables."""
    text = re.sub(r"([\\`*_~|\[\]#$])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(text.splitlines())


def markdown_table(header: Iterable[str], rows: Iterable) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def flat(report: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as rows of a table: dropped: {empty: 3} becomes "dropped: empty"."""
    rows = []
    for key, value in report.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            rows += flat(value, f"{name}: ") or [(name, "none")]
        else:
            rows.append((escape(name), f"{value:.1f}" if isinstance(value, float) else escape(str(value))))
    return rows


def number(value: float, digits: str = ".2f") -> str:
    return "" if np.isnan(value) else f"{value:{digits}}"


def interval_text(value: float, low: float, high: float) -> str:
    return number(value) + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")
