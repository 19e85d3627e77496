"""Training with a moving reference policy: a `transformers.Trainer` whose reference follows the policy.

TR-DPO, TR-IPO and TR-KTO (arXiv 2404.09656) are DPO, IPO and KTO with one more line: after an optimizer step
that is due, reference <- alpha * policy + (1 - alpha) * reference. `TrustRegionCallback` is that line; the
rest of this file makes an optimizer step mean the same thing however it is cut into micro-batches and
spread over processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import losses
from .batches import StepStream, collate_rows
from .callbacks import Progress, StopCallback
from .checkpoint import read_seal, restore_policy, save_policy, start_hash, weight_hash, write_seal
from .logprobs import CompletionScorer, completion_logps
from .models import compute_dtype, this_process
from .recipe import Recipe


class TrustRegionCallback(TrainerCallback):
    """Moves the reference after the optimizer step whenever the trust region says so (arXiv 2404.09656)."""

    def __init__(self, trainer: AlignmentTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.trust_region.is_due(state.global_step):
            trainer.update_numbers = trainer.reference.update(trainer.trust_region.alpha)
            trainer.reference_updates += 1


class AlignmentTrainer(Trainer):
    """Preference training of `policy` against `reference`.

    policy: causal language model or `PeftModel`; reference: `FrozenReference`, `AdapterReference`, or None
    for the methods without one. rows: from `data.prepare`. evaluate: called as `evaluate(trainer, step)`
    every `eval_steps` on the main process, returns numbers for the step's row. One row a step goes to
    `directory/metrics.jsonl`.
    """

    # The loss is divided by the whole step's batch_size; Trainer must not divide by the accumulation again.
    loss_is_scaled_for_ga = True

    def __init__(
        self, policy, reference, rows, recipe: Recipe, tokenizer, directory, *, evaluate=None, stop=None
    ):
        self.policy, self.reference, self.recipe = policy, reference, recipe
        self.directory, self.evaluator = Path(directory), evaluate
        self.trust_region = recipe.trust_region()
        self.reference_updates, self.update_numbers = 0, {}
        self.average = recipe.logps == "mean"
        self.stream = StepStream(rows, recipe, recipe.plan(len(rows)).steps)
        self.start = {"model": start_hash(policy), "data": self.stream.hash()}
        super().__init__(
            model=CompletionScorer(policy, average=self.average),
            args=training_arguments(recipe, self.directory, len(self.stream) // recipe.batch_size),
            train_dataset=self.stream,
            data_collator=lambda rows: collate_rows(rows, recipe.method, tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=[TrustRegionCallback(self)] + ([StopCallback(stop)] if stop else []),
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed are not supported yet: a sharded reference would have to be moved "
                "shard by shard. Use one process, or several with DistributedDataParallel (torchrun), or "
                "tuning=qlora for memory."
            )
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])
        self._last_row, self._clock = 0, time.perf_counter()
        self.progress, self._tensorboard = Progress(), None
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)

    # The loss.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All micro-batches of one optimizer step, each with what has to be known about the whole step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if self.recipe.method == "kto":
            kl = self._reference_point(batches)
            for batch in batches:
                batch["kl"] = kl
                del batch["mismatched"]
        elif self.recipe.method == "sft":
            tokens = torch.stack([batch["sequences"]["completion_mask"].sum() for batch in batches]).sum()
            tokens = self.accelerator.reduce(tokens, "sum")
            for batch in batches:
                batch["step_tokens"] = tokens
        return batches, None

    def _reference_point(self, batches: list[dict]) -> torch.Tensor:
        """KTO's z0: the mean log-ratio on mismatched completions over the whole step, clamped at 0, detached.

        One pass without gradient over the step, gathered over processes before the clamp (arXiv 2402.01306).
        """
        total = torch.zeros(2, device=self.args.device)
        for batch in batches:
            policy_logps = self._without_gradient(self.policy, batch["mismatched"])
            ratio = policy_logps - self._reference_logps(batch["mismatched"])
            total += torch.stack([ratio.sum(), torch.tensor(float(len(ratio)), device=ratio.device)])
        total = self.accelerator.reduce(total, "sum")
        kl = (total[0] / total[1]).clamp(min=0)
        self._sums["kto/z0"] = [kl.item(), 1.0]
        return kl

    @torch.no_grad()
    def _without_gradient(self, model, sequences) -> torch.Tensor:
        training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return completion_logps(model, sequences, average=self.average)
        finally:
            model.train(training)

    def _reference_logps(self, sequences) -> torch.Tensor:
        with self.reference.using() as reference, self.accelerator.autocast():
            return completion_logps(reference, sequences, average=self.average)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch: its sum over pairs, divided by the pairs of the whole step."""
        recipe, sequences = self.recipe, inputs["sequences"]
        logps = model(**sequences)  # the wrapped module's forward: what DDP hooks on to
        reference_logps = self._reference_logps(sequences) if self.reference is not None else None
        if recipe.method == "sft":
            loss = self._sft_loss(logps, inputs)
        elif recipe.method == "kto":
            loss = self._kto_loss(logps, reference_logps, inputs) / recipe.batch_size
        else:
            loss = self._paired_loss(logps, reference_logps) / recipe.batch_size
        return loss * self.args.world_size  # DDP averages gradients over processes; the step's loss is a sum

    def _paired_loss(self, logps, reference_logps):
        recipe = self.recipe
        chosen, rejected = logps.chunk(2)
        if reference_logps is None:
            margin = {"gamma": recipe.simpo_gamma} if recipe.method == "simpo" else {}
            loss_function = getattr(losses, f"{recipe.method}_loss")
            result = loss_function(chosen, rejected, beta=recipe.beta, **margin)
        else:
            reference_chosen, reference_rejected = reference_logps.chunk(2)
            smoothing = {"label_smoothing": recipe.label_smoothing} if recipe.method == "dpo" else {}
            result = getattr(losses, f"{recipe.method}_loss")(
                chosen, rejected, reference_chosen, reference_rejected, beta=recipe.beta, **smoothing
            )
            self._count("logratio/chosen", chosen - reference_chosen)
            self._count("logratio/rejected", rejected - reference_rejected)
        self._count("loss", result.losses)
        self._count("rewards/chosen", result.chosen_rewards)
        self._count("rewards/rejected", result.rejected_rewards)
        self._count("rewards/margin", result.chosen_rewards - result.rejected_rewards)
        self._count("rewards/accuracy", (result.chosen_rewards > result.rejected_rewards).float())
        self._count("logps/chosen", chosen)
        self._count("logps/rejected", rejected)
        return result.losses.sum()

    def _kto_loss(self, logps, reference_logps, inputs):
        recipe, desirable = self.recipe, inputs["desirable"]
        result = losses.kto_loss(
            logps,
            reference_logps,
            desirable,
            inputs["kl"],
            beta=recipe.beta,
            desirable_weight=recipe.desirable_weight,
            undesirable_weight=recipe.undesirable_weight,
        )
        self._count("loss", result.losses)
        self._count("rewards/chosen", result.chosen_rewards)
        self._count("rewards/rejected", result.rejected_rewards)
        for name, values in (("logps", logps), ("logratio", logps - reference_logps)):
            self._count(f"{name}/chosen", values[desirable])
            self._count(f"{name}/rejected", values[~desirable])
        return result.losses.sum()

    def _sft_loss(self, logps, inputs):
        loss = -logps.sum() / inputs["step_tokens"]
        self._sums["loss"][0] += -logps.detach().sum()
        self._sums["loss"][1] += inputs["sequences"]["completion_mask"].sum()
        self._count("logps/chosen", logps)
        return loss

    # The numbers.

    def _count(self, name: str, values: torch.Tensor) -> None:
        self._sums[name][0] += values.detach().float().sum()
        self._sums[name][1] += values.numel()

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        step = self.state.global_step
        if step > self._last_row:  # Trainer comes here once more when the epoch ends
            self._last_row = step
            self._write_row(step, grad_norm, learning_rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _write_row(self, step: int, grad_norm, learning_rate) -> None:
        row = {"step": step, "epoch": round(step * self.recipe.batch_size / len(self.stream.rows), 6)}
        row |= self._gathered_means()
        if self.recipe.method == "kto":  # not pairs: a difference of means, if both kinds are there
            sides = row["rewards/chosen"], row["rewards/rejected"]
            row["rewards/margin"] = None if None in sides else sides[0] - sides[1]
        grad_norm = float(grad_norm)
        if not math.isfinite(row["loss"]) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the loss of step {step} is {row['loss']}, its gradient norm {grad_norm}: training stops, "
                "before it is saved, and the last checkpoint is kept. Try a smaller learning_rate or "
                "max_grad_norm, or dtype=float32."
            )
        if self.reference is not None:
            fixed = self.trust_region.kind == "fixed"
            row["alpha"] = None if fixed else self.trust_region.alpha
            row["tau"] = None if fixed else self.trust_region.tau
            row["reference_updates"] = self.reference_updates
            row |= self.update_numbers
            self.update_numbers = {}
        row["learning_rate"] = learning_rate
        row["grad_norm"] = grad_norm
        main = self.is_world_process_zero()
        if main and self.evaluator and (step % self.recipe.eval_steps == 0 or step == self.state.max_steps):
            row |= self.evaluator(self, step)
        row["seconds"] = round(time.perf_counter() - self._clock, 3)
        self._clock = time.perf_counter()
        if main:
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        self.progress.show(row)
        if main and self.recipe.tensorboard:
            self._write_tensorboard(row)

    def _write_tensorboard(self, row: dict) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge: what an interrupted run wrote after its last checkpoint is written again
            self._tensorboard = SummaryWriter(self.directory / "tensorboard", purge_step=row["step"])
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, row["step"])
        self._tensorboard.flush()

    def log(self, logs, start_time=None):
        """Trainer's own summary is left out: metrics.jsonl has everything."""

    def _gathered_means(self) -> dict[str, float]:
        """Means over all micro-batches and processes of the step, in float64; empties the sums."""
        names = sorted(self._sums)
        sums = torch.tensor([[float(x) for x in self._sums[name]] for name in names], dtype=torch.float64)
        own = [name == "kto/z0" for name in names]  # gathered already, the same on every process
        total = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        self._sums.clear()
        means = {
            name: (s[0] / s[1]).item() if s[1] > 0 else None
            for name, s in zip(names, torch.where(torch.tensor(own)[:, None], sums, total))
        }
        return {"loss": means.pop("loss"), **means}

    # Checkpoints.
    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            save_policy(self.policy, Path(output_dir))
            self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial):
        folder = self.directory / "checkpoints" / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # cut off by an earlier kill
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.reference is not None:
                self.reference.save(folder / "reference")
            write_seal(
                folder,
                {
                    "step": self.state.global_step,
                    "reference_updates": self.reference_updates,
                    "weights": weight_hash(self.policy),
                    "start": self.start,
                    "processes": self.args.world_size,
                },
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        seal = read_seal(folder)
        for name, own in self.start.items():
            if seal["start"][name] != own:
                value, what = getattr(self.recipe, name), {"model": "weights", "data": "tokenized rows"}[name]
                raise ValueError(
                    f"resume: what this run began from ({name}={value}) is not the same any more: its {what} "
                    "have another hash. Put the old state back, or start a new run elsewhere."
                )
        restore_policy(self.policy, folder)
        if self.reference is not None:
            self.reference.load(folder / "reference")
        self.reference_updates, self._last_row = seal["reference_updates"], seal["step"]


def training_arguments(recipe: Recipe, directory: Path, steps: int) -> TrainingArguments:
    """The recipe in Trainer's own words."""
    processes = this_process().num_processes
    micro = recipe.micro_batch_size or recipe.batch_size // processes
    if not micro or recipe.batch_size % (micro * processes):
        raise ValueError(
            f"batch_size={recipe.batch_size} cannot be spread over {processes} process(es) with "
            f"micro_batch_size={micro}: "
            "it has to be a multiple of micro_batch_size * processes."
        )
    arguments = TrainingArguments(
        output_dir=str(directory / "checkpoints"),
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler
        if recipe.lr_scheduler != "constant"
        else "constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * processes),
        bf16=compute_dtype(recipe) is torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # StepStream is already in order
        save_steps=recipe.save_steps,
        save_total_limit=2,  # an older whole checkpoint stays while a new one is being written
        logging_strategy="no",  # metrics.jsonl is ours: Trainer's logged loss changes over a resume
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,  # Progress shows more
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would scatter the pairs
    return arguments
