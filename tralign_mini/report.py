"""The report of one run, from the files in its directory alone: report.md with figures and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import pages, plots
from .pages import Side, escape, interval_text, markdown_table, number
from .plan import in_words
from .recipe import Recipe
from .record import Record, read


def report(run) -> Path:
    """Write report.md and figures/*.png into the run's directory, from its other files; returns report.md."""
    record = read(run)
    recipe = Recipe.load(record.directory)
    title = f"{record.method} on {escape(Path(recipe.data).name)}"
    title += f", {record.kind} reference" if record.has_reference else ""
    plan = in_words(recipe, record.steps, record.last("epoch"), record.updates)
    text = ["## Plan", markdown_table(["setting", "value"], [(key, escape(plan[key])) for key in plan])]
    sides = {"initial policy": ("initial", record), "policy": ("policy", record)}
    result = _reward_result(record) if recipe.method == "reward" else _result(record, sides)
    text += ["## Result", *result]
    history, initial_gold = record.history.assign(reference=record.kind), record.numbers("initial")["gold"]
    figures = {"training": plots.training_curves(history)} | pages.curve_figures(history, initial_gold)
    text += ["## Figures", *pages.save_figures(figures, record.directory)]
    if record.data_report:
        text += ["## Data", markdown_table(["what became of the data", ""], pages.flat(record.data_report))]
    if record.samples:
        text += pages.side_by_side(sides)
    return pages.write_page(record.directory / "report.md", title, record.warnings(), text)


def _reward_result(record: Record) -> list[str]:
    rows = [("share of pairs in the order of their labels", number(record.last("eval/accuracy"))),
            ("loss, nats a pair (guessing: 0.69)", number(record.last("eval/loss"))),
            ("expected calibration error", number(record.last("eval/calibration"))),
            ("accuracy on training pairs, last tenth of the steps", number(record.accuracy()))]
    return [markdown_table(["on held-out pairs", ""], rows),
            "Labels are noisy, so no reward model gets all pairs right; and a policy that is trained on it "
            "finds what it gets wrong. See the gold reward of such a run."]


def _result(record: Record, sides: dict[str, Side]) -> list[str]:
    gain = record.gain()
    rows = list(pages.measures(sides).itertuples(name=None))
    rows[1:1] = [("gold reward, policy − initial, prompt by prompt", "", interval_text(*gain)),
                 ("win rate against the initial policy, ties half", "",
                  interval_text(*record.against_initial()))]
    rows.append(("reward accuracy on training pairs, last tenth of the steps", "", number(record.accuracy())))
    text = [markdown_table(["", *sides], [row for row in rows if row[-1]])]
    if np.isnan(gain.value):
        text.append(pages.NO_GOLD if record.samples else "The final policy was not sampled.")
    elif gain.low > 0 or gain.high < 0:
        than = f"{'higher' if gain.low > 0 else 'lower'} than the initial policy's"
        text.append(f"On these prompts the policy's mean gold reward is {than}.")
    else:
        text.append("These prompts show no difference in gold reward to the initial policy.")
    gold = record.history.reindex(columns=["step", "gold/reward"]).dropna()
    if len(gold) > 1 and gold["gold/reward"].idxmax() != gold.index[-1]:
        (step, best), (end, last) = gold.loc[gold["gold/reward"].idxmax()], gold.iloc[-1]
        text.append(f"Highest on the way: {best:.2f} at step {int(step)}, against {last:.2f} at step "
                    f"{int(end)}. The highest of {len(gold)} noisy values flatters.")
    recipe, prompts = record.recipe, f"{len(record.samples)} prompts"
    steps = "iterations" if recipe["method"] == "ppo" else "optimizer steps"
    scale = f"{record.steps} {steps} of {recipe['batch_size']}, {escape(recipe['model'])}"
    return text + [f"One seed ({recipe['seed']}), {prompts}, {scale}. {pages.CAVEAT} KL and tokens: as "
                   "measured when training ended."]
