"""Training with a moving reference policy: a `transformers.Trainer` whose reference follows the policy.

TR-DPO, TR-IPO and TR-KTO (arXiv 2404.09656) are DPO, IPO and KTO with one more line, `TrustRegionCallback`.
The rest makes an optimizer step mean the same however it is cut into micro-batches and spread over processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PrinterCallback, Trainer, TrainingArguments

from . import flex
from .adapters import eval_mode
from .attention import by_flex, by_group, set_flex
from .batches import StepStream, collate_rows, group_of
from .callbacks import Progress, StopCallback, TensorBoard, TrustRegionCallback
from .changes import read_changes, region_at
from .checkpoint import read_seal, restore_policy, save_policy, start_hash, weight_hash, write_seal
from .heap import keep_freed_memory
from .json_lines import append_row, read_rows, write_rows
from .logprobs import CompletionScorer, completion_logps
from .models import compute_dtype, this_process
from .objective import StepSums, micro_batch_loss
from .recipe import Recipe
from .reference_cache import cached_logps
from .reward import REWARDS, completion_rewards
from .sharing import LOGPS, NotExact, row_limit


class AlignmentTrainer(Trainer):
    """Preference training of `policy` against `reference`.

    policy: causal language model or `PeftModel`, for `method=reward` a sequence classifier; reference:
    `FrozenReference`, `AdapterReference`, or None. rows: from `data.prepare`. evaluate: called as
    `evaluate(trainer, step)` every `eval_steps` on the main process, returns numbers for the step's row in
    `directory/metrics.jsonl`. cache: a folder in which log-probs of a reference that never moves are kept
    between runs. control: called before every optimizer step as `control(step)`, counted from 1, returns the
    `TrustRegion` that holds from then on, kept in `directory/changes.jsonl`. It may block: a pause.
    """

    # The loss is divided by the whole step's batch_size; Trainer must not divide by the accumulation again.
    loss_is_scaled_for_ga = True

    def __init__(self, policy, reference, rows, recipe: Recipe, tokenizer, directory, *, evaluate=None,
                 stop=None, cache=None, control=None):
        self.policy, self.reference, self.recipe = policy, reference, recipe
        self.directory, self.evaluator = Path(directory), evaluate
        self.trust_region = recipe.trust_region()
        self.reference_updates, self.update_numbers = 0, {}
        self.average, self.row_limit = recipe.logps == "mean", 0
        self.stream = StepStream(rows, recipe, recipe.plan(len(rows)).steps)
        self.start = {"model": start_hash(policy), "data": self.stream.hash()}
        score = completion_rewards if recipe.method == "reward" else None
        super().__init__(
            model=CompletionScorer(policy, average=self.average, score=score),
            args=training_arguments(recipe, self.directory, len(self.stream) // recipe.batch_size),
            train_dataset=self.stream, data_collator=self._collate, processing_class=tokenizer,
            callbacks=[TrustRegionCallback(self, control)] + ([StopCallback(stop)] if stop else []))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed are not supported: a sharded reference would have to move "
                             "shard by shard. Use torchrun (DistributedDataParallel), or tuning=qlora.")
        if control is not None and self.args.world_size > 1:
            raise ValueError("A run that is steered needs one process: each would ask for itself.")
        self.sums = StepSums()
        self._last_row, self._clock = 0, time.perf_counter()
        self.progress = Progress()
        self.tensorboard = TensorBoard(self.directory / "tensorboard") if recipe.tensorboard else None
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)
        if recipe.method != "sft":
            self._share_prompts()
        if self.args.device.type == "cpu":  # not before: what the check frees would be kept, too
            keep_freed_memory(policy, getattr(reference, "model", policy))
        never_moves = self.trust_region.updates(self.args.max_steps) == 0  # fixed, or tau beyond the end
        steered = control is not None or read_changes(self.directory)
        if cache is not None and reference is not None and never_moves and not steered:
            self.stream.reference_logps = self._cached_reference(cache)

    # The rows.

    @property
    def one_pass(self) -> bool:
        """Whether the policy's matched and mismatched completions of a KTO step share prompts in one pass."""
        return self.row_limit > 0 and self.args.gradient_accumulation_steps == 1

    def _collate(self, rows: list[dict]) -> dict:
        hidden_size = 0 if by_group(self.policy) else self.policy.config.get_text_config().hidden_size
        return collate_rows(rows, self.recipe.method, self.processing_class.pad_token_id,
                            hidden_size=hidden_size, limit=self.row_limit, one_pass=self.one_pass)

    def _share_prompts(self) -> None:
        """The longest packed row, or 0 and a line that says why none may be; on a GPU, its attention."""
        scores = REWARDS if self.recipe.method == "reward" else LOGPS
        models = self.policy, getattr(self.reference, "model", self.policy)
        set_flex(models, False)  # an earlier trainer's choice
        groups, pad = [group_of(row) for row in self.stream], self.processing_class.pad_token_id

        def check() -> int:
            with self.accelerator.autocast():
                return row_limit(self.policy, groups, pad, scores)

        limit = 0
        try:
            limit = check()
        except NotExact as reason:
            self._say(f"no shared prompts, which is slower: {reason}")
        self.row_limit = self._least(limit)
        by_sdpa = self.policy.config._attn_implementation == "sdpa"
        packed = self.row_limit and (self.recipe.method != "kto" or self.one_pass)  # also by the policy
        if packed and by_sdpa and self.args.device.type in flex.DEVICES:
            self._choose_attention(models, scores[1], check)

    def _choose_attention(self, models, score, check) -> None:
        """SDPA or FlexAttention, found out by trying, and kept: a resumed run takes the same."""
        file = self.directory / "attention.json"
        if known := read_rows(file):
            return set_flex(models, known[0]["flex"])
        micro, rows = self.args.per_device_train_batch_size, len(self.stream)
        batches = [self._prepare_inputs(self._collate([self.stream[i] for i in range(first, first + micro)]))
                   for first in (0, rows - micro)]  # the shortest rows of a step and the longest of another

        def score_as_in_training(model, batch):
            with self.accelerator.autocast():
                return score(model, batch)

        times = rows // (len(batches) * micro * self.args.world_size)
        faster, line = flex.prefer_flex(models, [batch["sequences"] for batch in batches],
                                        score_as_in_training, times, check)
        agreed = bool(self._least(faster))
        set_flex(models, agreed)
        if faster and not agreed:
            line = "packed rows with SDPA: not every process found FlexAttention faster"
        if line:
            self._say(line)
        if self.is_world_process_zero():
            write_rows(file, [{"flex": agreed, "why": line}])

    def _say(self, line: str) -> None:
        if self.is_world_process_zero():
            print(line, flush=True)

    def _least(self, number: int) -> int:
        """The least of what the processes have."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).min())

    def _cached_reference(self, directory) -> dict[int, list[float]]:
        """What a reference that never moves says of each row (kto: of each place in the stream)."""
        stream = self.stream
        if self.recipe.method == "kto":  # each step has mismatched completions of its own
            rows = dict(enumerate(stream))
        else:
            visited = set(stream.order.tolist())
            if len(visited) >= 0.9 * len(stream.rows):  # only an epoch's incomplete last step is missing
                visited = range(len(stream.rows))
            rows = {i: stream.rows[i] for i in sorted(visited)}
        config = json.loads(self.policy.config.to_json_string(use_diff=False))  # RoPE, heads, 4-bit type ...
        config.pop("_name_or_path", None)
        conditions = {"start": self.start["model"], "config": config, "average": self.average,
                      "dtype": str(compute_dtype(self.recipe)), "shared": self.row_limit > 0,
                      "flex": by_flex(self.policy), "device": self.args.device.type,
                      "torch": torch.__version__}

        def compute(rows: list[dict]) -> torch.Tensor:
            batch = self._prepare_inputs(self._collate(rows))
            return self._reference_logps(batch).view(-1, len(rows)).T

        at_once, main = self.args.per_device_train_batch_size, self.is_world_process_zero()
        with self.accelerator.main_process_first():
            found = cached_logps(directory, list(rows.values()), conditions, compute, at_once, main=main)
        return dict(zip(rows, found))

    # The loss.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All micro-batches of one optimizer step, each with what has to be known about the whole step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if self.recipe.method == "kto" and not self.one_pass:
            self._add_reference_point(batches)
        elif self.recipe.method == "sft":
            tokens = sum(batch["sequences"]["completion_mask"].sum() for batch in batches)
            tokens = self.accelerator.reduce(tokens, "sum")
            for batch in batches:
                batch["step_tokens"] = tokens
        return batches, None

    def _add_reference_point(self, batches: list[dict]) -> None:
        """KTO's z0 for a step of several micro-batches: it is known only after a pass over all of them.

        So the policy has two passes, with gradient and before that without. The reference has one, in which
        matched and mismatched completions share their prompt (350 + 40 tokens: a step is 1.2 times faster).
        """
        ratios = []
        for batch in batches:
            if "reference_logps" not in batch:
                batch["reference_logps"] = self._reference_logps(batch)
            batch["reference_logps"], reference_logps = batch["reference_logps"].chunk(2)
            batch.pop("both", None)
            ratios.append(self._without_gradient(self.policy, batch.pop("mismatched")) - reference_logps)
        kl = self._reference_point(torch.cat(ratios))
        for batch in batches:
            batch["kl"] = kl

    def _reference_point(self, ratios: torch.Tensor) -> torch.Tensor:
        """KTO's z0 (arXiv 2402.01306): the step's mean log-ratio on mismatched completions, at least 0."""
        total = torch.stack([ratios.detach().sum(), torch.tensor(float(len(ratios)), device=ratios.device)])
        total = self.accelerator.reduce(total, "sum")
        kl = (total[0] / total[1]).clamp(min=0)
        self.sums.add("kto/z0", kl)  # the same on every process, so their mean
        return kl

    @torch.no_grad()
    def _without_gradient(self, model, sequences) -> torch.Tensor:
        with eval_mode(model), self.accelerator.autocast():
            return completion_logps(model, sequences, average=self.average)

    def _reference_logps(self, batch: dict) -> torch.Tensor:
        """Of all completions of a micro-batch; of KTO the matched ones, then the mismatched ones."""
        parts = ("both",) if "both" in batch else ("sequences", "mismatched")
        with self.reference.using() as reference, self.accelerator.autocast():
            return torch.cat([completion_logps(reference, batch[name], average=self.average)
                              for name in parts if name in batch])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, a reward model's too: its sum over pairs, over the pairs of the step."""
        reference_logps = inputs.get("reference_logps")
        if reference_logps is None and self.reference is not None:
            reference_logps = self._reference_logps(inputs)  # its pass first: the policy's activations stay
        logps = model(**inputs["sequences"])  # the wrapped module's forward: what DDP hooks on to
        if self.recipe.method == "kto" and self.one_pass:
            (logps, mismatched), (reference_logps, others) = logps.chunk(2), reference_logps.chunk(2)
            inputs = inputs | {"kl": self._reference_point(mismatched - others)}
        loss = micro_batch_loss(self.recipe, logps, reference_logps, inputs, self.sums)
        return loss * self.args.world_size  # DDP averages gradients over processes; the step's loss is a sum

    def _clip_grad_norm(self, model):
        """Trainer's; on a CPU the norm goes by rows: on all threads, and no sum of 25 million squares."""
        if self.args.device.type != "cpu":
            return super()._clip_grad_norm(model)
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        norm = get_total_norm([torch.linalg.vector_norm(weight.grad, dim=-1) for weight in weights])
        clip_grads_with_norm_(weights, self.args.max_grad_norm, norm)
        return norm

    # The numbers.

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        step = self.state.global_step
        if step > self._last_row:  # Trainer comes here once more when the epoch ends
            self._last_row = step
            self._write_row(step, grad_norm, learning_rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _write_row(self, step: int, grad_norm, learning_rate) -> None:
        row = {"step": step, "epoch": round(step * self.recipe.batch_size / len(self.stream.rows), 6)}
        means = self.sums.means(self.accelerator)
        row |= {"loss": means.pop("loss"), **means}
        if self.recipe.method == "kto":  # not pairs: a difference of means, if both kinds are there
            sides = row["rewards/chosen"], row["rewards/rejected"]
            row["rewards/margin"] = None if None in sides else sides[0] - sides[1]
        grad_norm = float(grad_norm)
        if not math.isfinite(row["loss"]) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the loss of step {step} is {row['loss']}, its gradient norm {grad_norm}: training stops, "
                "the last checkpoint is kept. Try a smaller learning_rate, max_grad_norm or dtype=float32.")
        if self.reference is not None:
            row |= {"alpha": self.trust_region.alpha, "tau": self.trust_region.tau,
                    "reference_updates": self.reference_updates, **self.update_numbers}
            self.update_numbers = {}
        row |= {"learning_rate": learning_rate, "grad_norm": grad_norm}
        main = self.is_world_process_zero()
        if main and self.evaluator and (step % self.recipe.eval_steps == 0 or step == self.state.max_steps):
            row |= self.evaluator(self, step)
        row["seconds"] = round(time.perf_counter() - self._clock, 3)
        self._clock = time.perf_counter()
        if main:
            append_row(self.directory / "metrics.jsonl", row)
        self.progress.show(row)
        if main and self.tensorboard:
            self.tensorboard.write(row)

    def log(self, logs, start_time=None):
        """Trainer's own summary is left out: metrics.jsonl has everything."""

    # Checkpoints.

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            save_policy(self.policy, Path(output_dir))
            self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial):
        folder = self.directory / "checkpoints" / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # cut off by an earlier kill
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.reference is not None:
                self.reference.save(folder / "reference")
            write_seal(folder, {"step": self.state.global_step, "reference_updates": self.reference_updates,
                                "weights": weight_hash(self.policy), "start": self.start,
                                "processes": self.args.world_size})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        seal = read_seal(folder, self.start)
        restore_policy(self.policy, folder)
        if self.reference is not None:
            self.reference.load(folder / "reference")
        self.reference_updates, self._last_row = seal["reference_updates"], seal["step"]
        if changes := read_changes(self.directory):
            self.trust_region = region_at(changes, seal["step"], self.trust_region)


def training_arguments(recipe: Recipe, directory: Path, steps: int) -> TrainingArguments:
    processes = this_process().num_processes
    micro = recipe.micro_batch_size or recipe.batch_size // processes
    if not micro or recipe.batch_size % (micro * processes):
        raise ValueError(f"batch_size={recipe.batch_size} cannot be spread over {processes} process(es): it "
                         f"is no multiple of micro_batch_size={micro} times processes.")
    arguments = TrainingArguments(
        output_dir=str(directory / "checkpoints"), max_steps=steps, seed=recipe.seed,
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.lr_scheduler, recipe.lr_scheduler),
        optim="adamw_torch_fused", weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * processes),
        bf16=compute_dtype(recipe) is torch.bfloat16, use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",  # StepStream is already in order
        save_steps=recipe.save_steps,
        save_total_limit=2,  # an older whole checkpoint stays while a new one is being written
        logging_strategy="no",  # metrics.jsonl is ours: Trainer's logged loss changes over a resume
        logging_nan_inf_filter=False,
        report_to="none", remove_unused_columns=False, ddp_find_unused_parameters=False,
        disable_tqdm=True,  # Progress shows more
        dataloader_pin_memory=torch.cuda.is_available())
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would scatter the pairs
    return arguments
