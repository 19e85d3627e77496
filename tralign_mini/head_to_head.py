"""Two runs, or a run and its initial policy, on the same prompts: who wins, how often, at what length and KL.

All but the verdicts is read from the directories of the runs; nothing is sampled here (`evaluate` does that).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from . import metrics, pages
from .comparison import differences, names_of
from .json_lines import write_rows
from .judge import Verdict, points
from .llm_judge import CRITERIA
from .metrics import Interval
from .pages import Side, escape, interval_text
from .record import Record, read_sampled


@dataclass
class HeadToHead:
    """Two sides compared: `.table` (a row a measure, all texts), `.warnings`, `.notes` and `.verdicts`.

    win_rate: of the first side, ties half, over the prompts with a verdict; length_controlled: the same at
    equal length in words.
    """

    sides: dict[str, Side] = field(repr=False)  # by their names, both on the same prompts
    win_rate: Interval
    length_controlled: Interval
    verdicts: list[Verdict]
    table: pd.DataFrame
    warnings: list[str]
    notes: list[str]

    @property
    def names(self) -> tuple[str, str]:
        return tuple(self.sides)

    def save(self, folder: str | Path) -> Path:
        """Write A-against-B.md, samples side by side, and A-against-B.jsonl, a verdict a line; the page."""
        title = " against ".join(self.names)
        page = Path(folder) / (title.replace("/", "-").replace(" ", "-") + ".md")
        prompts, texts = _prompts_and_texts(self.sides)
        rows = zip(prompts, *texts, self.verdicts)
        rows = [{"prompt": prompt, "a": a, "b": b} | verdict._asdict() for prompt, a, b, verdict in rows]
        write_rows(page.with_suffix(".jsonl"), rows)

        cells = [map(escape, row) for row in self.table.to_numpy()]
        winners = dict(zip("ab", (f"{name} wins:" for name in self.names))) | {"tie": "Tie:"}
        said = [f"**{escape(winners.get(verdict.winner, 'No verdict:'))}** {escape(verdict.why)}"
                for verdict in self.verdicts]
        parts = [pages.markdown_table(map(escape, self.table), cells), *map(escape, self.notes)]
        parts += pages.side_by_side(self.sides, said)
        return pages.write_page(page, escape(title), self.warnings, parts)


def head_to_head(a, b=None, *, judge, rate: bool = False) -> HeadToHead:
    """Compare two runs (directories, or objects with `.directory`) by a judge, on the prompts that both have.

    b: default: the initial policy of a, from the same samples. rate: the judge, an `LLMJudge`, rates every
    answer as well. ValueError if they share no prompt, or if the judge fails on every one.
    """
    if rate and not hasattr(judge, "rate"):
        raise ValueError(f"The judge {judge.name!r} gives no ratings from 1 to 10: an LLMJudge does.")
    records = _on_common_prompts([read_sampled(run) for run in ((a,) if b is None else (a, b))])
    names = names_of([record.directory for record in records])
    sides = {name: ("policy", record) for name, record in zip(names, records)}
    if b is None:
        sides["initial policy"] = ("initial", records[0])
    prompts, texts = _prompts_and_texts(sides)

    verdicts = judge(prompts, *texts)
    outcomes = points(verdicts)
    decided = np.isfinite(outcomes)
    failed = int((~decided).sum())
    if failed == len(prompts):
        said = judge.report() if hasattr(judge, "report") else verdicts[0].why
        raise ValueError(f"The judge gave no verdict on any of the {failed} prompts. {said}")
    outcomes = outcomes[decided]
    lengths = [np.array([len(text.split()) for text in side])[decided] for side in texts]
    won = metrics.win_rate(outcomes, 1 - outcomes)
    controlled = metrics.length_controlled(outcomes, 1 - outcomes, *lengths)

    rows = {"wins": [str((outcomes == most).sum()) for most in (1, 0)],
            "ties": [str((outcomes == 0.5).sum())] * 2,
            "the judge failed": [str(failed or "")] * 2,
            "win rate, ties half": _both_sides(won),
            "win rate at equal length": _both_sides(controlled)}
    rows |= _ratings([judge.rate(prompts, side) for side in texts]) if rate else {}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(sides))
    table = pd.concat([table, pages.measures(sides)])
    table = table[(table != "").any(axis=1)].rename_axis("").reset_index()

    different = differences(records)
    warnings = [f"{' and '.join(names)} differ in {'; '.join(different)}."] if different else []
    if failed:
        warnings.append(f"The judge failed on {failed} of {len(prompts)} prompts, which count in no rate.")
    notes = [f"Judge: {judge.name}. {len(prompts)} prompts, one seed a run. {pages.CAVEAT} Equal length: a "
             "logistic model of who wins, at no difference in words, after arXiv 2404.04475. KL: as measured "
             "when training ended."]
    if orders := [verdict.orders for verdict in verdicts if verdict.orders]:
        notes.append(_about_positions(orders))
    if hasattr(judge, "report"):
        notes.append(judge.report())
    return HeadToHead(sides, won, controlled, verdicts, table, warnings, notes)


def _prompts_and_texts(sides: dict[str, Side]) -> tuple[list, list[list[str]]]:
    texts = [record.column(who) for who, record in sides.values()]
    return next(iter(sides.values()))[1].column("prompt"), texts


def _on_common_prompts(records: list[Record]) -> list[Record]:
    """The records with the samples of the prompts that all have, in the order of the first."""
    keyed = [{json.dumps(row["prompt"]): row for row in record.samples} for record in records]
    common = [key for key in keyed[0] if all(key in rows for rows in keyed)]
    if not common:
        both = " and ".join(str(record.directory) for record in records)
        raise ValueError(f"{both} were sampled on different prompts. Compare runs on the same data, and give "
                         "both the same number of prompts (--prompts N).")
    return [replace(record, samples=[rows[key] for key in common]) for record, rows in zip(records, keyed)]


def _ratings(sides: Sequence[list[dict | None]]) -> dict[str, list[str]]:
    """Mean rating by each criterion, and the probability of improvement by the mean over the criteria."""
    sides = [pd.DataFrame([ratings for ratings in side if ratings], columns=CRITERIA) for side in sides]
    if any(side.empty for side in sides):
        return {"ratings": [f"{len(side)} readable" for side in sides]}
    rows = {f"{name.replace('_', ' ')}, 1 to 10": [interval_text(*metrics.mean_interval(side[name]))
                                                   for side in sides] for name in CRITERIA}
    improved = metrics.probability_of_improvement(*(side.mean(axis=1) for side in sides))
    return rows | {"probability of improvement, mean rating": _both_sides(improved)}


def _about_positions(orders: list[tuple[str, str]]) -> str:
    """How far the judge looked at the order of the answers."""
    first = sum((one == "a") + (other == "b") for one, other in orders)
    second = sum((one == "b") + (other == "a") for one, other in orders)
    differ = sum(one != other for one, other in orders)
    return (f"{len(orders)} prompts were asked about in both orders; on {differ} the judge contradicted "
            f"itself: ties. It chose what it read first {first} times, what it read second {second} times.")


def _both_sides(of_first: Interval) -> list[str]:
    value, low, high = of_first
    return [interval_text(*of_first), interval_text(1 - value, 1 - high, 1 - low)]
