"""A run without numbers: its tensors have a shape and a dtype, nothing else, and a ledger counts their bytes.

The recipe's model is built from its config alone (torch's FakeTensorMode), and the engine itself takes a step
with it: what autograd keeps, checkpointing drops and autocast copies follows from the code that will run.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from . import logprobs
from .adapters import INITIAL, switched
from .attention import by_group
from .batches import StepStream, collate_rows, group_of
from .models import compute_dtype, config_of, fresh_adapter, loading, model_path, start_of
from .plan import WITHOUT_REFERENCE
from .recipe import Recipe
from .reference import REFERENCE
from .reward import SCORED_AT_ONCE, read_at
from .sharing import PACKED, PACKED_BY_GROUP, NotExact, longest_row

CPU = torch.device("cpu")  # whatever the run's device is: shapes and dtypes are the same there
ADAM = 8  # bytes for each trained weight: two moments in float32
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # a code, a byte for 64 codes, a float for 256 bytes (arXiv 2305.14314)
SAMPLED_AT_ONCE = 64  # sequences: the default of generate.sample
# Measured on CPU. Framework: threads, workspaces of kernels, Trainer; 57 to 63 MiB. Holes: freed memory is
# kept (heap.keep_freed_memory), and what comes next often does not fit into it as it lies; so much of what
# a step takes and gives back (rows of benchmarks.memory_table). In full, Adam's moments fill part of it; with
# qlora decoded weights come and go between all else
FRAMEWORK, HOLES = 60 * 2**20, {"full": 0.55, "lora": 0.9, "qlora": 1.08}
PASSING = ("activations", "logits", "temporary")


class Ledger(TorchDispatchMode):
    """The bytes that are alive, by label, now and at the peak. A storage counts once, whatever views it."""

    def __init__(self):
        super().__init__()
        self.label = ""
        self.now, self.peak = Counter(), Counter()
        self._entries: dict[int, Counter] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._entries:
                self.enter(tensor, {self.label: tensor.untyped_storage().nbytes()})
        return out

    def enter(self, tensor: torch.Tensor, entry: dict[str, float]) -> None:
        """Count this by label until the tensor's memory is freed, instead of what it counted for so far."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._entries:
            self.now.subtract(self._entries[storage._cdata])
        else:
            weakref.finalize(storage, lambda key: self.now.subtract(self._entries.pop(key)), storage._cdata)
        self._entries[storage._cdata] = Counter(entry)
        self.add(entry)

    def add(self, entry: dict[str, float]) -> None:
        self.now.update(entry)
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()


class Rehearsal:
    """The run of a recipe without numbers. `moments`, after `run`: {part: bytes} at the peak of each moment.

    on_cpu: count what a CPU's memory holds beside tensors, too. ValueError if the model has no config here.
    """

    def __init__(self, recipe: Recipe, *, on_cpu: bool = False):
        self.recipe, self.on_cpu, self.mode, self.ledger = recipe, on_cpu, FakeTensorMode(), Ledger()
        self.micro = recipe.micro_batch_size or recipe.batch_size
        self.moments: dict[str, dict[str, float]] = {}
        (self.policy, saved_dtype), self.reference = _policy(recipe), None
        self.config, self.reward = self.policy.config.get_text_config(), recipe.method == "reward"
        if recipe.tuning == "full" and recipe.method not in WITHOUT_REFERENCE:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        for model in filter(None, (self.policy, self.reference)):
            self._fake(model)
            if not self.reward:
                logprobs._KNOWN[model] = model.get_output_embeddings(), True  # found out by numbers otherwise
        self.by_group = on_cpu and by_group(self.policy)
        self._enter_weights(saved_dtype)

    def run(self, batch: dict[str, torch.Tensor]) -> None:
        """Each moment in which memory could be short, with what `largest_batch` returns."""
        recipe, longest = self.recipe, self.longest
        spans = {"spans": batch["spans"]} if self.by_group and "spans" in batch else {}  # numbers, looked at
        counted = batch["counted" if "counted" in batch else "completion_mask"]
        scores = len(counted) if self.reward else int(counted.sum())
        batch = {name: self.mode.from_tensor(tensor) for name, tensor in batch.items() if name != "spans"}
        with self.mode:
            if recipe.method not in ("sft", "reward"):
                with self._moment("check of shared prompts"), torch.no_grad(), self.autocast():
                    tokens = torch.ones(2, longest, dtype=torch.long)  # logprobs.plain_completion_logps
                    self.policy(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
            self.ledger.add({"optimizer": ADAM * trained})
            with self._moment("training step"):
                for _ in range(1 if self.micro == recipe.batch_size else 2):
                    self._micro_batch(batch | spans, scores)  # the second one begins with gradients
                self.policy.zero_grad()
            if self.on_cpu:
                step = self.moments["training step"]
                holes = HOLES[recipe.tuning] * sum(step.get(label, 0) for label in PASSING)
                step["freed, still held"] = holes
            evaluation = "scoring held-out pairs" if self.reward else "sampling for evaluation"
            with self._moment(evaluation), torch.no_grad(), self.autocast():
                self._score_pairs() if self.reward else self._sample()

    def _micro_batch(self, batch: dict, scores: int) -> None:
        """AlignmentTrainer.compute_loss, and the backward pass after it."""
        self.ledger.label = "temporary"
        with self.autocast(), torch.no_grad():
            if self.reference is not None:
                self._scores(self.reference, batch, scores)
            elif self.recipe.method not in WITHOUT_REFERENCE:
                with switched(self.policy, REFERENCE):
                    self._scores(self.policy, batch, scores)
        self.ledger.label = "activations"
        with self.autocast():
            loss = self._scores(self.policy, batch, scores).sum()
        self.ledger.label = "temporary"
        loss.backward()

    def _scores(self, model: nn.Module, batch: dict, scores: int) -> torch.Tensor:
        """Log-probs of tokens, or rewards, at whatever places: choosing them by a mask takes numbers."""
        names = ("input_ids", "position_ids", "attention_mask")
        inputs = {name: batch[name] for name in names if name in batch}
        if "group" in batch:
            groups = batch["group"], batch["branch"], batch.get("spans")
            inputs["attention_mask"] = logprobs.shared_prompt_mask(model, *groups)
        places, tokens = torch.zeros(2, scores, dtype=torch.long)
        if self.reward:
            return read_at(model, inputs, places)
        return logprobs._token_logps(model, inputs, places, tokens)

    def _score_pairs(self) -> None:
        """reward.sequence_rewards of held-out pairs, as long as the recipe allows."""
        length = self.recipe.max_prompt_tokens + self.recipe.max_completion_tokens
        tokens = torch.ones(min(SCORED_AT_ONCE, 2 * self.recipe.eval_prompts), length, dtype=torch.long)
        self.policy.eval()
        self._scores(self.policy, {"input_ids": tokens, "attention_mask": tokens}, len(tokens))

    def _sample(self) -> None:
        """generate.sample of the longest answers to the longest prompts, at the first and the last token."""
        recipe, model = self.recipe, self.policy
        if recipe.tuning == "full":  # evaluate.initial_policy loads it; when the run ends it samples, too
            self.ledger.add({"initial policy": sum(p.nbytes for p in model.parameters())})
        else:
            model = model.get_base_model()
        model.eval()
        prompt, length = recipe.max_prompt_tokens, recipe.max_prompt_tokens + recipe.max_completion_tokens
        tokens = torch.ones(min(SAMPLED_AT_ONCE, recipe.eval_prompts), length, dtype=torch.long)
        first = {"attention_mask": tokens[:, :prompt], "use_cache": True, "logits_to_keep": 1}
        cache = model(tokens[:, :prompt], **first).get("past_key_values")
        layers = getattr(cache, "layers", [])  # a recurrent state has none, and does not grow
        for index, (keys, values) in enumerate([(layer.keys, layer.values) for layer in layers]):
            grown = [x.new_empty(*x.shape[:2], length - prompt - 1, x.shape[-1]) for x in (keys, values)]
            cache.update(*grown, index)
        if layers:
            last = model(tokens[:, -1:], attention_mask=tokens, past_key_values=cache, use_cache=True).logits
            torch.multinomial(last[:, -1].float().softmax(-1), 1)

    def largest_batch(self, rows: list[dict] | None = None) -> dict[str, torch.Tensor]:
        """The largest micro-batch of these rows, or of any; notes the length of the longest sequence."""
        recipe = self.recipe
        if rows is None:
            answers = {"sft": ["completion_ids"], "kto": ["completion_ids", "mismatched_ids"]}
            answers = answers.get(recipe.method, ["chosen_ids", "rejected_ids"])
            row = {"prompt_ids": [0] * recipe.max_prompt_tokens, "label": True}
            rows = [row | dict.fromkeys(answers, [0] * recipe.max_completion_tokens)] * self.micro
        else:
            rows = list(StepStream(rows, recipe, recipe.plan(len(rows)).steps))
        groups = [group_of(row) for row in rows]
        self.longest = max(len(prompt) + max(map(len, answers)) for prompt, answers in groups)
        try:
            limit = longest_row(self.policy, groups, PACKED_BY_GROUP if self.by_group else PACKED)
        except NotExact:
            limit = 0
        options = {"hidden_size": 0 if self.by_group else self.config.hidden_size, "limit": limit,
                   "one_pass": self.micro == recipe.batch_size}
        batches = [collate_rows(rows[i : i + self.micro], recipe.method, 0, **options)["sequences"]
                   for i in range(0, len(rows), self.micro)]
        return max(batches, key=lambda batch: batch["input_ids"].numel())

    def _enter_weights(self, saved_dtype: torch.dtype | None) -> None:
        """What is there all the time; gradients and logits get their labels when they come."""
        ledger, head = self.ledger, self.policy.get_output_embeddings()
        coded = {module.weight for name, module in self.policy.named_modules()
                 if self.recipe.tuning == "qlora" and isinstance(module, (nn.Linear, Conv1D))
                 and module is not head and ".lora_" not in name and ".score" not in name}  # heads stay whole
        if coded:  # one layer at a time is decoded
            ledger.add({"temporary": max(weight.nbytes for weight in coded)})
        if self.on_cpu:  # saved as it is used, the rest stays in the file, mapped as a whole
            mapped = sum(weight.nbytes for weight in coded if weight.dtype == saved_dtype)
            ledger.add({"framework": FRAMEWORK, "file, mapped": mapped})
        for name, tensor in [*self.policy.named_parameters(), *self.policy.named_buffers()]:
            beside = f".{REFERENCE}." in name or f".{INITIAL}." in name
            frozen = "reference" if beside else "weights, frozen"
            entry = {"weights, trained" if tensor.requires_grad else frozen: tensor.nbytes}
            ledger.enter(tensor, {"weights, 4-bit": NF4 * tensor.numel()} if tensor in coded else entry)
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(
                    lambda weight: ledger.enter(weight.grad, {"gradients": weight.nbytes}))
        if self.reference is not None:
            for tensor in [*self.reference.parameters(), *self.reference.buffers()]:
                ledger.enter(tensor, {"reference": tensor.nbytes})

        def at_the_head(module, args):
            ledger.label = "logits" if ledger.label == "activations" else ledger.label

        if head is not None:
            head.register_forward_pre_hook(at_the_head)

    def _fake(self, model: nn.Module) -> None:
        """Move a model from `meta` to a CPU without numbers, which `Module.to` refuses to do."""
        moved = {None: None}  # tied weights stay tied
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old not in moved:
                        moved[old] = FakeTensor(self.mode, old.detach().to("meta"), CPU)
                        if isinstance(old, nn.Parameter):
                            moved[old] = nn.Parameter(moved[old], old.requires_grad)
                    tensors[name] = moved[old]

    @contextmanager
    def _moment(self, name: str) -> Iterator[None]:
        """Count what happens inside, and keep the peak under this name."""
        self.ledger.label, self.ledger.peak = "temporary", self.ledger.now.copy()
        with self.ledger:
            yield
        self.moments[name] = {label: size for label, size in self.ledger.peak.items() if size > 0}

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype(self.recipe) is torch.bfloat16)


def _policy(recipe: Recipe) -> tuple[nn.Module, torch.dtype | None]:
    """models.load_policy on the `meta` device, all adapters beside; and the dtype in which it was saved."""
    full, reward, (base, lora) = recipe.tuning == "full", recipe.method == "reward", start_of(recipe)
    with loading(base):
        config = config_of(model_path(base), reward)
    saved_dtype = config.dtype
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.device("meta"):
        policy = model = auto.from_config(config, dtype=torch.float32 if full else compute_dtype(recipe))
        if reward:
            model.score.float()
        if not full:
            policy = _adapted(model.requires_grad_(False), lora, recipe)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
    return policy.train(), saved_dtype


def _adapted(model: nn.Module, lora: LoraConfig | None, recipe: Recipe) -> nn.Module:
    """The policy's adapter on the model, `lora` if there is one to go on from, and what stands beside it."""
    beside = {REFERENCE: recipe.reference_rank} if recipe.method not in WITHOUT_REFERENCE else {}
    if lora and recipe.method != "reward":
        derived = beside and recipe.reference_rank == 4 * recipe.lora_rank  # then its own rank decides
        beside |= {INITIAL: lora.r} | ({REFERENCE: 4 * lora.r} if derived else {})
    fresh = fresh_adapter(recipe)
    lora = lora or fresh
    lora.task_type, lora.modules_to_save = fresh.task_type, fresh.modules_to_save
    policy = get_peft_model(model, lora)
    for name, rank in beside.items():
        policy.add_adapter(name, LoraConfig(r=rank, target_modules=lora.target_modules, inference_mode=True))
    return policy
