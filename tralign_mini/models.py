"""Load a policy: all its weights, LoRA or QLoRA, with the device and the precision that fit this machine.

Trainable weights are float32 always. An AdamW step at a learning rate of 1e-6 is smaller than half a bfloat16
ulp of most weights, so a policy stored in bfloat16 hardly moves; on a GPU the speed comes from autocast
instead.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub.utils import logging as hub_logging
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .adapters import add_initial_adapter, guard_4bit, refuse_unaverageable
from .recipe import Recipe
from .worlds import WORLDS, data_directory

HEAD = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}  # of a LoraConfig: the reward model's head


def model_path(name: str) -> str:
    """The folder or Hub name behind a recipe's `model`: the name of an embedded world means its SFT model."""
    return str(data_directory(name) / "model") if name in WORLDS else name


def is_adapter(name: str) -> bool:
    """Whether `name` is a local folder that holds a PEFT adapter and not a whole model."""
    return (Path(model_path(name)) / "adapter_config.json").is_file()


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of matrix products: what the recipe says, or bfloat16 where the GPU has it, else float32."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32


def load_tokenizer(name: str, *, separate_pad: bool = False):
    """The tokenizer of a model or of the base under an adapter; the pad token is EOS where there is none.

    separate_pad: take another special token than EOS. A sequence classifier reads at the last token that is
    no padding; with EOS as padding it would not see whether an answer has an end.
    """
    path = model_path(name)
    with loading(name):
        if is_adapter(name) and not (Path(path) / "tokenizer_config.json").is_file():
            path = _adapter_config(path).base_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model={name!r}: its tokenizer has no end-of-sequence token, so a model could not "
                         "learn where an answer ends. Give the tokenizer an eos_token and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks, not the id, decide what counts
    if separate_pad and tokenizer.pad_token_id == tokenizer.eos_token_id:
        added = sorted(tokenizer.added_tokens_decoder.items())
        special = [str(token) for _, token in added if token.special]
        named = [token for token in special if "pad" in token.lower()]
        used = (None, tokenizer.eos_token, tokenizer.bos_token)
        free = [t for t in (*named, tokenizer.unk_token, *reversed(special)) if t not in used]
        if not free:
            raise ValueError(f"model={name!r}: its tokenizer has no special token but EOS, and a reward "
                             "model needs another one as padding. Give the tokenizer a pad_token of its own "
                             "(and the model a row for it) and save both again.")
        tokenizer.pad_token = free[0]
    return tokenizer


def load_policy(recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The policy of a recipe, ready to be trained.

    `tuning=full` gives a float32 model whose weights all require a gradient. `lora` and `qlora` give a
    `PeftModel` with the trainable float32 adapter `default` on one base model (4-bit NF4 for `qlora`). When
    `model` is a PEFT folder, training goes on from that adapter and a frozen copy, `initial`, stays beside
    it. For `method=reward` it is a sequence classifier with a new head, which a `PeftModel` trains in full.
    """
    adapter, reward = is_adapter(recipe.model), recipe.method == "reward"
    head_seed = recipe.seed if reward else None
    if recipe.tuning == "full":
        if adapter:
            raise ValueError(f"model={recipe.model!r} is a PEFT adapter, and tuning=full trains all weights. "
                             "Use tuning=lora (or qlora) to go on from it, or merge it into its base first.")
        policy = load_base(recipe.model, torch.float32, head_seed=head_seed)
    else:
        folder, base = model_path(recipe.model), recipe.model
        if adapter:
            with loading(recipe.model):
                config = _adapter_config(folder)
            if not reward:
                refuse_unaverageable(config)
            base = config.base_model_name_or_path
        model = load_base(base, compute_dtype(recipe), four_bit=recipe.tuning == "qlora", head_seed=head_seed)
        model.requires_grad_(False)
        if adapter and reward:
            with loading(recipe.model):
                policy = _with_new_head(model, config, folder)
        elif adapter:
            with loading(recipe.model):
                policy = PeftModel.from_pretrained(model, folder, is_trainable=True)
            add_initial_adapter(policy)
        else:
            torch.manual_seed(recipe.seed)
            kind = HEAD if reward else {"task_type": "CAUSAL_LM"}
            config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha,
                                lora_dropout=recipe.lora_dropout, target_modules="all-linear", **kind)
            policy = get_peft_model(model, config)
    if reward:
        set_pad_token(policy, load_tokenizer(recipe.model, separate_pad=True))
    if recipe.gradient_checkpointing:
        checkpointed = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def load_base(name: str, dtype: torch.dtype, *, four_bit: bool = False, classifier: bool = False,
              head_seed: int | None = None) -> PreTrainedModel:
    """A causal language model on this process's device, without dropout; `four_bit` quantises it to NF4.

    classifier: a sequence classifier with one label instead, its head in float32. With a `head_seed` it may
    be made of a language model: the head that it lacks is drawn from N(0, 1 / hidden_size^2).
    """
    classifier, options = classifier or head_seed is not None, {"dtype": dtype}
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if classifier:
        options["num_labels"] = 1
    if four_bit:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ValueError("tuning=qlora needs bitsandbytes for the 4-bit base, and it is not installed. "
                             "Install it (pip install bitsandbytes) or use tuning=lora.") from error
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["score"] if classifier else None)
        options["device_map"] = {"": this_process().device}
    with loading(name):
        with _quiet():
            model, info = auto.from_pretrained(model_path(name), output_loading_info=True, **options)
        missing = sorted(info["missing_keys"])
        if missing == ["score.weight"] and head_seed is not None:
            generator = torch.Generator().manual_seed(head_seed)
            head = torch.randn(model.score.weight.shape, generator=generator) / model.score.in_features
            model.score.weight.data, missing = head.to(model.score.weight), []
        if missing:
            raise ValueError(f"its files lack {', '.join(missing[:3])}, which would be random numbers")
        if getattr(model, "_hf_peft_config_loaded", False):  # as transformers does with an adapter on the Hub
            raise ValueError("it is a PEFT adapter: download it and give its folder with tuning=lora")
    if classifier:
        model.score.float()  # rewards of 8 bits would tie
    if four_bit:
        guard_4bit(model)
    else:
        model.to(this_process().device)
    _switch_dropout_off(model)
    return model


def set_pad_token(classifier: PreTrainedModel | PeftModel, tokenizer) -> None:
    """By this token the classifier's own forward, and that of its saved copy, finds the end of a text."""
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _with_new_head(model: PreTrainedModel, config: LoraConfig, folder: str) -> PeftModel:
    """The adapter of a language model (or of a classifier) on a classifier, trainable, as is the head."""
    config.task_type, config.modules_to_save, config.inference_mode = *HEAD.values(), False
    policy = get_peft_model(model, config)
    head = {"base_model.model.score.weight": model.score.original_module.weight}  # unless the folder has one
    found = set_peft_model_state_dict(policy, head | load_peft_weights(folder, device="cpu"))
    wrong = [key for key in found.missing_keys if ".default." in key]
    if wrong := wrong + found.unexpected_keys:
        raise ValueError(f"its adapter does not fit the model under it: {', '.join(wrong[:3])}")
    return policy


def _switch_dropout_off(model: PreTrainedModel) -> None:
    """The log-ratio compares two policies: noise in one of them is not a preference."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # as attention_dropout, which is no module
                setattr(module, name, 0.0)


def this_process() -> PartialState:
    """Which one of how many processes this is, and its device: its CUDA GPU, or else the CPU.

    Without a GPU accelerate has to be told, or each of several processes takes itself for the only one. The
    others wait while the main one samples or computes a fixed reference: NCCL would give up after 10 minutes.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))


def _adapter_config(folder: str) -> PeftConfig:
    config = PeftConfig.from_pretrained(folder)
    if not config.base_model_name_or_path:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return config


@contextmanager
def loading(name: str):
    """One ValueError for all that goes wrong inside: what was looked for, why it failed, what to give."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would be random numbers
            with _quiet(hub_logging):  # each of its retries: the last one's reason is in the message
                yield
    except (OSError, ValueError, RuntimeError, SafetensorError, UserWarning) as error:
        looks_local = Path(model_path(name)).exists() or name.startswith((".", "/", "~"))
        where = "as a local folder" if looks_local else "as a local folder and on the Hugging Face Hub"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".!")
        raise ValueError(f"model={name!r} could not be loaded; looked for {where}. Reason: {reason}. Give a "
                         "folder made by save_pretrained, a Hub name, or an embedded world "
                         f"({', '.join(WORLDS)}).") from error


@contextmanager
def _quiet(logging=logging):
    """Nothing but errors; of transformers no table of missing or unexpected keys: those are checked."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def keep_freed_memory() -> None:
    """On Linux: let the C library keep the memory of freed tensors for the next ones, up to 1 GiB each.

    By default each large tensor goes back to the system and the next one comes page by page, filled with
    zeros: 7 % of an optimizer step of 70 M parameters on two cores. Where the next step's tensors have other
    sizes it costs memory (`rehearsal.HOLES`). What loading and checking have left is given back first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # not in musl
    if mallopt is not None:
        ctypes.CDLL(None).malloc_trim(0)
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
