"""Alpha and tau as somebody moved them during a run: kept in changes.jsonl, so that the run can be run again.

One JSON object per change, {"step", "alpha", "tau"}: from optimizer step `step` on (counted from 1) the trust
region is this one; null for a reference that does not move. Before the first change the recipe's holds.
"""

from __future__ import annotations

from pathlib import Path

from .json_lines import append_row, read_rows
from .trust_region import TrustRegion

FILE = "changes.jsonl"


def write_change(directory: Path, step: int, region: TrustRegion) -> None:
    append_row(Path(directory) / FILE, {"step": step, "alpha": region.alpha, "tau": region.tau})


def read_changes(directory: Path) -> list[tuple[int, TrustRegion]]:
    """(step, trust region) of each change, in order; a last line that a kill cut off does not count."""
    rows = read_rows(Path(directory) / FILE)
    return [(row["step"], TrustRegion(row["alpha"], row["tau"])) for row in rows]


def region_at(changes: list[tuple[int, TrustRegion]], step: int, start: TrustRegion) -> TrustRegion:
    """The trust region that holds at `step`: the last change up to it, or `start`."""
    return next((region for at, region in reversed(changes) if at <= step), start)
