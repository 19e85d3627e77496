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

from .data import collate
from .recipe import Recipe

PAIRED = ("dpo", "ipo", "orpo", "simpo")


class StepStream(Dataset):
    """The rows of a run in the order in which it sees them: `steps * batch_size` of them, epoch after epoch.

    Step s holds the rows s * batch_size ... (s + 1) * batch_size - 1 of this stream, whatever the micro-batch
    size and the number of processes. Which rows these are is the seed's choice; within the step they stand by
    length, so that micro-batches hold little padding. For KTO each row also gets `mismatched_ids`: a
    completion that belongs to another prompt of the same step, for the reference point z0.
    """

    def __init__(self, rows: list[dict], recipe: Recipe, steps: int):
        self.rows, self.recipe = rows, recipe
        epochs = math.ceil(steps * recipe.batch_size / len(rows))
        order = [
            np.random.default_rng([recipe.seed, epoch]).permutation(len(rows)) for epoch in range(epochs)
        ]
        order = np.concatenate(order)[: steps * recipe.batch_size]
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
        if self.recipe.method != "kto":
            return row
        return {**row, "mismatched_ids": self.rows[self.partners[position]]["completion_ids"]}

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
            raise ValueError(
                f"method=kto: optimizer step {first // self.recipe.batch_size + 1} holds a single prompt, "
                "so no completion of another prompt is there for the reference point z0. "
                "Use a batch_size of at least 2 (better 8), and data with more than one prompt."
            )
        n = len(step)
        return np.array(
            [next(step[k % n] for k in range(i + 1, i + n) if prompts[k % n] != prompts[i]) for i in range(n)]
        )


def collate_rows(rows: list[dict], method: str, pad_token_id: int) -> dict:
    """One micro-batch: `sequences` to score, and what the method needs beside them.

    Paired methods: 2B sequences, all chosen, then all rejected. KTO: B sequences, `desirable` (B,), and
    `mismatched`, the same prompts with completions of other prompts. SFT: B sequences.
    """
    if method in PAIRED:
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        return {"sequences": collate(pairs, pad_token_id)}
    batch = {"sequences": collate([(row["prompt_ids"], row["completion_ids"]) for row in rows], pad_token_id)}
    if method == "kto":
        batch["desirable"] = torch.tensor([row["label"] for row in rows])
        batch["mismatched"] = collate(
            [(row["prompt_ids"], row["mismatched_ids"]) for row in rows], pad_token_id
        )
    return batch
