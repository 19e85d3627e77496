"""report and compare: what stands in the files stands in the pages, and so do the warnings and caveats."""

from __future__ import annotations

import json
import re
import types

import numpy as np
import pandas as pd
import pytest

from tralign_mini import metrics
from tralign_mini.comparison import compare
from tralign_mini.pages import escape, flat
from tralign_mini.recipe import Recipe
from tralign_mini.record import read
from tralign_mini.report import report

PROMPTS = [f"POST: dog {i} ran.\n\nTL;DR:" for i in range(8)]


def write_run(
    directory, *, steps=20, gold=True, samples=True, gain=1.0, prompts=PROMPTS, metrics_=None, **settings
):
    """A run's directory as training leaves it, with made-up numbers: gold grows by `gain`, KL to 2 * gain."""
    directory.mkdir(parents=True, exist_ok=True)
    base = {"model": "little-tldr", "data": "little-tldr", "output": str(directory)}
    recipe = Recipe.load(base | settings)
    recipe.save(directory / "recipe.yaml")
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "epoch": step / 10, "loss": 0.7 - step / 100}
        if recipe.method != "sft":
            row |= {"rewards/margin": step / 10, "rewards/accuracy": 0.5 + step / 50, "logps/chosen": -20.0,
                    "logps/rejected": -21.0}
        if recipe.method not in ("sft", "orpo", "simpo"):
            fixed = recipe.reference == "fixed"
            row |= {"alpha": recipe.alpha, "tau": recipe.tau,
                    "reference_updates": 0 if fixed else step // recipe.tau}
        if step % 5 == 0 or step == steps:
            row |= {"kl/initial": 2 * gain * step / steps, "length/completion": 9.0}
            if recipe.method not in ("sft", "orpo", "simpo"):
                row["kl/reference"] = gain * step / steps
            if gold:
                row["gold/reward"] = 1 + gain * step / steps
        rows.append(row | (metrics_ or {}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "data_report.json").write_text(json.dumps({
        "method": recipe.method, "rows_in": 100, "rows_out": 97, "dropped": {"empty answer": 3},
        "mean_tokens": {"prompt": 12.345}}))
    if samples:
        lines = []
        for i, prompt in enumerate(prompts):
            row = {"prompt": prompt, "initial": f"the dog ran {i}",
                   "policy": f"dog {i} ran off | `then` slept"}
            if gold:
                row |= {"gold_initial": i / 10, "gold_policy": i / 10 + gain + (i % 2) / 10}
            lines.append(json.dumps(row) + "\n")
        (directory / "samples.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """A finished TR-DPO run with its report."""
    directory = write_run(tmp_path_factory.mktemp("runs") / "soft", reference="soft", alpha=0.6, tau=4,
                          seed=3)
    report(directory)
    return directory


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """DPO, TR-DPO soft, TR-DPO hard on the same task, compared."""
    folder = tmp_path_factory.mktemp("three")
    return compare([write_run(folder / "dpo", gain=0.5),
                    write_run(folder / "soft", reference="soft", alpha=0.6, tau=4, gain=1.0, seed=1),
                    write_run(folder / "hard", reference="hard", tau=10, gain=-0.25, beta=0.1)])


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Pictures take most of a report's time: the fixtures above draw for real, most tests need not."""
    monkeypatch.setattr("tralign_mini.pages.png", lambda figure, dpi=150: b"no picture")


def cells(text, start):
    """The cells of the table row that begins with `start`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


# -- one run --


def test_the_report_states_the_plan(soft):
    text = (soft / "report.md").read_text()
    assert text.startswith("# TR-DPO on little-tldr, soft reference\n")
    assert cells(text, "reference")[1] == "soft: 0.6 policy + 0.4 reference, every 4 steps: 5 updates"
    assert cells(text, "steps")[1] == "20 of 64 pairs, 2 epochs"
    assert cells(text, "method")[1] == "dpo, beta 0.05, sum of log-probs over tokens"
    assert cells(text, "seed")[1] == "3" and "Warning" not in text


def test_the_numbers_are_those_of_the_files(soft):
    text = (soft / "report.md").read_text()
    initial, policy = [i / 10 for i in range(8)], [i / 10 + 1 + (i % 2) / 10 for i in range(8)]

    def shown(interval):
        return f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"

    assert cells(text, "gold reward |")[1:] == [shown(metrics.mean_interval(x)) for x in (initial, policy)]
    gain = metrics.mean_interval([1 + (i % 2) / 10 for i in range(8)])  # paired: narrower than either mean
    assert cells(text, "gold reward, policy")[2] == shown(gain) and gain.high - gain.low < 0.1
    assert cells(text, "win rate")[2] == shown(metrics.win_rate(policy, initial)) == "1.00 [0.63, 1.00]"
    assert cells(text, "KL to initial")[2] == "2.00" and cells(text, "KL to reference")[2] == "1.00"
    assert cells(text, "words")[1:] == ["4.00", "7.00"] and cells(text, "tokens")[2] == "9.00"
    bleu = metrics.self_bleu([f"the dog ran {i}" for i in range(8)])
    assert cells(text, "Self-BLEU")[1] == f"{bleu:.2f}"
    assert cells(text, "reward accuracy")[2] == "0.89"  # steps 19 and 20 of 20: 0.88 and 0.90
    assert "policy's mean gold reward is higher" in text


def test_seed_and_scale_are_stated(soft):
    text = (soft / "report.md").read_text()
    assert "One seed (3), 8 prompts, 20 optimizer steps of 64, little-tldr." in text
    assert "Intervals (95 %) cover the prompts only, not the seeds." in text


def test_every_figure_is_linked_and_there(soft):
    links = re.findall(r"!\[.+\]\((figures/\w+\.png)\)", (soft / "report.md").read_text())
    assert links == [f"figures/{name}.png"
                     for name in ("training", "kl", "gold_over_steps", "overoptimization")]
    assert all((soft / link).read_bytes().startswith(b"\x89PNG") for link in links)


def test_what_was_dropped_is_listed(soft):
    text = (soft / "report.md").read_text()
    assert cells(text, "dropped: empty answer")[1] == "3" and cells(text, "rows out")[1] == "97"
    assert cells(text, "mean tokens: prompt")[1] == "12.3"


def test_samples_stand_side_by_side(soft):
    text = (soft / "report.md").read_text()
    assert text.count("### Prompt ") == 5
    assert "```text\nPOST: dog 0 ran.\n\nTL;DR:\n```" in text
    assert cells(text, "**0.30**") == ["**0.30** the dog ran 3", r"**1.40** dog 3 ran off \| \`then\` slept"]


@pytest.mark.parametrize("text, shown", [
    ("a|b", r"a\|b"),
    ("one\ntwo\r\nthree", "one<br>two<br>three"),
    ("<b>&", "&lt;b&gt;&amp;"),
    ("`x` *y* _z_ ~~w~~ [a](b) #1 $5", r"\`x\` \*y\* \_z\_ \~\~w\~\~ \[a\](b) \#1 \$5"),
    ("\\|", r"\\\|"),
    ("", ""),
])
def test_escaping(text, shown):
    assert escape(text) == shown


def test_odd_samples_do_not_break_the_page(tmp_path):
    odd = [[{"role": "user", "content": "say ````"}, {"role": "assistant", "content": "a"}],
           "long " * 2000 + "END", "plain"]
    write_run(tmp_path, prompts=odd)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    lines[0]["policy"], lines[1]["policy"], lines[2]["policy"] = (
        "  \n", "word " * 2000, "# a\n| b | c |\n```\n---")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report(tmp_path).read_text()
    assert "`````text\nuser: say ````\nassistant: a\n`````" in text  # the fence is longer than what it holds
    assert "*(empty)*" in text and "END\n```" in text and len(text) < 12_000
    assert cells(text, "**0.20**")[1].endswith(r"\# a<br>\| b \| c \|<br>\`\`\`<br>---")


@pytest.mark.parametrize(
    "tau, said", [(50, "The reference never moved in 20 steps (tau=50)"), (20, "moved only once")]
)
def test_a_reference_that_hardly_moves_is_a_loud_warning(tmp_path, tau, said):
    text = report(write_run(tmp_path, reference="hard", tau=tau)).read_text()
    warning = next(line for line in text.splitlines() if line.startswith("> **Warning.**"))
    assert said in warning and "plain DPO" in warning
    assert text.index("**Warning.**") < text.index("## Plan")


def test_a_fixed_reference_never_warns(tmp_path):
    assert read(write_run(tmp_path)).warnings() == []


def test_worse_and_equal_are_said(tmp_path):
    assert "gold reward is lower" in report(write_run(tmp_path / "a", gain=-0.5)).read_text()
    assert "show no difference" in report(write_run(tmp_path / "b", gain=-0.05)).read_text()


def test_a_peak_on_the_way_is_said_with_its_caveat(tmp_path):
    text = report(write_run(tmp_path, gain=-0.5)).read_text()
    assert (
        "Highest on the way: 0.88 at step 5, against 0.50 at step 20. The highest of 4 noisy values flatters."
        in text
    )


def test_real_data_have_no_gold(tmp_path):
    text = report(write_run(tmp_path, gold=False, model="x/y", data="hh")).read_text()
    assert "no gold reward" in text and "win rate" not in text and "| gold reward" not in text
    assert cells(text, "KL to initial")[2] == "2.00"
    assert re.findall(r"figures/(\w+)", text) == ["training", "kl"]


def test_a_stopped_run_has_a_report_too(tmp_path):
    write_run(tmp_path, samples=False)
    (tmp_path / "data_report.json").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')  # killed while writing
    text = report(tmp_path).read_text()
    assert "no samples.jsonl" in text and "The final policy was not sampled." in text
    assert (cells(text, "steps")[1].startswith("20 of 64") and "## Samples" not in text
            and "## Data" not in text)


@pytest.mark.parametrize("settings, title", [
    ({"method": "sft"}, "# SFT on little-tldr\n"),
    ({"method": "orpo"}, "# ORPO on little-tldr\n"),
    ({"method": "kto", "reference": "hard", "tau": 5}, "# TR-KTO on little-tldr, hard reference\n"),
    ({"method": "ipo"}, "# IPO on little-tldr, fixed reference\n"),
])
def test_every_method_has_a_report(tmp_path, settings, title):
    assert report(write_run(tmp_path, **settings)).read_text().startswith(title)


def test_one_step_is_enough(tmp_path):
    assert cells(report(write_run(tmp_path, steps=1)).read_text(), "steps")[1].startswith("1 of 64")


def test_reports_are_the_same_when_written_again(soft):
    before = (soft / "report.md").read_bytes()
    assert report(types.SimpleNamespace(directory=soft)).read_bytes() == before


def test_flat():
    assert flat({"a_b": 1, "dropped": {}, "deep": {"x": {"y|": 2.04}}}) == [
        ("a b", "1"),
        ("dropped", "none"),
        ("deep: x: y\\|", "2.0"),
    ]


# -- several runs --


def test_one_row_a_run_after_the_initial_policy(three):
    table = three.table.set_index("run")
    assert list(table.index) == ["initial policy", "dpo", "soft", "hard"]
    assert list(table.columns) == ["method", "reference", "alpha", "tau", "beta", "seed", "steps", "updates",
                                   "gold", "low", "high", "win_rate", "win_low", "win_high", "kl/initial",
                                   "kl/reference", "rewards/accuracy", "self_bleu", "length"]
    assert list(table["method"]) == ["", "DPO", "TR-DPO", "TR-DPO"]
    assert list(table["updates"][1:]) == [0, 5, 2] and list(table["seed"][1:]) == [0, 1, 0]
    assert (pd.isna(table.loc["dpo", "tau"]) and table.loc["hard", "tau"] == 10
            and table.loc["hard", "alpha"] == 1)
    assert (table.loc["initial policy", "gold"] == pytest.approx(0.35)
            and table.loc["initial policy", "kl/initial"] == 0)
    assert table.loc["soft", "gold"] == pytest.approx(1.4)
    wins = metrics.win_rate([i / 10 - 0.25 + (i % 2) / 10 for i in range(8)], [i / 10 for i in range(8)])
    assert tuple(table.loc["hard", ["win_rate", "win_low", "win_high"]]) == pytest.approx(wins)
    assert list(table["kl/initial"]) == pytest.approx([0, 1.0, 2.0, -0.5])
    assert table.loc["dpo", "length"] == 7 and table.loc["dpo", "beta"] == 0.05


def test_gold_at_equal_kl_by_hand(tmp_path):
    # gold 0.35 at KL 0; "near" ends at KL 1 with 1.5; "far" passes KL 1 at step 10 of 20, with gold 1.5
    near, far = write_run(tmp_path / "near", gain=0.5), write_run(tmp_path / "far", gain=1.0)
    note = next(note for note in compare([near, far]).notes if "equal KL" in note)
    assert "(1.00 nats" in note and note.endswith("near 1.50, far 1.50.")
    half = compare([near, write_run(tmp_path / "half", gain=0.1)]).notes[-1]
    # "half" ends at KL 0.2 with gold 1.1; "near" begins with KL 0.25, gold 1.125: 0.35 + 0.775 * 0.8
    assert "(0.20 nats" in half and half.endswith("near 0.97, half 1.10.")


def test_figures_of_a_comparison(three):
    assert list(three.figures) == ["kl", "gold_over_steps", "overoptimization"]
    assert {"dpo", "soft", "hard"} <= {text.get_text() for text in three.figures["kl"].axes[0].texts}


def test_a_comparison_is_saved(three, tmp_path, monkeypatch):
    monkeypatch.undo()  # real pictures
    path = three.save(tmp_path / "deep" / "folder")
    text = path.read_text()
    assert path.name == "comparison.md" and "Warning" not in text
    assert len(cells(text, "soft")) == len(cells(text, "run")) == len(three.summary.columns)
    links = re.findall(r"\((figures/\w+\.png)\)", text)
    assert len(links) == 3 and all((path.parent / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert "| initial policy | dpo | soft | hard |" in text  # samples side by side
    assert "One seed a row, 8 prompts. Intervals (95 %) cover the prompts only, not the seeds." in text


def test_the_summary_rounds_and_leaves_nothing_empty(three):
    summary = three.summary.set_index("run")
    assert summary.loc["soft", "alpha"] == "0.6" and summary.loc["dpo", "alpha"] == ""
    low, high = three.table.set_index("run").loc["soft", ["low", "high"]]
    assert summary.loc["soft", "gold"] == f"1.40 [{low:.2f}, {high:.2f}]"
    assert summary.loc["initial policy", "win rate"] == "" and summary.loc["initial policy", "seed"] == ""
    assert not any((summary[column] == "").all() for column in summary)


@pytest.mark.parametrize("other, said", [
    ({"model": "little-hh"}, "model (little-tldr, little-hh)"),
    ({"data": "little-hh"}, "data (little-tldr, little-hh)"),
    ({"max_completion_tokens": 20}, "max_completion_tokens (512, 20)"),
    ({"prompts": PROMPTS[:5]}, "the prompts they were evaluated on"),
])
def test_what_cannot_be_compared_is_said_loudly(tmp_path, other, said):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **{"data": "little-tldr"} | other)]
    comparison = compare(runs)
    assert (comparison.warnings[0].startswith("These runs must not be compared")
            and said in comparison.warnings[0])
    assert list(comparison.table["run"]) == ["a", "b"]  # no initial policy that all share
    assert all("NOT COMPARABLE" in figure.get_suptitle() for figure in comparison.figures.values())
    text = comparison.save(tmp_path / "c").read_text()
    assert text.startswith("# Comparison\n\n> **Warning.** These runs must not") and "## Samples" not in text
    assert not any("equal KL" in note for note in comparison.notes)


def test_ppo_beside_dpo(tmp_path):
    """In either order: PPO has settings of its own, and no beta; what it counts are iterations."""
    dpo = write_run(tmp_path / "dpo", learning_rate=1e-3)
    ppo = write_run(tmp_path / "ppo", method="ppo", reward_model="runs/taste")
    for runs in ([dpo, ppo], [ppo, dpo]):
        comparison = compare(runs)
        assert any("also differ in learning_rate:" in note for note in comparison.notes)
        betas = dict(zip(comparison.table["run"], comparison.table["beta"]))
        assert betas["dpo"] == 0.05 and np.isnan(betas["ppo"])
    text = report(ppo).read_text()
    assert "20 iterations of 64, little-tldr" in text and "KL and tokens: as measured when training" in text


def test_other_settings_that_differ_are_named(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=1e-3, save_steps=7, beta=0.2)]
    assert any("also differ in learning_rate:" in note for note in compare(runs).notes)
    assert not any("also differ" in note for note in compare(runs[:1]).notes)


def test_warnings_of_runs_carry_their_names(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", reference="soft", tau=99)]
    assert [warning.split(":")[0] for warning in compare(runs).warnings] == ["b"]


def test_equal_names_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run"), write_run(tmp_path / "z")]
    assert list(compare(runs).table["run"][1:]) == ["x/run", "y/run", "z"]
    assert list(compare([runs[2], runs[2]]).table["run"][1:]) == [
        f"{tmp_path.name}/z (1)", f"{tmp_path.name}/z (2)"]


def test_runs_come_as_paths_strings_or_objects(tmp_path, monkeypatch):
    write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    opened = types.SimpleNamespace(directory="a")
    tables = [compare(runs).table
              for runs in ([tmp_path / "a"], ["a"], "a", opened, [opened], iter(["a"]))]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


def test_real_data_are_compared_without_gold(tmp_path):
    runs = [write_run(tmp_path / name, gold=False, model="x/y", data="hh") for name in "ab"]
    comparison = compare(runs)
    assert list(comparison.figures) == ["kl"] and any("no gold reward" in note for note in comparison.notes)
    assert {"KL to initial", "Self-BLEU", "reward accuracy", "words"} <= set(comparison.summary)
    assert not {"gold", "win rate"} & set(comparison.summary)
    assert np.isnan(comparison.table["gold"]).all()


def test_a_run_without_samples_is_compared_by_its_curves(tmp_path):
    comparison = compare([write_run(tmp_path / "a", samples=False), write_run(tmp_path / "b")])
    assert comparison.warnings[0].startswith("a: There is no samples.jsonl")
    assert np.isnan(comparison.table.set_index("run").loc["a", "gold"])
    assert "overoptimization" in comparison.figures
    comparison.save(tmp_path / "c")
    turned = compare([tmp_path / "b", tmp_path / "a"])  # b's samples are shown, a has none
    assert "| initial policy | b |" in turned.save(tmp_path / "d").read_text()
    assert any("8 prompts" in note for note in turned.notes)


# -- what is not a run --


def damaged(tmp_path, name, text):
    (write_run(tmp_path) / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("make, message", [
    (lambda path: path / "nowhere", "nowhere is not there. Give the directory of a run"),
    (lambda path: path, "not the directory of a run: it has no recipe.yaml and no metrics.jsonl"),
    (lambda path: damaged(path, "metrics.jsonl", ""), "has not finished its first step"),
    (lambda path: damaged(path, "metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 3}\n'),
     "line 2 is not JSON"),
    (lambda path: damaged(path, "samples.jsonl", "{\n"), "samples.jsonl, line 1 is not JSON"),
    (lambda path: damaged(path, "recipe.yaml", "model: x\ndata: y\nmethd: dpo\n"), "did you mean 'method'"),
])
def test_what_is_not_a_run_is_refused(tmp_path, make, message):
    for use in (report, lambda path: compare([path])):
        with pytest.raises(ValueError, match=message):
            use(make(tmp_path))


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([])
