"""`tralign doctor`: what is installed, what this machine would use, and what would fail."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import psutil

NEEDED = ("torch", "transformers", "peft", "datasets", "accelerate")
OPTIONAL = {
    "bitsandbytes": "tuning=qlora",
    "tensorboard": "tensorboard=true",
    "ipywidgets": "the notebooks' sliders",
    "openai": "evaluate --judge llm",
}


class Findings(NamedTuple):
    """facts: what was seen, by name; problems: what would fail or surprise, with what to do about it."""

    facts: dict[str, str]
    problems: list[str]


def examine() -> Findings:
    """Look at Python, packages, device, precision, memory and the embedded data. Loads no model."""
    import torch

    from .worlds import WORLDS, data_directory

    facts, problems = {"python": f"{platform.python_version()} on {platform.system()}"}, []
    for package in (*NEEDED, *OPTIONAL):
        found = _version(package)
        facts[package] = found or "not installed"
        if not found:
            problems.append(f"{OPTIONAL.get(package, 'everything')} needs {package}: pip install {package}")
    if find_spec("kernels") is not None:
        problems.append("the package `kernels` is installed: bitsandbytes then fetches code. Remove it")

    threads, gpus, cores = torch.get_num_threads(), torch.cuda.device_count(), os.cpu_count()
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        name = torch.cuda.get_device_properties(0).name
        facts["device"] = f"{gpus} x {name}, {free:.1f} of {total:.1f} GiB free"
        bf16 = torch.cuda.is_bf16_supported()
        facts["dtype=auto"] = "bfloat16 autocast over float32 weights" if bf16 else "float32"
        if not bf16:
            problems.append(
                "this GPU has no bfloat16: dtype=bfloat16 would fail or crawl; dtype=auto takes float32"
            )
        if gpus > 1:
            torchrun = "torchrun --nproc-per-node=<GPUs> -m tralign_mini.cli train ..."
            problems.append(f"one process uses one GPU; for all: {torchrun}")
    else:
        facts |= {"device": f"CPU, {threads} threads", "dtype=auto": "float32"}
        problems.append(
            "no GPU: the embedded worlds run well here; models over about 200 M parameters would take hours"
        )
        if cores and threads > cores:
            problems.append(f"more threads ({threads}) than cores: set OMP_NUM_THREADS={cores}")
    facts["memory"] = _memory()

    switches = [os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    offline = not {"1", "TRUE", "YES", "ON"}.isdisjoint(switches)
    facts["hub"] = "offline (HF_HUB_OFFLINE)" if offline else "asked only for models and data with a Hub name"
    for world in WORLDS:
        try:
            folder = data_directory(world)
        except FileNotFoundError as error:
            problems.append(str(error))
            continue
        facts[world] = str(folder)
        wanted = ("model", "train.jsonl.gz", "test.jsonl.gz")
        missing = ", ".join(name for name in wanted if not (folder / name).exists())
        if missing:
            problems.append(f"{world}: {missing} missing in {folder}; install the package again")
    return Findings(facts, problems)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
