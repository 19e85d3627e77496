"""Files with a JSON object a line: what a run writes while it goes on, and what is read of it later."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """The objects, none without a file; of a last line that a kill cut off none. ValueError for bad lines."""
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): the file was damaged. "
                             "Restore it, or remove this line.") from None
    return rows


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    """Write the file anew, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(_line(row) for row in rows), encoding="utf-8")
    os.replace(scratch, path)
    return path


def drop_after(path: Path, step: int) -> None:
    """Drop the rows of later steps, if there is a file: a resumed run goes on from there."""
    if path.is_file():
        write_rows(path, [row for row in read_rows(path) if row["step"] <= step])


def append_row(path: Path, row: dict) -> None:
    """Add a line to the file, which is made with its folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
