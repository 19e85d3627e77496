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
from .metrics import distinct_n
from .plot_style import png
from .record import Record, prompt_text

Side = tuple[str, Record]  # whose samples, "policy" or "initial", of which run

SHOWN_PROMPTS, SHOWN_CHARACTERS = 5, 1500
CAVEAT = "Intervals (95 %) cover the prompts only, not the seeds."
NO_GOLD = ("These data have no gold reward, so true quality was not measured: neither reward accuracy nor KL "
           "is quality.")
CAPTIONS = {
    "training": "Training curves",
    "kl": "KL to the initial policy and to the reference, on the policy's own samples",
    "gold_over_steps": "Gold reward over the steps",
    "overoptimization": "Gold reward against the distance from the initial policy",
}


def curve_figures(history: pd.DataFrame, initial_gold: float) -> dict[str, Figure]:
    """The figures over steps and over KL for which something was measured."""
    kl, gold = (plots.has(history, column) for column in ("kl/initial", "gold/reward"))
    start = None if np.isnan(initial_gold) else initial_gold
    figures = {"kl": plots.kl_curves(history)} if kl else {}
    figures |= {"gold_over_steps": plots.gold_curves(history, start)} if gold else {}
    return figures | ({"overoptimization": plots.overoptimization(history, start)} if kl and gold else {})


def measures(sides: Mapping[str, Side]) -> pd.DataFrame:
    """A row a measure, a column a side, all texts, "" if not measured; KL, tokens: at the last evaluation."""
    columns = {}
    for name, (who, record) in sides.items():
        numbers, tokens = record.numbers(who), record.last("length/completion")
        texts = [text for text in record.column(who) if len(text.split()) > 1]  # others have no pair of words
        column = {
            "gold reward": interval_text(*(numbers[key] for key in ("gold", "low", "high"))),
            "words a completion": number(numbers["length"]),
            "tokens a completion": number(tokens) if who == "policy" else "",
            "Self-BLEU (n = 3)": number(numbers["self_bleu"]),
            "distinct words": number(distinct_n(texts, 1)) if texts else "",
            "distinct pairs of words": number(distinct_n(texts, 2)) if texts else "",
        }
        for other, kl in (("initial", 0.0), ("reference", np.nan)):
            kl = record.last(f"kl/{other}") if who == "policy" else kl
            column[f"KL to {other}, nats a completion"] = number(kl)
            column[f"KL to {other}, nats a token"] = number(kl / tokens, ".3f")
        columns[name] = column
    return pd.DataFrame(columns)


def write_page(path: Path, title: str, warnings: Iterable[str], parts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    warned = [f"> **Warning.** {escape(warning)}" for warning in warnings]
    path.write_text("\n\n".join([f"# {title}", *warned, *parts]) + "\n", encoding="utf-8")
    return path


def save_figures(figures: dict[str, Figure], folder: Path) -> list[str]:
    """Write figures/<name>.png; returns the links to them."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(png(figure))
    return [f"![{CAPTIONS[name]}](figures/{name}.png)" for name in figures]


def side_by_side(sides: Mapping[str, Side], remarks: Sequence[str] = ()) -> list[str]:
    """The first prompts, and under each what all sides answered, with gold rewards; a remark may follow."""
    _, record = next(iter(sides.values()))
    text = ["## Samples", "The first prompts of the evaluation, not chosen; drawn at temperature 1."]
    for i, row in enumerate(record.samples[:SHOWN_PROMPTS]):
        prompt = prompt_text(row["prompt"])
        if len(prompt) > SHOWN_CHARACTERS:  # what is answered stands at the end
            prompt = "[…] " + prompt[-SHOWN_CHARACTERS:]
        ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", prompt))])
        answers = []
        for who, of in sides.values():
            sample, answer = of.samples[i], of.samples[i][who]
            gold = f"**{sample[f'gold_{who}']:.2f}** " if f"gold_{who}" in sample else ""
            cut = " […]" if len(answer) > SHOWN_CHARACTERS else ""
            answers.append(gold + (escape(answer[:SHOWN_CHARACTERS].strip() + cut) or "*(empty)*"))
        text += [f"### Prompt {i + 1}", f"{ticks}text\n{prompt.strip()}\n{ticks}"]
        text += [markdown_table(map(escape, sides), [answers]), *remarks[i : i + 1]]
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
