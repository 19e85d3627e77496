"""`tralign doctor`: what is installed, what this machine would use, and what would fail."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import psutil

PACKAGES = dict.fromkeys(("torch", "transformers", "peft", "datasets", "accelerate"), "everything") | {
    "bitsandbytes": "tuning=qlora", "tensorboard": "tensorboard=true",
    "ipywidgets": "the notebooks' sliders", "openai": "evaluate --judge llm"}


def examine() -> tuple[dict[str, str], list[str]]:
    """({what was looked at: what was seen}, [what would fail, and what to do about it]). Loads no model."""
    import torch
    from huggingface_hub import constants

    from .worlds import WORLDS, data_directory

    facts, problems = {"python": f"{platform.python_version()} on {platform.system()}"}, []
    for package, users in PACKAGES.items():
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
            problems.append(f"{users} needs {package}: pip install {package}")
    if find_spec("kernels") is not None:
        problems.append("the package `kernels` is installed: bitsandbytes then fetches code. Remove it")

    threads, gpus, cores = torch.get_num_threads(), torch.cuda.device_count(), os.cpu_count()
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        bf16, name = torch.cuda.is_bf16_supported(), torch.cuda.get_device_properties(0).name
        facts["device"] = f"{gpus} x {name}, {free:.1f} of {total:.1f} GiB free"
        facts["dtype=auto"] = "bfloat16 autocast over float32 weights" if bf16 else "float32"
        if not bf16:
            problems.append("this GPU has no bfloat16: dtype=bfloat16 would crawl, dtype=auto takes float32")
        if gpus > 1:
            problems.append("one process uses one GPU; for all: "
                            "torchrun --nproc-per-node=<GPUs> -m tralign_mini.cli train ...")
    else:
        facts |= {"device": f"CPU, {threads} threads", "dtype=auto": "float32"}
        problems.append("no GPU: the embedded worlds run well here, models over 200 M parameters take hours")
        if cores and threads > cores:
            problems.append(f"more threads ({threads}) than cores: set OMP_NUM_THREADS={cores}")
    memory = psutil.virtual_memory()
    facts["memory"] = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    facts["hub"] = "asked only for models and data with a Hub name"
    if constants.is_offline_mode():
        facts["hub"] = "offline (HF_HUB_OFFLINE)"
    for world in WORLDS:
        try:
            folder = data_directory(world)
        except FileNotFoundError as error:
            problems.append(str(error))
            continue
        facts[world] = str(folder)
        wanted = ("model", "train.jsonl.gz", "test.jsonl.gz")
        if missing := ", ".join(name for name in wanted if not (folder / name).exists()):
            problems.append(f"{world}: {missing} missing in {folder}; install the package again")
    return facts, problems
