"""Alpha and tau as somebody moved them during a run: kept in changes.jsonl, so that the run can be run again.

One JSON object per change, {"step", "alpha", "tau"}: from optimizer step `step` on (counted from 1) the trust
region is this one; null for a reference that does not move. Before the first change the recipe's holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .trust_region import TrustRegion

FILE = "changes.jsonl"


def write_change(directory: Path, step: int, region: TrustRegion) -> None:
    """Append a change; it holds from optimizer step `step` on."""
    with open(Path(directory) / FILE, "a") as file:
        file.write(json.dumps({"step": step, "alpha": region.alpha, "tau": region.tau}) + "\n")


def read_changes(directory: Path) -> list[tuple[int, TrustRegion]]:
    """(step, trust region) of each change, in order; a last line that a kill cut off does not count."""
    path = Path(directory) / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["step"], TrustRegion(row["alpha"], row["tau"])) for row in rows]


def region_at(changes: list[tuple[int, TrustRegion]], step: int, start: TrustRegion) -> TrustRegion:
    """The trust region that holds at `step`: the last change up to it, or `start`."""
    return next((region for at, region in reversed(changes) if at <= step), start)


def rewind_changes(directory: Path, step: int) -> None:
    """Drop what was changed after `step`: a resumed run goes on from there."""
    kept = [change for change in read_changes(directory) if change[0] <= step]
    path = Path(directory) / FILE
    if path.exists():
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(
            json.dumps({"step": at, "alpha": region.alpha, "tau": region.tau}) + "\n" for at, region in kept))
        os.replace(scratch, path)
