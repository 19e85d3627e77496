"""Ours and TRL's DPOTrainer on the same weights, pairs, batches and optimizer, in turns, on the CPU.

    python -m benchmarks.against_trl                    # everything: about 35 minutes on two cores
    python -m benchmarks.against_trl --shapes tldr hh --modes full
    python -m benchmarks.against_trl --markdown         # the tables as benchmarks/README.md has them

Each measurement is a fresh process of a few steps, the first ones not timed; both sides alternate, and a
ratio is the median over pairs of neighbouring runs, with its range. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile

from .floor import step_flops
from .measure import ALPHA, Job, run_alone
from .sides import MODES, SPEED, TAU, WARMUP, Side, check, sides, speed_lines
from .table import machine, table
from .workload import NAMES, SPREAD, Workload, in_order_of_training, workload


def compare(work: Workload, mode: str, steps: int, repeats: int, threads: int) -> list[Side]:
    """All sides of a mode, measured in turns. RuntimeError if they did not do the same."""
    rows = sides(mode)
    for repeat in range(repeats):
        for side in rows[::-1] if repeat % 2 else rows:
            if side.once and repeat:
                continue
            job = Job(model=work.model, rows=work.rows, batch_size=work.pairs, steps=steps, warmup=WARMUP,
                      micro_batch_size=work.micro, **side.job)
            result = run_alone(job, threads)
            side.results.append(result)
            print(f"{work.name}, {mode}, {side.label}: {result.seconds:.2f} s a step, "
                  f"{result.peak / 2**20:.0f} MB", file=sys.stderr, flush=True)
            check(rows[0].results[0], result, f"{work.name}, {mode}, {side.label}")
    return rows


LIMITS = ["pairs", "mode", "floor, s a step", "ours, s a step", "of the floor's rate", "an update, ms",
          "of a step at tau 16", "at tau 64"]


def limit_row(name: str, mode: str, flops: float, ours: Side) -> list[str]:
    """How near ours comes to the floor, and what the update of the reference costs; flops: of a step.

    Each run has a floor of its own, by the rate that its process found.
    """
    floors, seconds, updates = zip(*((flops / result.rate, result.seconds, result.update_seconds)
                                     for result in ours.results))
    shares = [floor / second for floor, second in zip(floors, seconds)]
    floor, second, update, share = map(statistics.median, (floors, seconds, updates, shares))
    return [name, mode, f"{floor:.2g}", f"{second:.2g}", f"{share:.0%} ({min(shares):.0%}-{max(shares):.0%})",
            f"{1000 * update:.1f}", f"{update / second / 16:.2%}", f"{update / second / 64:.2%}"]


def report(shapes, modes, *, repeats: int, steps: int, threads: int, markdown: bool) -> str:
    """Everything that was asked for, measured; the text to print."""
    from transformers import AutoConfig

    speed, limits, notes, rates = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in shapes:
            try:
                work = workload(name, WARMUP + steps, folder)
            except FileNotFoundError as error:
                notes.append(f"{name} is left out: {error}.")
                continue
            config = AutoConfig.from_pretrained(work.model)
            timed = in_order_of_training(work.rows, WARMUP + steps, work.pairs)[WARMUP * work.pairs :]
            for mode in modes or (MODES if name == "tldr" else ["full"]):
                if mode == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
                    notes.append("qlora is left out: bitsandbytes is not installed.")
                    continue
                rows = compare(work, mode, WARMUP + steps, repeats, threads)
                speed += speed_lines(work, mode, rows)
                if mode != "bf16":  # the floor is one of float32 products
                    tuning = rows[0].job.get("tuning", "full")
                    limits.append(limit_row(name, mode, step_flops(timed, config, tuning) / steps, rows[0]))
                    rates += [result.rate / 1e9 for result in rows[0].results]
    command = " ".join(["python -m benchmarks.against_trl", *sys.argv[1:]])
    return "\n".join([
        f"`{command}`" if markdown else command, "", machine(), "",
        f"{threads} threads, {repeats} repeats of {WARMUP} + {steps} steps; lengths spread by {SPREAD:.0%}; "
        f"the reference moves by {ALPHA} every {TAU} steps.",
        "Modes: " + "; ".join(f"{mode}: {text}" for mode, text in MODES.items()) + ".", "",
        table(SPEED, speed, left=3, markdown=markdown), "",
        f"The floor is float32 products at {min(rates, default=0):.0f} to {max(rates, default=0):.0f} "
        "GFLOP/s, the rate of the best shape in each process, between its steps.", "",
        table(LIMITS, limits, left=2, markdown=markdown), *notes])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_trl", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES, help="pairs (default: all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all for tldr, else full")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of a measured process (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = vars(parser.parse_args())
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed, so there is nothing to compare with: pip install -e '.[dev,quant]'")
        return 1
    if os.getloadavg()[0] > 0.5:
        print("Something else is running on this machine: times will be off.", file=sys.stderr)
    print(report(arguments.pop("shapes"), arguments.pop("modes"), **arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
