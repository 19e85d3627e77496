"""Which rows an optimizer step holds, in which order, and how a micro-batch of them becomes tensors.

An optimizer step always holds the same `batch_size` rows of the seeded order, however they are cut into
micro-batches or spread over processes: tau, the loss average and resuming depend on it.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import torch
from torch.utils.data import Dataset

from .packing import Group, pack
from .recipe import Recipe
from .tokens import collate


class StepStream(Dataset):
    """The rows of a run in the order in which it sees them: `steps * batch_size` of them, epoch after epoch.

    Step s holds the rows s * batch_size ... (s + 1) * batch_size - 1 of this stream. Which rows these are is
    the seed's choice; within the step they stand by length, so that micro-batches hold little padding. For
    KTO each row also gets `mismatched_ids`: a completion of another prompt of the step, for z0.
    """

    def __init__(self, rows: list[dict], recipe: Recipe, steps: int):
        self.rows, self.recipe = rows, recipe
        self.reference_logps: dict[int, list[float]] | None = None  # if it never moves; by row, kto: position
        epochs = range(math.ceil(steps * recipe.batch_size / len(rows)))
        orders = [np.random.default_rng([recipe.seed, epoch]).permutation(len(rows)) for epoch in epochs]
        order = np.concatenate(orders)[: steps * recipe.batch_size]
        lengths = np.array([sum(len(ids) for ids in row.values() if isinstance(ids, list)) for row in rows])
        self.order, self.partners = np.empty_like(order), np.empty_like(order)
        for first in range(0, len(order), recipe.batch_size):
            step = order[first : first + recipe.batch_size]
            by_length = np.argsort(lengths[step], kind="stable")
            here = slice(first, first + recipe.batch_size)
            self.order[here] = step[by_length]
            if recipe.method == "kto":  # partners follow the seeded order: their lengths are independent
                self.partners[here] = self._partners(step, first)[by_length]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict:
        row = self.rows[self.order[position]]
        if self.recipe.method == "kto":
            row = row | {"mismatched_ids": self.rows[self.partners[position]]["completion_ids"]}
        if self.reference_logps is not None:
            known = position if self.recipe.method == "kto" else self.order[position]
            row = row | {"reference_logps": self.reference_logps[known]}
        return row

    def hash(self) -> str:
        """SHA-256 of the tokenized rows: a resumed run has to go on with the same."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()

    def _partners(self, step: np.ndarray, first: int) -> np.ndarray:
        """For each row the next one of the step, round the end, whose prompt is another one."""
        prompts = [self.rows[i]["prompt_ids"] for i in step]
        if all(prompt == prompts[0] for prompt in prompts):
            number = first // self.recipe.batch_size + 1
            raise ValueError(f"method=kto: optimizer step {number} holds a single prompt; z0 needs a "
                             "completion of another one. Take a batch_size of 2 or more, and more prompts.")
        n = len(step)
        return np.array([next(step[k % n] for k in range(i + 1, i + n) if prompts[k % n] != prompts[i])
                         for i in range(n)])


def group_of(row: dict) -> Group:
    """A row's prompt and the completions that can share it: of a pair both, of kto the mismatched one too."""
    names = ("chosen_ids", "rejected_ids", "completion_ids", "mismatched_ids")
    return row["prompt_ids"], [row[name] for name in names if name in row]


def collate_rows(rows: list[dict], method: str, pad_token_id: int, *, hidden_size: int = 0, limit: int = 0,
                 one_pass: bool = True) -> dict:
    """One micro-batch: `sequences` to score, and what the method needs beside them.

    Paired methods: 2B completions, all chosen, then all rejected. SFT: B completions. With a `limit` (of
    `sharing.row_limit`) the two completions of a row share their prompt in packed rows. KTO: with a limit and
    in one pass 2B completions, all matched, then all mismatched; else B matched ones, and beside them
    `mismatched`, and `both`, where they share the prompt, for a pass of the reference. And `desirable`, (B,).
    """
    groups = [group_of(row) for row in rows]
    sequences = [[(prompt, answers[i]) for prompt, answers in groups] for i in range(len(groups[0][1]))]
    packed = {}
    if limit and len(sequences) == 2:
        packed = pack(groups, pad_token_id, hidden_size=hidden_size, limit=limit)
    if method == "kto" and not (packed and one_pass):
        matched, mismatched = (collate(one, pad_token_id) for one in sequences)
        batch = {"sequences": matched, "mismatched": mismatched} | ({"both": packed} if packed else {})
    else:
        batch = {"sequences": packed or collate(sum(sequences, []), pad_token_id)}
    if method == "kto":
        batch["desirable"] = torch.tensor([row["label"] for row in rows])
    if "reference_logps" in rows[0]:  # the first ones of all rows, then the second ones, as in `sequences`
        batch["reference_logps"] = torch.tensor([row["reference_logps"] for row in rows]).T.flatten()
    return batch
