"""One measurement: train a few steps with our trainer or with TRL's, and note time, memory and losses.

`python -m benchmarks.measure job.json result.json` is a process of its own: the peak of its resident memory,
less what it had before the model was loaded, is what training takes, the optimizer included.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PrinterCallback,
    TrainerCallback,
)

from .floor import matmul_rate
from .workload import as_texts, in_order_of_training, number_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ALPHA, BETA, LEARNING_RATE, MAX_GRAD_NORM, LORA_RANK = 0.6, 0.1, 1e-4, 2.0, 16


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure. side: ours, trl (no gradient checkpointing, `dtype`) or trl-default (its settings)."""

    side: str
    model: str  # a folder
    rows: list[dict]
    batch_size: int
    steps: int
    warmup: int = 1  # of the steps: not timed
    method: str = "dpo"
    tuning: str = "full"
    tau: int | None = None  # None: the reference is fixed
    micro_batch_size: int | None = None  # None: all pairs of a step at once
    dtype: str = "float32"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out. seconds: of a timed step; peak: bytes; logps: (chosen, rejected), first step's means."""

    seconds: float
    peak: int
    losses: list[float]
    logps: tuple[float, float]
    moved: float | None = None  # mean absolute change of the head of a reference with weights of its own
    update_seconds: float | None = None  # of one update of the reference
    rate: float | None = None  # of matrix products, operations a second, between the steps


def run_alone(job: Job, threads: int) -> Result:
    """The measurement in a fresh process with so many threads, on the CPU. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("job.json", "result.json")]
        Path(files[0]).write_text(json.dumps(dataclasses.asdict(job)))
        environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "benchmarks.measure", *files]
        done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{job.side}, {job.tuning}: the process failed.\n{done.stderr[-3000:]}")
        return Result(**json.loads(Path(files[1]).read_text()))


def measure(job: Job, rate=None) -> Result:
    """The measurement in this process, on the GPU if there is one.

    rate: called between the steps of our side, not timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _ours(job, Path(folder), rate) if job.side == "ours" else _trl(job, Path(folder))


class Clock(TrainerCallback):
    """Notes when each optimizer step ends, after the reference has moved, and the peak of memory by then."""

    def __init__(self, rate=None):
        self.before, self.peak, self.rate = memory(), 0, rate
        self.spans, self.rates, self.begin = [], [], time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.spans.append(time.perf_counter() - self.begin)
        self.peak = peak_memory() - self.before
        if self.rate is not None:
            self.rates.append(self.rate())
        control.should_save = False  # a checkpoint is not what is measured
        self.begin = time.perf_counter()

    def result(self, job: Job, lines: list[dict], **more) -> Result:
        """With the mean time of the steps after the warm-up; lines: what was logged, one a step."""
        seconds = statistics.mean(self.spans[job.warmup :])
        rate = statistics.mean(self.rates[job.warmup - 1 :]) if self.rates else None
        scores = "rewards" if job.method == "reward" else "logps"
        first = lines[0][f"{scores}/chosen"], lines[0][f"{scores}/rejected"]
        return Result(seconds, self.peak, [line["loss"] for line in lines], first, rate=rate, **more)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> int:
    """Bytes in use now, on the GPU if there is one, else resident. On a GPU the peak begins anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """The most bytes that were in use at once, so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux hands ru_maxrss down from the process that started this one; VmHWM is our own
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A number of bytes out of /proc/self/status; 0 where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def recipe_of(job: Job, folder: Path):
    """The recipe of a job of ours."""
    from tralign_mini import Recipe

    lengths = {name: max(len(row[name]) for row in job.rows) for name in job.rows[0]}
    moving = {"reference": "soft", "alpha": ALPHA, "tau": job.tau} if job.tau else {"reference": "fixed"}
    return Recipe(
        model=job.model, data="none", method=job.method, beta=BETA, **moving, tuning=job.tuning,
        lora_rank=LORA_RANK, batch_size=job.batch_size, micro_batch_size=job.micro_batch_size,
        max_steps=job.steps, learning_rate=LEARNING_RATE,
        lr_scheduler="constant", max_grad_norm=MAX_GRAD_NORM, dtype=job.dtype, seed=job.seed,
        max_prompt_tokens=lengths["prompt_ids"],
        max_completion_tokens=max(lengths["chosen_ids"], lengths["rejected_ids"]), output=str(folder),
    )


def _ours(job: Job, folder: Path, rate) -> Result:
    from tralign_mini import AlignmentTrainer
    from tralign_mini.models import load_policy
    from tralign_mini.runs import load_reference

    recipe = recipe_of(job, folder)
    tokenizer, clock = _tokenizer(job), Clock(rate)
    policy = load_policy(recipe)
    reference = load_reference(policy, recipe)
    head = _head(reference) if reference and job.tuning == "full" else None
    # without a cache: a fixed reference, too, is computed in every step
    trainer = AlignmentTrainer(policy, reference, job.rows, recipe, tokenizer, folder, cache=None)
    trainer.add_callback(clock)
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    moved = None if head is None else (_head(reference) - head).abs().mean().item()
    return clock.result(job, lines, moved=moved,
                        update_seconds=_update_seconds(reference) if job.tau else None)


def _trl(job: Job, folder: Path) -> Result:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    micro = job.micro_batch_size or job.batch_size
    chosen = {"gradient_checkpointing": False, "bf16": job.dtype == "bfloat16"} if job.side == "trl" else {}
    arguments = DPOConfig(
        output_dir=str(folder), max_steps=job.steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=job.batch_size // micro, train_sampling_strategy="sequential", beta=BETA,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM,
        max_length=None, sync_ref_model=job.tau is not None, ref_model_mixup_alpha=ALPHA,
        ref_model_sync_steps=job.tau or 512, seed=job.seed, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(), logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, **chosen,
    )
    rows = in_order_of_training(job.rows, job.steps, job.batch_size, job.seed)
    tokenizer, clock = _tokenizer(job), Clock()
    adapter = None
    if job.tuning != "full":  # as in our recipes
        adapter = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear",
                             task_type="CAUSAL_LM")
    trainer = DPOTrainer(_trl_policy(job), args=arguments, processing_class=tokenizer, peft_config=adapter,
                         train_dataset=Dataset.from_list([as_texts(row) for row in rows]))
    if any(list(trainer.train_dataset[name]) != [row[name] for row in rows] for name in rows[0]):
        raise RuntimeError("TRL's trainer holds other token ids than ours: nothing could be compared.")
    reference = trainer.ref_model.get_output_embeddings().weight if trainer.ref_model else None
    head = None if reference is None else reference.detach().clone()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    moved = None if head is None else (reference.detach() - head).abs().mean().item()
    return clock.result(job, lines, moved=moved)


def _trl_policy(job: Job):
    """TRL's policy, loaded as ours is: in full always float32, the base of an adapter in the job's dtype."""
    dtype = torch.float32 if job.tuning == "full" else getattr(torch, job.dtype)
    options = {"dtype": dtype}
    if job.tuning == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
        options["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    return AutoModelForCausalLM.from_pretrained(job.model, **options)


def _tokenizer(job: Job):
    return number_tokenizer(AutoConfig.from_pretrained(job.model).vocab_size)


def _head(reference) -> torch.Tensor:
    with reference.using() as module:
        return module.get_output_embeddings().weight.detach().clone()


def _update_seconds(reference, times: int = 5) -> float:
    """Of one update. The first ones fill an adapter's larger rank; from then on each update compresses."""
    seconds = []
    for _ in range(2 * times):
        synchronize()
        start = time.perf_counter()
        reference.update(ALPHA)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[times:])


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # whatever is measured, memory is first looked at with the same modules imported
    import trl.trainer.dpo_trainer  # noqa: F401

    import tralign_mini.models
    import tralign_mini.train  # noqa: F401

    job = Job(**json.loads(job_file.read_text()))
    micro_batch = job.rows[: job.micro_batch_size or job.batch_size]
    tokens = sum(len(ids) for row in micro_batch for ids in row.values())
    rate = partial(matmul_rate, AutoConfig.from_pretrained(job.model), tokens)
    result = measure(job, rate)
    result_file.write_text(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
