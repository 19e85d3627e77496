"""Ours with a moving and with a fixed reference, and TRL, on a CUDA GPU: Pythia's shapes, random weights.

    python -m benchmarks.on_cuda --sizes 1b 2.8b               # within ten minutes, or says what it left out
    python -m benchmarks.on_cuda --sizes 12b --modes qlora

In bfloat16: `qlora` on an NF4 base, `lora`, and `full` (autocast over float32 weights) where it fits. Before
that, shared prompts are checked against whole sequences on this GPU, with SDPA and with FlexAttention, and
each run of ours begins by trying which of them is faster. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tralign_mini import flex

from .measure import Job, measure
from .sides import MODES, SPEED, TAU, WARMUP, Side, check, sides, speed_lines
from .table import machine, table
from .workload import PAD, PYTHIA, SHAPES, Workload, neox_config, random_rows, save_model

FULL_BYTES = 20  # a weight: itself, its gradient, two moments, its copy in the reference; all float32


def reason_to_skip() -> str:
    """Why nothing can be measured here, or ""."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name()} has no bfloat16"
    return ""


def exactness(device: str, config=None, *, flex_attention=False, seed=0) -> list[tuple[str, float, float]]:
    """Shared prompts against whole sequences: (what, relative difference, the most that is allowed).

    In float32 (no TF32), log-probs to 1e-5 and gradients to 1e-4. Under bfloat16 autocast both ways have
    rounding: shared prompts may be 1.5 times as far from float32 as whole sequences are.
    """
    from transformers import AutoModelForCausalLM

    from tralign_mini.attention import set_flex
    from tralign_mini.data import collate
    from tralign_mini.logprobs import completion_logps, plain_completion_logps
    from tralign_mini.packing import pack

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(seed)
    config = config or neox_config("70m", initializer_range=0.05)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).train()
    rows = random_rows(SHAPES["hh"], 8, config.vocab_size, seed)
    groups = [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    sequences = [(prompt, answers[k]) for k in range(2) for prompt, answers in groups]
    shared = pack(groups, PAD, hidden_size=config.hidden_size, limit=512)
    ways = {"whole": (plain_completion_logps, collate(sequences, PAD)), "shared": (completion_logps, shared)}
    set_flex([model], flex_attention)  # for packed rows

    def values(way: str, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
        function, batch = ways[way]
        model.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logps = function(model, {name: tensor.to(device) for name, tensor in batch.items()})
        chosen, rejected = logps.chunk(2)
        torch.nn.functional.softplus(rejected - chosen).sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, lines = values("whole", False), []
    distances = {(way, bf16): [((a - b).norm() / b.norm()).item() for a, b in zip(values(way, bf16), exact)]
                 for way, bf16 in (("shared", False), ("shared", True), ("whole", True))}
    for i, (name, allowed) in enumerate((("log-probs", 1e-5), ("gradients", 1e-4))):
        lines.append((f"{name}, float32", distances["shared", False][i], allowed))
        lines.append((f"{name}, bfloat16", distances["shared", True][i], 1.5 * distances["whole", True][i]))
    return lines


def compare(work: Workload, mode: str, deadline: float, notes: list[str]) -> list[Side]:
    """The sides of a mode that could be measured; the others leave a note. RuntimeError as in `check`."""
    steps = len(work.rows) // work.pairs
    measured = []
    for side in sides("bf16" if mode == "full" else mode):
        where = f"{work.name}, {mode}, {side.label}"
        if time.monotonic() > deadline:
            notes.append(f"{where}: left out, the time is up.")
            continue
        if side.job["side"] == "trl" and importlib.util.find_spec("trl") is None:
            notes.append(f"{where}: left out, TRL is not installed.")
            continue
        job = Job(model=work.model, rows=work.rows, batch_size=work.pairs, steps=steps, warmup=WARMUP,
                  **side.job | {"dtype": "bfloat16"})
        try:
            result = measure(job)
        except torch.cuda.OutOfMemoryError:
            notes.append(f"{where}: out of memory.")
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        update = f", an update {1000 * result.update_seconds:.1f} ms" if result.update_seconds else ""
        print(f"{where}: {work.pairs / result.seconds:.2f} pairs/s, {result.peak / 2**30:.1f} GiB{update}",
              file=sys.stderr, flush=True)
        side.results.append(result)
        measured.append(side)
        check(measured[0].results[0], result, where)
    return measured if measured and measured[0].label == "ours" else []


def why_not(size: str, mode: str, folder: str) -> str:
    """Why this size cannot be trained here in this mode, or ""."""
    config = neox_config(size)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    weights = 12 * config.num_hidden_layers * hidden**2 + 2 * vocabulary * hidden
    memory, disk = torch.cuda.get_device_properties(0).total_memory, shutil.disk_usage(folder).free
    if mode == "full" and FULL_BYTES * weights > 0.9 * memory:
        return f"all weights need {FULL_BYTES * weights / 2**30:.0f} GiB"
    if 2.2 * weights > disk:
        return f"its weights need {2 * weights / 2**30:.0f} GiB of disk"
    if mode == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return ""


def report(sizes, modes, *, pairs: int, steps: int, minutes: float, markdown: bool) -> str:
    """Everything that was asked for, measured; the text to print."""
    flex.LONG, deadline, lines, notes = 0, time.monotonic() + 60 * minutes, [], []  # short runs try it, too
    shape = dataclasses.replace(SHAPES["tldr"], pairs=pairs)
    for what, found, allowed in exactness("cuda"):
        notes.append(f"shared prompts, {what}: off by {found:.1e} (allowed: {allowed:.1e}).")
        if not found <= allowed:
            raise RuntimeError(f"on this GPU the engine is wrong, so it is not measured. {notes[-1]}")
    try:
        notes += [f"the same with FlexAttention, {what}: off by {found:.1e} (allowed: {allowed:.1e})."
                  for what, found, allowed in exactness("cuda", flex_attention=True)]
    except Exception as error:  # training falls back to SDPA then
        reason = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(f"FlexAttention fails here: {reason}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for mode in modes:
                if reason := why_not(size, mode, folder):
                    notes.append(f"{size}, {mode}: left out, {reason}.")
                    continue
                config, model = neox_config(size), Path(folder, "model")
                if not model.exists():
                    save_model(config, model, dtype=torch.bfloat16, device="cuda")
                rows = random_rows(shape, (WARMUP + steps) * pairs, config.vocab_size)
                work = Workload(size, str(model), rows, pairs)
                measured = compare(work, mode, deadline, notes)
                lines += speed_lines(work, mode, measured) if measured else []
    gpu = torch.cuda.get_device_properties(0)
    settings = (f"bfloat16 (full: autocast), {pairs} pairs of {shape.prompt} + {shape.completion} tokens, "
                f"{WARMUP} + {steps} steps, the reference moves every {TAU}")
    return "\n".join([f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; {machine()}", settings, "",
                      table(["model", *SPEED[1:]], lines, left=3, markdown=markdown), "", *notes])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_cuda", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=PYTHIA, default=["1b", "2.8b"])
    parser.add_argument("--modes", nargs="+", choices=[mode for mode in MODES if mode != "bf16"],
                        default=["qlora", "lora", "full"])
    parser.add_argument("--pairs", type=int, default=8, help="of an optimizer step (default: 8)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run (default: 6)")
    parser.add_argument("--minutes", type=float, default=8, help="nothing is begun after that (default: 8)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = vars(parser.parse_args(arguments))
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL refuses several GPUs in one process
    if reason := reason_to_skip():
        print(f"skipped: {reason}. This benchmark measures bfloat16 and 4-bit training on a CUDA GPU.")
        return 0
    print(report(options.pop("sizes"), options.pop("modes"), **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
