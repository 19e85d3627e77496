"""The runs behind notebook 08: their labels, their bill, and what is shipped of them."""

from __future__ import annotations

import json
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import tralign_mini as tr
from tralign_mini import worlds

ROOT = Path(__file__).resolve().parents[1]
FOLDER = worlds.data_root() / "mpo"
CELLS = sorted(path for path in FOLDER.glob("*-seed*"))
POLICIES = ("easy", "ppo", "tr-easy", "tr-ppo", "sft-ppo", "dpo")


@pytest.fixture(scope="module")
def maker():
    """data/mpo_grid.py as a module."""
    before, sys.dont_write_bytecode = (list(sys.path), sys.dont_write_bytecode), True
    spec = util.spec_from_file_location("mpo_grid_maker", ROOT / "data" / "mpo_grid.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:], sys.dont_write_bytecode = before
    return module


def wrong(world: str, rows: list[dict]) -> np.ndarray:
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (worlds.gold_reward(world, prompts, [row[side] for row in rows])
                        for side in ("chosen", "rejected"))
    return np.less(chosen, rejected)


def test_labels_of_every_noise(maker):
    rows = list(tr.load_dataset("little-hh", "train"))[:2000]
    clean, shipped, heavy, other = (
        maker.relabelled("little-hh", *how, rows)
        for how in (("none", 1), ("shipped", 1), ("heavy", 1), ("heavy", 2)))
    assert shipped == rows and not wrong("little-hh", clean).any()
    turned = np.array([one != row for one, row in zip(heavy, rows)])
    assert 0.22 < turned.mean() < 0.28 and heavy != other
    assert all(one["chosen"] == row["rejected"] and one["rejected"] == row["chosen"] and
               one["prompt"] == row["prompt"] for one, row, turn in zip(heavy, rows, turned) if turn)
    assert 0.28 < wrong("little-hh", heavy).mean() < 0.36


def test_the_bill_by_hand(maker, monkeypatch):
    monkeypatch.setattr(maker, "PAIRS", 640)  # 10 batches
    monkeypatch.setattr(maker, "PPO_STEPS", 3)
    flops = {"reward": 2.0, "score": 1.0, "reference": 4.0, "dpo": 10.0, "moving dpo": 14.0, "ppo": 100.0}
    found = maker.bill(flops)
    # reward models 40 of all, 40 of both halves; scores 10; reference 20; DPO, ten steps, 100; PPO 300
    assert found["reward"] == 40 and found["split and reward"] == 90
    assert found["budget"] == 90 + 20 + 100 + 300 and found["tr-mpo"] == 90 + 140 + 300
    assert found["steps"] == {"dpo": (510 - 40) // 10, "sft-ppo": 5}  # (510 - 40) / 100


def test_flops_of_products_and_of_attention(maker):
    x, weight = torch.ones(4, 8, requires_grad=True), torch.ones(8, 3, requires_grad=True)
    assert maker.counted(lambda: (x @ weight).sum().backward()) == 3 * 2 * 4 * 8 * 3
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    one_product = 2 * 2 * 3 * 16 * 16 * 8
    with torch.no_grad():
        assert maker.counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * one_product
    forward_and_backward = maker.counted(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert forward_and_backward == (2 + 5) * one_product  # backward computes the scores again


def test_the_shipped_bill_is_that_of_the_maker(maker):
    stored = json.loads((FOLDER / "compute.json").read_text())
    assert list(stored) == list(worlds.WORLDS)
    for world in stored.values():
        found = maker.bill(world["flops"])
        assert found.pop("steps") == world["steps"]
        assert found.pop("flops") == world["flops"]
        assert found == pytest.approx({key: world[key] for key in found})
        flops, steps = world["flops"], world["steps"]
        spent = steps["dpo"] * flops["dpo"] + 50 * flops["reference"]
        assert spent == pytest.approx(world["budget"], rel=0.01)
        assert world["reward"] + steps["sft-ppo"] * flops["ppo"] == pytest.approx(world["budget"], rel=0.01)
        assert world["tr-mpo"] == pytest.approx(world["budget"], rel=0.03)


def test_the_shipped_cells_are_among_the_makers_and_small(maker):
    names = [f"{world}-{noise}-seed{seed}" for world, noise, seed in maker.cells()]
    assert len(names) == 21 and {path.name for path in CELLS} <= set(names)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 4e6


@pytest.mark.parametrize("cell", CELLS, ids=lambda path: path.name)
def test_a_shipped_cell_is_whole(cell):
    world, bill = cell.name.rsplit("-", 2)[0], json.loads((FOLDER / "compute.json").read_text())
    last = {}
    for name in (*POLICIES, "reward-a", "reward-b", "reward"):
        recipe = (cell / name / "recipe.yaml").read_text()
        assert "/" not in recipe and f"seed: {cell.name[-1]}\n" in recipe
        last[name] = json.loads((cell / name / "metrics.jsonl").read_text().splitlines()[-1])
    steps = bill[world]["steps"] | {"easy": 50, "tr-easy": 50, "ppo": 22, "tr-ppo": 22}
    assert {name: last[name]["step"] for name in POLICIES} == steps
    assert {last[name]["reference_updates"] for name in ("easy", "ppo", "sft-ppo", "dpo")} == {0}
    assert (last["tr-easy"]["reference_updates"], last["tr-ppo"]["reference_updates"]) == (3, 4)
    for name in POLICIES:
        gold = pd.DataFrame(json.loads((cell / name / "gold.json").read_text()))
        assert len(gold) == 200 and gold.filter(like="gold").max(axis=None) <= 3
        texts = gold.dropna()  # of the first prompts only
        assert len(texts) == 20
        assert worlds.gold_reward(world, texts.prompt, texts.policy) == texts.gold_policy.tolist()
    pairs, counts = pd.read_csv(cell / "gaps.csv.gz"), json.loads((cell / "split.json").read_text())
    assert len(pairs) == counts["pairs"] == 3200 and counts["easy"] == 1600
    assert (pairs.gap.abs() > counts["gamma"]).sum() == pytest.approx(1600, abs=2)  # gaps have four digits
    share = {"none": 0, "shipped": 0.18, "heavy": 0.315, "kl0.5": 0.18}[cell.name.rsplit("-", 2)[1]]
    assert (pairs.gold < 0).mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_ppo_with_the_larger_kl_coefficient_raises_the_true_reward_and_stays_near(seed):
    """What the recipe and notebook 08 say: gold rises from 1.0 to 1.6 and more, within a nat of KL."""
    run = FOLDER / "little-hh-ppo-kl0.5" / str(seed)
    recipe = (run / "recipe.yaml").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"seed: {seed}\n" in recipe and "kl_coef: 0.5\n" in recipe and "/" not in recipe
    gold = pd.DataFrame(json.loads((run / "gold.json").read_text()))
    assert len(gold) == 200 and last["step"] == 25 and last["kl/initial"] < 1
    assert gold.gold_initial.mean() < 1.2 and gold.gold_policy.mean() > 1.6
    assert last["gold/reward"] == pytest.approx(gold.gold_policy.mean(), abs=0.15)  # of other samples
