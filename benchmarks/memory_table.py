"""The peak memory that `tralign doctor --recipe` predicts, beside what fresh processes measure, on the CPU.

    python -m benchmarks.memory_table                  # all rows: about 10 minutes on two cores
    python -m benchmarks.memory_table --shapes tldr --modes full qlora --markdown

Predicted is the larger of the moments that a measured process goes through: the check of shared prompts and
the training steps, over the rows it trains on. Other programs on the machine do not matter.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from tralign_mini.memory import predict

from .measure import Job, recipe_of, run_alone
from .sides import TAU
from .table import machine, table
from .workload import SHAPES, workload

MODES = {"full": {"tau": TAU}, "full, fixed reference": {}, "lora": {"tau": TAU, "tuning": "lora"},
         "qlora": {"tau": TAU, "tuning": "qlora"}, "reward": {"method": "reward"}}
HEADER = ["pairs", "mode", "predicted MB", "measured MB", "predicted / measured"]


def line(shape: str, mode: str, steps: int, threads: int) -> list[str]:
    """One line of the table, predicted and then measured."""
    with tempfile.TemporaryDirectory() as folder:
        work = workload(shape, steps, folder)
        job = Job("ours", work.model, work.rows, work.pairs, steps, micro_batch_size=work.micro,
                  **MODES[mode])
        moments = predict(recipe_of(job, folder), work.rows).moments
        moments.popitem()  # the last one is the evaluation: a benchmark has none
        predicted = max(sum(parts.values()) for parts in moments.values())
        measured = run_alone(job, threads).peak
    sizes = [f"{size / 2**20:.0f}" for size in (predicted, measured)]
    cells = [shape, mode, *sizes, f"{predicted / measured:.2f}"]
    print("  ".join(cells), file=sys.stderr, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=5, help="of a measured process (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of a measured process (default: 1)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    asked = parser.parse_args()
    lines = [line(shape, mode, asked.steps, asked.threads) for shape in asked.shapes for mode in asked.modes]
    command = " ".join(["python -m benchmarks.memory_table", *sys.argv[1:]])
    print(f"`{command}`\n\n{machine()}\n\n{asked.threads} thread(s), {asked.steps} steps; float32.\n")
    print(table(HEADER, lines, left=2, markdown=asked.markdown))


if __name__ == "__main__":
    main()
