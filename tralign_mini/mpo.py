"""MPO, mixed preference optimization (arXiv 2403.19443, not the MPO of arXiv 2411.10442): learn offline from
pairs that are easy to tell apart, then online on the prompts of those that are not.

    reward-a, reward-b   reward models, each of half the prompts: the other one scores a pair
    split                a pair is easy if |r(chosen) - r(rejected)| > gamma, else hard
    easy                 stage 1: DPO, or any of our methods, moving reference included, on the easy pairs
    reward               a reward model of all pairs, to be maximised in
    ppo                  stage 2: PPO on the hard pairs' prompts, from stage 1's policy, which it is held to

Each but the split is an ordinary run in a folder of its own; a kill costs at most that run's last steps. No
code of the paper was published: threshold, cross-fitting and what becomes of wrong signs are our choices.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .data import NAMES
from .json_lines import read_rows, write_rows
from .models import this_process
from .plot_style import COLORS, INK, new_figure, png, style_axes
from .recipe import Recipe
from .recipe_file import RecipeError, dump, read
from .reward import RewardModel
from .runs import Run, refuse_another_recipe, split_rows, train
from .tokens import PARTS, unusable
from .worlds import WORLDS

SECTIONS = ("reward", "easy", "ppo")
FIXED = ("data", "eval_data", "output", "resume", "reward_model", "train_pairs")  # what stages get from here
OWN = {"gamma": None, "easy_fraction": None, "wrong_sign": "keep", "swap": False}
WRONG_SIGN = ("keep", "drop", "flip")


class Split(NamedTuple):
    """easy: bool, (pairs,); gamma: the threshold that made it."""

    easy: np.ndarray
    gamma: float


def split_gaps(gaps: Sequence[float], *, gamma: float | None = None,
               easy_fraction: float | None = None) -> Split:
    """Which pairs are easy: |gap| > gamma, with gamma given or so that `easy_fraction` of the pairs are.

    gaps: r(chosen) - r(rejected), (pairs,). ValueError unless one of the two is given and leaves both kinds.
    """
    for problem in _threshold_problems(gamma, easy_fraction):
        raise ValueError(problem)
    sizes = np.abs(np.asarray(gaps, dtype=float))
    gamma = np.quantile(sizes, 1 - easy_fraction) if gamma is None else gamma
    easy = sizes > gamma
    if easy.all() or not easy.any():
        least, half, most = (f"{size:.3g}" for size in np.quantile(sizes, [0, 0.5, 1]))
        raise ValueError(f"gamma={gamma:g} leaves no {'hard' if easy.all() else 'easy'} pair: the gaps are "
                         f"{least} to {most}, half of them below {half}.")
    return Split(easy, float(gamma))


def stage_1_labels(gaps: Sequence[float], part: Sequence[bool], wrong_sign: str) -> np.ndarray:
    """What becomes of each label in stage 1: kept, dropped, flipped, or "" for a pair of the other part.

    gaps: (pairs,); part: bool, (pairs,), those of stage 1; wrong_sign: keep, drop or flip.
    """
    what = {"keep": "kept", "drop": "dropped", "flip": "flipped"}[wrong_sign]
    return np.where(part, np.where(np.asarray(gaps) < 0, what, "kept"), "")


def _threshold_problems(gamma, easy_fraction) -> Iterator[str]:
    if (gamma is None) == (easy_fraction is None):
        yield (f"gamma={gamma} and easy_fraction={easy_fraction}: give one of them; gamma is a gap in units "
               "of reward, easy_fraction the share of pairs whose gap is larger.")
    elif easy_fraction is None and not (isinstance(gamma, Real) and 0 <= gamma < math.inf):
        yield f"gamma={gamma}: it is the size of a gap, a number >= 0."
    elif gamma is None and not (isinstance(easy_fraction, Real) and 0 < easy_fraction < 1):
        yield f"easy_fraction={easy_fraction} is no share of pairs: it lies between 0 and 1."


def folds_of(prompts: Sequence, seed: int) -> np.ndarray:
    """Fold 0 or 1 of each pair, (pairs,): half of the *prompts* each, all pairs of a prompt in one fold."""
    keys = [json.dumps(prompt) for prompt in prompts]
    different = list(dict.fromkeys(keys))
    if len(different) < 2:
        raise ValueError("All pairs have the same prompt, so no two folds of prompts can be made of them.")
    order = np.random.default_rng(seed).permutation(len(different))
    fold = {different[i]: place % 2 for place, i in enumerate(order)}
    return np.array([fold[key] for key in keys])


class MPORun:
    """An MPO run's directory, opened: `stages`, `pairs`, `counts`, `policy`. ValueError if it is none."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not (self.directory / "mpo.yaml").is_file():
            raise ValueError(f"{directory} is not the directory of an MPO run: there is no mpo.yaml in it.")

    @property
    def stages(self) -> dict[str, Run]:
        """The runs that have begun, by name: reward-a, reward-b, easy (swapped: hard), reward, ppo."""
        names = ("reward-a", "reward-b", "easy", "hard", "reward", "ppo")
        begun = [name for name in names if (self.directory / name / "recipe.yaml").is_file()]
        return {name: Run(self.directory / name) for name in begun}

    @property
    def pairs(self) -> pd.DataFrame:
        """split.jsonl: for each line of data/all.jsonl fold, rewards chosen, rejected, gap, part, label."""
        return pd.read_json(self.directory / "split.jsonl", lines=True)

    @property
    def counts(self) -> dict[str, Any]:
        """split.json: what became of the pairs."""
        return json.loads((self.directory / "split.json").read_text())

    @property
    def policy(self):
        """The policy after stage 2."""
        return Run(self.directory / "ppo").policy


def train_mpo(recipe: str | os.PathLike | Mapping, *, stop=None, **overrides: Any) -> MPORun:
    """The whole of MPO: reward models, split, stage 1, reward model, stage 2. Returns the `MPORun`.

    recipe: a shipped name (little-tldr-mpo), a YAML file, a mapping, or an MPO run's directory, to go on with
    it (`resume=True`). Its settings are those of `Recipe` for all runs, or with `reward.`, `easy.` or `ppo.`
    in front for those alone; `gamma` or `easy_fraction` (see `split_gaps`); `wrong_sign`: what becomes of a
    pair of stage 1 whose rejected completion has the higher reward (keep, drop, or flip its label); `swap`:
    stage 1 on the hard pairs, stage 2 on the easy ones' prompts. overrides: any of these; `easy={"beta": 1}`
    is `easy.beta`. stop: as for `train`. Errors are ValueErrors, before training if they can be.
    """
    if this_process().num_processes > 1:
        raise ValueError("MPO runs in one process, as PPO does. Start it without torchrun or accelerate.")
    settings = load_settings(recipe, overrides)
    directory, first = Path(settings["output"]).resolve(), "hard" if settings["swap"] else "easy"
    for name in ("reward", first, "ppo"):
        stage_recipe(settings, directory, name)  # refuses what cannot be, now and not in an hour
    if not _resumes(directory, settings):
        _write_data(settings, directory)

    def finish(name: str, **more) -> bool:
        wanted, report = stage_recipe(settings, directory, name, **more), directory / name / "report.md"
        if (directory / name / "recipe.yaml").is_file():
            _follow(directory / name)
            refuse_another_recipe(directory / name, wanted)
            wanted = wanted.replace(resume=True)
        if not report.is_file():  # which is written last
            print(f"\n=== {name} ===", flush=True)
            train(wanted, stop=stop)
        return report.is_file()  # or it was stopped

    if finish("reward-a") and finish("reward-b"):
        if not (directory / "split.json").is_file():
            _split(settings, directory)
        if finish(first) and finish("reward"):
            finish("ppo", model=str(Run(directory / first).last_checkpoint))
    return MPORun(directory)


def load_settings(source: str | os.PathLike | Mapping, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings, with `reward.`, `easy.` or `ppo.` in front of those of one stage. Raises RecipeError."""
    if isinstance(source, Mapping):
        settings, title = source, "recipe"
    else:
        stored = Path(source) / "mpo.yaml"
        settings, title = read(stored if stored.is_file() else source)
        if stored.is_file():
            settings["output"] = str(source)  # it may have been moved since
    settings, problems = _flat(settings) | _flat(overrides), []
    settings = OWN | {key: value for key, value in settings.items() if value is not None or "." in key}
    if settings.pop("method", "mpo") != "mpo":
        problems.append("method is a setting of stage 1: say easy.method")
    world = settings.get("model") in WORLDS
    settings["data"] = settings.get("data") or (settings["model"] if world else None)
    if settings["data"] is None:
        problems.append("data is missing: say what to train on, as for any run")
    for key in ("model", "data", "eval_data"):  # what is a path has to stay one from another folder
        if settings.get(key) not in (None, *NAMES) and Path(settings[key]).exists():
            settings[key] = str(Path(settings[key]).resolve())
    name = f"{Path(str(settings['data'])).name.split('.')[0]}-mpo-{settings.get('seed', 0)}"
    settings["output"] = settings.get("output") or f"runs/{name}"
    if settings["wrong_sign"] not in WRONG_SIGN:
        problems.append(f"wrong_sign={settings['wrong_sign']}: must be one of {', '.join(WRONG_SIGN)}")
    if not isinstance(settings["swap"], bool):
        problems.append(f"swap={settings['swap']}: must be true or false")
    for key in [key for key in settings if "." in key]:
        section, _, own = key.partition(".")
        if section not in SECTIONS or own in FIXED or key in ("reward.method", "ppo.method", "ppo.model"):
            problems.append(f"{key}: there is no such setting; {', '.join(SECTIONS)} have those of a run, "
                            "but data, output etc. are MPO's, method is easy's, ppo's model is stage 1's")
    problems += _threshold_problems(settings["gamma"], settings["easy_fraction"])
    if problems:
        raise RecipeError(problems, title)
    return settings


def stage_recipe(settings: Mapping[str, Any], directory: Path, name: str, **more: Any) -> Recipe:
    """The recipe of the run `name` (reward-a, reward-b, easy, hard, reward or ppo) inside `directory`."""
    section = {"hard": "easy"}.get(name, name.partition("-")[0])
    common = {key: value for key, value in settings.items() if "." not in key and key not in (*OWN, *FIXED)}
    own = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{section}.")}
    files = {"reward-a": "fold-a", "reward-b": "fold-b", "reward": "all", "ppo": "stage-2"}
    data, source = directory / "data", settings.get("eval_data") or settings["data"]
    held_out = source if source in WORLDS else str(data / "held-out")  # a world knows the true quality, too
    fixed = {"data": str(data / f"{files.get(name, 'stage-1')}.jsonl"), "eval_data": held_out,
             "output": str(directory / name)}
    fixed |= {"easy": {}, "reward": {"method": "reward"},
              "ppo": {"method": "ppo", "reward_model": str(directory / "reward")}}[section]
    return Recipe.load(common | own | fixed | more)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def _resumes(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether there is an MPO run to go on with; refuses to overwrite it, or to go on with other settings."""
    path, resume = directory / "mpo.yaml", settings.pop("resume", False)
    if not path.is_file():
        return False
    if not resume:
        raise ValueError(f"output={directory} already holds an MPO run. Say resume=true to go on with it, or "
                         "choose another output; nothing was changed.")
    stored = read(path)[0]
    different = [key for key in stored | settings if key != "output" and stored.get(key) != settings.get(key)]
    if different:
        changes = ", ".join(f"{key}: {stored.get(key)} then, {settings.get(key)} now" for key in different)
        raise ValueError(f"output={directory} holds an MPO run with other settings ({changes}). A resumed "
                         "run is the same run: give the old settings, or another output for a new run.")
    return True


def _follow(folder: Path) -> None:
    """The recipe of a stage names its data and models by path: mend it where MPO's folder was moved since."""
    path = folder / "recipe.yaml"
    before, now = Path(read(path)[0]["output"]).parent, folder.parent
    if before != now:
        _replace(path, path.read_text(encoding="utf-8").replace(f"{before}{os.sep}", f"{now}{os.sep}"))


def _write_data(settings: Mapping[str, Any], directory: Path) -> None:
    """data/: held-out pairs, those of each fold, and all; last mpo.yaml, from which on it is a run."""
    common = {key: value for key, value in settings.items() if "." not in key and key not in (*OWN, "output")}
    recipe = Recipe.load(common | {"method": "reward"})
    dataset, held_out, *_ = split_rows(recipe)
    if missing := set(PARTS) - set(dataset.column_names):
        raise ValueError(f"{settings['data']} has no column {', '.join(sorted(missing))}: MPO needs pairs.")
    rows = [row for row in dataset.select_columns(list(PARTS))
            if not unusable(row["prompt"], {side: row[side] for side in PARTS[1:]})]
    if (recipe.train_pairs or 0) > len(rows):
        raise ValueError(f"train_pairs={recipe.train_pairs}, but there are only {len(rows)} pairs: lower it.")
    order = np.random.default_rng(recipe.seed).permutation(len(rows))
    rows = [rows[i] for i in sorted(order[: recipe.train_pairs])]
    folds = folds_of([row["prompt"] for row in rows], recipe.seed)
    data, sizes = directory / "data", dict(zip(("reward-a", "reward-b"), np.bincount(folds)))
    if share := settings["easy_fraction"]:  # so it is known how many pairs will be easy
        in_first = split_gaps(range(len(rows)), easy_fraction=share).easy != settings["swap"]
        sizes |= {"easy": in_first.sum(), "ppo": (~in_first).sum()}
    _check_sizes(settings, directory, sizes)
    write_rows(data / "held-out" / "test.jsonl", held_out.select_columns(list(PARTS)))
    for fold, name in enumerate("ab"):
        write_rows(data / f"fold-{name}.jsonl", [row for row, own in zip(rows, folds) if own == fold])
    write_rows(data / "all.jsonl", rows)
    _replace(directory / "mpo.yaml", dump({key: value for key, value in settings.items() if key != "output"}))


def _split(settings: Mapping[str, Any], directory: Path) -> None:
    """split.jsonl, split.json, figures/gaps.png, and the data of both stages."""
    data, rows = directory / "data", read_rows(directory / "data" / "all.jsonl")
    prompts, rewards = [row["prompt"] for row in rows], np.empty((2, len(rows)))
    in_a = {json.dumps(row["prompt"]) for row in read_rows(data / "fold-a.jsonl")}
    folds = np.array([json.dumps(prompt) not in in_a for prompt in prompts])
    for fold, name in enumerate("ba"):  # fold 0, a, is scored by the model of b
        mine, model = np.flatnonzero(folds == fold), RewardModel.load(directory / f"reward-{name}")
        for side, column in enumerate(("chosen", "rejected")):
            rewards[side, mine] = model.score([prompts[i] for i in mine], [rows[i][column] for i in mine])
    gaps = rewards[0] - rewards[1]
    easy, gamma = split_gaps(gaps, gamma=settings["gamma"], easy_fraction=settings["easy_fraction"])
    wrong, in_first = gaps < 0, easy != settings["swap"]
    labels = stage_1_labels(gaps, in_first, settings["wrong_sign"])
    first = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if label == "flipped" else row
             for row, label in zip(rows, labels) if label in ("kept", "flipped")]
    second = list({json.dumps(row["prompt"]): row for row, one in zip(rows, in_first) if not one}.values())
    counts = {
        "pairs": len(rows), "gamma": gamma, "easy": int(easy.sum()), "hard": int((~easy).sum()),
        "of the wrong sign": {"easy": int((wrong & easy).sum()), "hard": int((wrong & ~easy).sum())},
        "stage 1": {"on": "hard" if settings["swap"] else "easy", "pairs": len(first),
                    "dropped": int((labels == "dropped").sum()), "flipped": int((labels == "flipped").sum())},
        "stage 2": {"on": "easy" if settings["swap"] else "hard", "prompts": len(second)}}
    print(f"\n=== split ===\n{json.dumps(counts, indent=1)}", flush=True)
    _check_sizes(settings, directory, {"easy": len(first), "ppo": len(second)})
    table = pd.DataFrame({"fold": np.where(folds, "b", "a"), "chosen": rewards[0], "rejected": rewards[1],
                          "gap": gaps, "part": np.where(easy, "easy", "hard"), "label": labels})
    write_rows(data / "stage-1.jsonl", first)
    write_rows(data / "stage-2.jsonl", second)
    write_rows(directory / "split.jsonl", table.to_dict("records"))
    (directory / "figures").mkdir(exist_ok=True)
    (directory / "figures" / "gaps.png").write_bytes(png(gap_figure(gaps, gamma)))
    _replace(directory / "split.json", json.dumps(counts, indent=1))  # last: from now on there is a split


def _check_sizes(settings: Mapping[str, Any], directory: Path, sizes: Mapping[str, int]) -> None:
    """RecipeError if a stage has less than one batch of its pairs (ppo: prompts)."""
    for name, size in sizes.items():
        recipe = stage_recipe(settings, directory, name)
        recipe.plan(int(size) * (2 if recipe.method == "kto" else 1))  # which makes two rows of a pair


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def gap_figure(gaps: Sequence[float], gamma: float) -> Figure:
    """How large the gaps r(chosen) - r(rejected) are, and which pairs the threshold makes easy and hard."""
    figure, xlabel = new_figure(8.2, 4.3), "r(chosen) − r(rejected), by a model that never saw the pair"
    ax = figure.subplots()
    style_axes(ax, "Reward gaps of the training pairs", xlabel, "pairs")
    draw_gaps(ax, gaps, gamma)
    return figure


def draw_gaps(ax, gaps: Sequence[float], gamma: float) -> None:
    """The histogram of `gap_figure`, on axes that are there."""
    gaps = np.asarray(gaps, dtype=float)
    easy, wrong = np.abs(gaps) > gamma, gaps < 0
    below, edges = 0, np.linspace(*np.quantile(gaps, [0.001, 0.999]), 60)
    parts = {"hard": ~easy, "easy, right sign": easy & ~wrong, "easy, wrong sign": easy & wrong}
    for (name, mask), color in zip(parts.items(), ("initial", "fixed", "soft")):
        top = below + np.histogram(np.clip(gaps[mask], edges[0], edges[-1]), edges)[0]
        label = f"{name}: {mask.sum()} ({mask.mean():.0%})"
        ax.stairs(top, edges, baseline=below, fill=True, color=COLORS[color], label=label)
        below = top
    ax.set_ylim(0, 1.5 * below.max())  # room for the names
    for threshold in (-gamma, gamma):
        ax.axvline(threshold, color=INK, lw=1.4, ls="--")
    ax.legend(frameon=False, fontsize=11, title=f"γ = {gamma:.3g}")
