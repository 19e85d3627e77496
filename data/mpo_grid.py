"""Makes data/mpo, the runs behind notebook 08: DPO, PPO, MPO and TR-MPO at equal compute, on noisy labels.

    python data/mpo_grid.py             one cell after the other; stopped, it goes on where it was
    python data/mpo_grid.py 1/2         every second cell only, so that two processes can share the work

A cell is a world, a noise and a seed: labels, MPO with its reward models, and the other methods beside it, on
the same pairs and with the same reward model. It takes ten to fifteen minutes on one core. All are ordinary
runs in runs/mpo; what a reader needs of them is copied to data/mpo. Settings are those of the recipes, chosen
with seed 0 and fixed references, with the few changes below; the seeds here are fresh.
"""
from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
RUNS, KEPT = REPOSITORY / "runs" / "mpo", REPOSITORY / "data" / "mpo"
SEEDS, WORLDS = (1, 2, 3), ("little-tldr", "little-hh")
# Of the shipped labels, which share is turned; None: gold decides. kl0.5 has another KL coefficient
TURNED = {"shipped": 0.0, "heavy": 0.25, "none": None, "kl0.5": 0.0}
PAIRS, PPO_STEPS = 3200, 22
TEXTS = 20  # prompts of a run whose texts are kept; of the others only the gold rewards
REWARD = {"learning_rate": 1e-3, "epochs": 2, "eval_steps": 1000, "eval_prompts": 1000, "save_steps": 1000}
EASY = {"epochs": 2, "eval_steps": 25}
SOFT = {"easy": {"reference": "soft", "alpha": 0.6, "tau": 16},
        "ppo": {"reference": "soft", "alpha": 0.6, "tau": 5}}


def cells() -> list[tuple[str, str, int]]:
    """(world, noise, seed), the most telling ones first."""
    kinds = [*itertools.product(("shipped", "heavy"), WORLDS),
             ("none", "little-tldr"), ("kl0.5", "little-hh"), ("none", "little-hh")]
    return [(world, noise, seed) for seed, (noise, world) in itertools.product(SEEDS, kinds)]


def gold_of(world: str, rows: list[dict]) -> np.ndarray:
    """Gold rewards of the chosen and of the rejected completions, (2, pairs)."""
    from tralign_mini import worlds

    prompts = [row["prompt"] for row in rows]
    sides = ("chosen", "rejected")
    return np.array([worlds.gold_reward(world, prompts, [row[side] for row in rows]) for side in sides])


def relabelled(world: str, noise: str, seed: int, rows: list[dict]) -> list[dict]:
    """The world's pairs with labels of this noise."""
    turned = np.random.default_rng([seed, 8]).random(len(rows)) < (TURNED[noise] or 0)
    if TURNED[noise] is None:
        chosen, rejected = gold_of(world, rows)
        turned = chosen < rejected  # of two equally good ones the label stays
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if turn else row
            for row, turn in zip(rows, turned)]


def make(world: str, noise: str, seed: int) -> None:
    """All runs of one cell, and their copies in data/mpo."""
    import tralign_mini as tr
    from tralign_mini.mpo import load_settings, stage_recipe

    name, steps = f"{world}-{noise}-seed{seed}", compute()[world]["steps"]
    work, labels = RUNS / name, RUNS / "labels" / f"{name}.jsonl"
    _write(labels, relabelled(world, noise, seed, list(tr.load_dataset(world, "train"))))
    common = {"seed": seed, "eval_data": world, "eval_prompts": 200, "save_steps": 25, "resume": True}
    # 0.5 is in little-hh's recipes since 0.1 failed there
    online = {"kl_coef": 0.5 if noise == "kl0.5" else 0.1, "eval_steps": 5}
    stages = {"reward": REWARD, "easy": EASY, "ppo": {"max_steps": PPO_STEPS} | online}
    mpo = tr.train_mpo(f"{world}-mpo", **common, **stages, output=str(work / "mpo"), data=str(labels),
                       train_pairs=PAIRS)
    settings, runs = load_settings(work / "mpo", {}), dict(mpo.stages)
    moving = {stage: SOFT[stage] | {"output": str(work / f"tr-{stage}"), "resume": True} for stage in SOFT}
    runs["tr-easy"] = tr.train(stage_recipe(settings, mpo.directory, "easy", **moving["easy"]))
    moving["ppo"]["model"] = str(runs["tr-easy"].last_checkpoint)
    runs["tr-ppo"] = tr.train(stage_recipe(settings, mpo.directory, "ppo", **moving["ppo"]))
    pairs = mpo.directory / "data" / "all.jsonl"
    common["data"] = str(pairs)
    runs["sft-ppo"] = tr.train(f"{world}-ppo", **common, **online, max_steps=steps["sft-ppo"],
                               reward_model=str(mpo.directory / "reward"), output=str(work / "sft-ppo"))
    runs["dpo"] = tr.train(world, **common, method="dpo", reference="fixed", max_steps=steps["dpo"],
                           eval_steps=50, output=str(work / "dpo"))
    for stage, run in runs.items():
        keep(run.directory, KEPT / name / stage)
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    table = mpo.pairs[["gap"]].round(4).assign(gold=np.subtract(*gold_of(world, rows)))
    table.to_csv(KEPT / name / "gaps.csv.gz", index=False, compression={"method": "gzip", "mtime": 1})
    (KEPT / name / "split.json").write_text(json.dumps(mpo.counts, indent=1))  # last: now the cell is whole
    for folder in work.glob("**/checkpoints"):
        shutil.rmtree(folder)


def keep(run: Path, folder: Path) -> None:
    """Copy what a reader needs: the recipe, rows with an evaluation, gold rewards of the final samples."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = (run / "recipe.yaml").read_text().splitlines(keepends=True)
    paths = ("output:", "data:", "reward_model:", "model: /")  # of this machine
    (folder / "recipe.yaml").write_text("".join(line for line in recipe if not line.startswith(paths)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "gold/reward" in row or "eval/accuracy" in row]
    _write(folder / "metrics.jsonl", [{key: _short(row[key]) for key in row} for row in measured])
    if (run / "samples.jsonl").is_file():
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        gold = [{key: row[key] for key in ("gold_initial", "gold_policy")} for row in samples]
        gold[:TEXTS] = [{key: row[key] for key in ("prompt", "policy")} | kept
                        for row, kept in zip(samples, gold[:TEXTS])]
        (folder / "gold.json").write_text(json.dumps(gold))


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compute() -> dict:
    """FLOPs of each kind of step, and the steps that take the same for every method: compute.json."""
    path = KEPT / "compute.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({world: bill(measured(world)) for world in WORLDS}, indent=1))
    return json.loads(path.read_text())


def bill(flops: dict[str, float]) -> dict:
    """What MPO takes, and how many steps of DPO and PPO that pays for."""
    batches = PAIRS / 64
    reward = REWARD["epochs"] * batches * flops["reward"]  # one model of all pairs, or two of half of them
    split, once = 2 * reward + batches * flops["score"], batches * flops["reference"]
    easy, online = EASY["epochs"] * batches / 2, PPO_STEPS * flops["ppo"]
    budget = split + once / 2 + easy * flops["dpo"] + online
    steps = {"dpo": round((budget - once) / flops["dpo"]), "sft-ppo": round((budget - reward) / flops["ppo"])}
    return {"flops": flops, "steps": steps, "budget": budget, "split and reward": split, "reward": reward,
            "tr-mpo": split + easy * flops["moving dpo"] + online}


def measured(world: str) -> dict[str, float]:
    """FLOPs of a step of 64 pairs or prompts, of each kind."""
    import tralign_mini as tr

    folder = RUNS / "flops"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["TRALIGN_CACHE"] = str(folder / "cache")  # a fresh one: the reference's pass counts, too

    def run(recipe: str, kind: str, steps: int, settings: dict) -> float:
        return counted(lambda: tr.train(recipe, **settings, max_steps=steps, eval_prompts=2, eval_steps=1000,
                                        output=str(folder / f"{kind}-{steps}")))

    def cost(recipe: str, kind: str, **settings) -> float:
        """Of a step: half of what four take more than two, so that what comes once cancels."""
        return (run(recipe, kind, 4, settings) - run(recipe, kind, 2, settings)) / 2

    reward, model = cost(f"{world}-reward", "reward"), str(folder / "reward-4")
    rows = list(tr.load_dataset(world, "train"))[:64]
    prompts, texts = zip(*((row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")))
    flops = {"reward": reward, "score": counted(lambda: tr.score(prompts, texts, model=model)),
             # the first time the reference's pass is computed, for each step's pairs, then it is read
             "moving dpo": cost(world, "moving", method="dpo", reference="fixed"),
             "dpo": cost(world, "fixed", method="dpo", reference="fixed"),
             "ppo": cost(f"{world}-ppo", "ppo", reward_model=model)}
    return flops | {"reference": flops["moving dpo"] - flops["dpo"]}


def counted(work) -> float:
    """FLOPs of work(): matrix products and attention, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten  # the counter itself knows the attention of GPUs alone
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: forward,
               aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def main(part: str = "1/1") -> None:
    """Make the cells of this part that are not there yet."""
    own, parts = map(int, part.split("/"))
    for index, (world, noise, seed) in enumerate(cells()):
        whose = (index + index // len(WORLDS)) % parts + 1  # each part gets both worlds: one takes longer
        if whose == own and not (KEPT / f"{world}-{noise}-seed{seed}" / "split.json").is_file():
            make(world, noise, seed)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
