"""How far a policy has gone, how good it is there, and the law that ties the two.

Gold reward against the distance d = sqrt(KL to the initial policy): Gao et al., arXiv 2210.10760, fit
R(d) = d (a - b log d) for reinforcement learning, Rafailov et al., arXiv 2406.02900, for DPO and its kin.
R is the gold reward above that of the initial policy, so R(0) = 0.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .record import Record, read

SETTINGS = ("method", "reference", "beta", "epochs", "seed")  # what tells the runs of a grid apart


class Law(NamedTuple):
    """R(d) = d (a - b log d)."""

    a: float
    b: float

    def __call__(self, distance) -> np.ndarray:
        d = np.asarray(distance, dtype=float)
        return d * (self.a - self.b * np.log(np.where(d > 0, d, 1.0)))

    @property
    def peak(self) -> tuple[float, float]:
        """Where R is largest, and R there: dR/dd = a - b - b log d = 0. NaN if it has no largest value."""
        if self.b <= 0:
            return np.nan, np.nan
        distance = float(np.exp(self.a / self.b - 1))
        return distance, self.b * distance


def fit_overoptimization(distance, gain) -> Law:
    """The law through points, by least squares: it is linear in a and b.

    distance: sqrt(KL), (n,), not negative; gain: gold reward minus the initial policy's, (n,). ValueError
    without two different distances above 0.
    """
    d, gain = np.asarray(distance, dtype=float), np.asarray(gain, dtype=float)
    if d.ndim != 1 or d.shape != gain.shape or not np.isfinite([d, gain]).all() or (d < 0).any():
        raise ValueError("distance and gain must be flat, finite and of one length, distances not negative; "
                         f"their shapes are {d.shape} and {gain.shape}. Drop what was not measured.")
    if (different := len(set(d[d > 0]))) < 2:
        raise ValueError(f"The law has two numbers, a and b; {different} different distance(s) above 0 "
                         "cannot tell them. Pass more evaluations.")
    return Law(*np.linalg.lstsq(np.stack([Law(1, 0)(d), Law(0, 1)(d)], 1), gain, rcond=None)[0].tolist())


def law_through(paths: list[tuple]) -> tuple[np.ndarray, np.ndarray] | None:
    """The law through the `frontier`s of several runs, as points from the start to the farthest.

    A path without a start does not count. None: too few points for two numbers.
    """
    paths = [path for path in paths if len(path[0]) and path[0][0] == 0]
    distance = np.concatenate([x for x, _ in paths] or [[]])
    if len(set(distance)) < 4:
        return None
    law = fit_overoptimization(distance, np.concatenate([y - y[0] for _, y in paths]))
    x = np.linspace(0, distance.max(), 100)
    return x, np.mean([y[0] for _, y in paths]) + law(x)


def frontier(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Distances and gold rewards of a run: its start (if the samples tell), then its evaluations.

    A KL estimate below 0, the noise of few samples, counts as 0.
    """
    rows = record.history.reindex(columns=["kl/initial", "gold/reward"]).dropna().to_numpy(float)
    if len(rows) and (initial := record.column("gold_initial")):
        rows = np.vstack([(0, np.mean(initial)), rows])
    return np.sqrt(rows[:, 0].clip(min=0)), rows[:, 1]


def gold_at(distance, gold, where: float) -> float:
    """Gold reward where a path first reaches the distance `where`, interpolated; NaN if it never does."""
    distance = np.asarray(distance, dtype=float)
    after = int(np.argmax(distance >= where))
    if distance[after] < where:
        return np.nan
    before = max(after - 1, 0)
    return float(np.interp(where, distance[[before, after]], np.asarray(gold)[[before, after]]))


def read_all(directory) -> tuple[list[Record], dict[str, ValueError]]:
    """The runs below a directory, and what is wrong with folders that cannot be read as one (just begun,
    damaged): name -> error. ValueError if there is no run."""
    records, left_out = [], {}
    for path in sorted(Path(directory).rglob("recipe.yaml")):
        try:
            records.append(read(path.parent))
        except ValueError as error:
            left_out[path.parent.name] = error
    if not records:
        raise ValueError(f"There is no run below {directory}: the folder of a run holds recipe.yaml, and "
                         "metrics.jsonl with at least a step. Give the folder above your runs.")
    return records, left_out


def evaluations(directory) -> pd.DataFrame:
    """One row for each evaluation of each run below a directory: run, SETTINGS, step, distance, gold.

    A run's first row, at step 0, is the initial policy. ValueError where there is no run, or a damaged one.
    """
    records, left_out = read_all(directory)
    for error in left_out.values():
        raise error
    tables = []
    for record in records:
        distance, gold = frontier(record)
        measured = record.history.reindex(columns=["step", "kl/initial", "gold/reward"]).dropna()
        steps = [0] * (len(gold) - len(measured)) + measured["step"].astype(int).to_list()
        settings = {name: record.recipe[name] for name in SETTINGS}
        table = {"run": record.directory.name, **settings, "step": steps, "distance": distance, "gold": gold}
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)
