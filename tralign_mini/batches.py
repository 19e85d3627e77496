"""Which rows an optimizer step holds, in which order, and how a micro-batch of them becomes tensors.

An optimizer step always holds the same `batch_size` rows of the seeded order, however they are cut into micro-batches
or spread over processes: tau, the loss average and resuming depend on it.
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

    Step s holds the rows s * batch_size ... (s + 1) * batch_size - 1 of this stream, whatever the micro-batch size and
    the number of processes. For KTO each row also gets `mismatched_ids`: a completion that belongs to another prompt
    of the same step, for the reference point z0.
    """

    def __init__(self, rows: list[dict], recipe: Recipe, steps: int):
        self.rows, self.recipe = rows, recipe
        epochs = math.ceil(steps * recipe.batch_size / len(rows))
        order = [np.random.default_rng([recipe.seed, epoch]).permutation(len(rows)) for epoch in range(epochs)]
        self.order = np.concatenate(order)[: steps * recipe.batch_size]
        if recipe.method == "kto":
            self._refuse_single_prompt_steps()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict:
        row = self.rows[self.order[position]]
        if self.recipe.method != "kto":
            return row
        return {**row, "mismatched_ids": self.rows[self._partner(position)]["completion_ids"]}

    def hash(self) -> str:
        """SHA-256 of the tokenized rows: a resumed run has to go on with the same."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()

    def _step(self, position: int) -> np.ndarray:
        first = position // self.recipe.batch_size * self.recipe.batch_size
        return self.order[first : first + self.recipe.batch_size]

    def _partner(self, position: int) -> int | None:
        """The next row of the same step, round the end, whose prompt is another one."""
        prompt = self.rows[self.order[position]]["prompt_ids"]
        step, offset = self._step(position), position % self.recipe.batch_size
        for candidate in np.roll(step, -offset - 1):
            if self.rows[candidate]["prompt_ids"] != prompt:
                return int(candidate)
        return None

    def _refuse_single_prompt_steps(self) -> None:
        for first in range(0, len(self.order), self.recipe.batch_size):
            if self._partner(first) is None:
                raise ValueError(
                    f"method=kto: optimizer step {first // self.recipe.batch_size + 1} holds a single prompt, so no "
                    "completion of another prompt is there for the reference point z0. Use a batch_size of at least 2 "
                    "(better 8), and data with more than one prompt."
                )


def collate_rows(rows: list[dict], method: str, pad_token_id: int) -> dict:
    """One micro-batch: `sequences` to score, and what the method needs beside them.

    Paired methods: 2B sequences, all chosen, then all rejected. KTO: B sequences, `desirable` (B,), and `mismatched`,
    the same prompts with completions of other prompts. SFT: B sequences.
    """
    if method in PAIRED:
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        return {"sequences": collate(pairs, pad_token_id)}
    batch = {"sequences": collate([(row["prompt_ids"], row["completion_ids"]) for row in rows], pad_token_id)}
    if method == "kto":
        batch["desirable"] = torch.tensor([row["label"] for row in rows])
        batch["mismatched"] = collate([(row["prompt_ids"], row["mismatched_ids"]) for row in rows], pad_token_id)
    return batch
