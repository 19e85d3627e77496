"""Reference log-probs of a fixed reference: computed once, kept on disk, used again by every run they fit.

A reference that never moves gives the same numbers in every epoch, for every beta, learning rate and seed.
They are kept under a key of everything that they depend on: the start's weights (adapter and 4-bit codes
included), precision, mean or sum, and the token ids. How many rows were computed at once changes rounding
alone (1e-7 of a log-prob in float32, 1e-4 in bfloat16). A *moving* reference never comes here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm


def cache_directory() -> Path:
    """Where the numbers are kept: $TRALIGN_CACHE, or tralign_mini in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRALIGN_CACHE") or Path(base, "tralign_mini"))


def cached_logps(directory: Path, rows: list[dict], conditions: dict, compute: Callable, at_once: int,
                 *, main: bool = True) -> list[list[float]]:
    """For each row the reference's log-probs of its completions, from the directory or computed and kept.

    conditions: what the numbers depend on beside the rows. compute: rows -> (len(rows), k) tensor, called
    with `at_once` rows of similar length; which ones depends on the set of rows alone, so that the same run
    gets the same bits again. main: whether this process writes and speaks.
    """
    keys = [json.dumps(row, sort_keys=True) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (len(keys[i]), keys[i]))
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode())
    for i in order:
        digest.update(keys[i].encode())
    path = Path(directory) / f"reference-{digest.hexdigest()[:32]}.safetensors"
    logps = _read(path, len(rows))
    if logps is None:
        parts = [order[first : first + at_once] for first in range(0, len(order), at_once)]
        shown = tqdm(parts, desc="reference log-probs, once", disable=not main)
        logps = torch.cat([compute([rows[i] for i in part]).float().cpu() for part in shown])
        if main:
            _write(path, logps)
    elif main:
        print(f"reference log-probs of {len(rows):,} rows read from {path}", flush=True)
    found: list[list[float]] = [[]] * len(rows)
    for i, values in zip(order, logps.tolist()):
        found[i] = values
    return found


def _read(path: Path, rows: int) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            logps, digest = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
        if digest != _hash(logps) or len(logps) != rows or not logps.isfinite().all():
            raise ValueError("its numbers are not those that were computed")
    except (SafetensorError, OSError, ValueError) as error:
        print(f"{path} cannot be used ({error}): the reference log-probs are computed again", flush=True)
        return None
    return logps


def _hash(logps: torch.Tensor) -> str:
    return hashlib.sha256(logps.contiguous().numpy().tobytes()).hexdigest()


def _write(path: Path, logps: torch.Tensor) -> None:
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": logps}, scratch, {"sha256": _hash(logps)})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:  # what safetensors raises where it cannot write
        print(f"reference log-probs are not kept for the next run: {error}. Set TRALIGN_CACHE to a folder "
              "that can be written.", flush=True)
