"""Execute the notebooks from top to bottom and store what they show.

    python notebooks/run_all.py           all of them, at full scale: the outputs that a reader sees
    python notebooks/run_all.py 00 02     only these

A hash of the code goes into the notebook's metadata, so that a test notices outputs older than their code.
The setup cell of 00 is copied into all others first: the repository's address has one place.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SCALE = "TRALIGN_NOTEBOOK_SCALE"  # "small": the tests' quick pass
WIDGET = "application/vnd.jupyter.widget-view+json"
SLOWEST_CELL = 1200  # seconds


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook) -> str:
    """Of all code but the setup cell, which installs and imports: another address makes no output stale."""
    sources = [cell.source for cell in code_cells(notebook)[1:]]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute(notebook, folder: Path, *, small: bool = False) -> None:
    """Run all cells in `folder`, in place, with the package of this checkout; raises if a cell does."""
    env = {name: value for name, value in os.environ.items() if name != SCALE}
    env["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), *filter(None, [env.get("PYTHONPATH")])])
    env.setdefault("OMP_NUM_THREADS", "1")  # sums in one order: the numbers that the prose reads come again
    env |= {"HF_HUB_OFFLINE": "1", "TRALIGN_CACHE": "cache"} | ({SCALE: "small"} if small else {})
    client = NotebookClient(
        notebook, timeout=SLOWEST_CELL, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
        store_widget_state=False, coalesce_streams=True, record_timing=False)
    client.execute(env=env)


def keep_what_can_be_read(notebook) -> None:
    """Without a kernel a widget is blank: its picture stays, and of a progress bar nothing does."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                del output.data[WIDGET]
                if output.data.keys() == {"text/plain"}:
                    output.data.clear()
        cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
        cell.metadata.pop("execution", None)


def run(path: Path, setup: str) -> None:
    """Execute one notebook at full scale and write it back."""
    notebook = nbformat.read(path, as_version=4)
    code_cells(notebook)[0].source = setup
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    keep_what_can_be_read(notebook)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["tralign"] = {"executed": code_hash(notebook)}
    nbformat.write(notebook, path)


def main(wanted: list[str]) -> None:
    paths = notebooks()
    setup = code_cells(nbformat.read(paths[0], as_version=4))[0].source
    if unknown := [name for name in wanted if not any(path.name.startswith(name) for path in paths)]:
        names = ", ".join(path.name for path in paths)
        sys.exit(f"no notebook begins with {', '.join(unknown)}; there are {names}")
    for path in paths:
        if not wanted or path.name.startswith(tuple(wanted)):
            start = time.perf_counter()
            run(path, setup)
            print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
