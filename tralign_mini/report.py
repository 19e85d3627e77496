"""The report of one run, from the files in its directory alone: report.md with figures and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import pages, plots
from .pages import escape, interval_text, markdown_table, number
from .record import Record, read


def report(run) -> Path:
    """Write report.md and figures/*.png into the run's directory, from its other files; returns report.md."""
    record = read(run)
    initial = record.numbers("initial")
    title = f"# {record.method} on {escape(Path(record.recipe['data']).name)}"
    text = [f"{title}, {record.kind} reference" if record.has_reference else title]
    text += pages.warning_lines(record.warnings())
    text += ["## Plan", markdown_table(["setting", "value"], _plan(record))]
    text += ["## Result", *_result(record, initial)]
    history = record.history.assign(reference=record.kind)
    figures = {"training": plots.training_curves(history)} | pages.curve_figures(history, initial["gold"])
    text += ["## Figures", *pages.save_figures(figures, record.directory)]
    if record.data_report:
        text += ["## Data", markdown_table(["what became of the data", ""], pages.flat(record.data_report))]
    if record.samples:
        text += pages.side_by_side({"initial policy": ("initial", record), "policy": ("policy", record)})
    return pages.write_page(record.directory / "report.md", text)


def _plan(record: Record) -> list[tuple[str, str]]:
    recipe = record.recipe
    method = recipe["method"]
    if method not in ("sft", "reward"):
        method += f", beta {recipe['beta']:g}, {recipe['logps']} of log-probs over tokens"
    if method.startswith("ppo"):
        reward = escape(recipe["reward_model"] or "a function")
        method = f"ppo, KL coefficient {recipe['kl_coef']:g}, reward {reward}"
    reference = "fixed at the initial policy" if record.has_reference else "none"
    if record.moves:
        shares = f"{recipe['alpha']:g} policy + {1 - recipe['alpha']:.6g} reference"
        times = f"**moved {record.updates} times**"
        reference = f"{record.kind}: every {recipe['tau']} steps {shares}; {times}"
    unit = {"kto": "completions", "sft": "completions", "ppo": "prompts"}.get(recipe["method"], "pairs")
    return [
        ("model", escape(recipe["model"])),
        ("data", escape(recipe["data"])),
        ("method", method),
        ("reference", reference),
        ("tuning", f"{recipe['tuning']}, learning rate {recipe['learning_rate']:g}"),
        ("steps", f"{record.steps} of {recipe['batch_size']} {unit}, {record.last('epoch'):.3g} epochs"),
        ("seed", str(recipe["seed"])),
    ]


def _reward_result(record: Record) -> list[str]:
    rows = [("share of pairs in the order of their labels", number(record.last("eval/accuracy"))),
            ("loss, nats a pair (guessing: 0.69)", number(record.last("eval/loss"))),
            ("expected calibration error", number(record.last("eval/calibration"))),
            ("accuracy on training pairs, last tenth of the steps", number(record.accuracy()))]
    return [markdown_table(["on held-out pairs", ""], rows),
            "Labels are noisy, so no reward model gets all pairs right; and a policy that is trained on it "
            "finds what it gets wrong. See the gold reward of such a run."]


def _result(record: Record, initial: dict[str, float]) -> list[str]:
    if record.recipe["method"] == "reward":
        return _reward_result(record)
    policy, gain = record.numbers("policy"), record.gain()
    golds = [interval_text(who["gold"], who["low"], who["high"]) for who in (initial, policy)]
    bleus, words = ([number(who[name]) for who in (initial, policy)] for name in ("self_bleu", "length"))
    rows = [
        ("gold reward", *golds),
        ("gold reward, policy − initial, prompt by prompt", "", interval_text(*gain)),
        ("win rate against the initial policy, ties half", "", interval_text(*record.against_initial())),
        ("KL to the initial policy, nats a completion", "", number(record.last("kl/initial"))),
        ("KL to the reference, nats a completion", "", number(record.last("kl/reference"))),
        ("KL to the initial policy, nats a token", "", number(record.per_token("kl/initial"), ".3f")),
        ("Self-BLEU (n = 3), 0 all different, 1 all equal", *bleus),
        ("words a completion", *words),
        ("tokens a completion", "", number(record.last("length/completion"))),
        ("reward accuracy on training pairs, last tenth of the steps", "", number(record.accuracy())),
    ]
    text = [markdown_table(["", "initial policy", "policy"], [row for row in rows if row[-1]])]
    if np.isnan(policy["gold"]):
        text.append(pages.NO_GOLD if record.samples else "The final policy was not sampled.")
    elif gain.low > 0 or gain.high < 0:
        than = f"{'higher' if gain.low > 0 else 'lower'} than the initial policy's"
        text.append(f"On these prompts the policy's mean gold reward is {than}.")
    else:
        both = "the policy and the initial policy"
        text.append(f"These prompts show no difference in gold reward between {both}.")
    gold = record.history.reindex(columns=["step", "gold/reward"]).dropna()
    if len(gold) > 1 and gold["gold/reward"].idxmax() != gold.index[-1]:
        (step, best), (end, last) = gold.loc[gold["gold/reward"].idxmax()], gold.iloc[-1]
        text.append(f"Highest on the way: {best:.2f} at step {int(step)}, against {last:.2f} at step "
                    f"{int(end)}. The highest of {len(gold)} noisy values flatters.")
    recipe, prompts = record.recipe, f"{len(record.samples)} prompts"
    scale = f"{record.steps} optimizer steps of {recipe['batch_size']}, {escape(recipe['model'])}"
    text.append(f"One seed ({recipe['seed']}), {prompts}, {scale}. {pages.CAVEAT}")
    return text
