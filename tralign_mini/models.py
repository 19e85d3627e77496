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
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from .adapters import add_initial_adapter, guard_4bit, refuse_unaverageable
from .recipe import Recipe
from .worlds import WORLDS, data_directory


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


def load_tokenizer(name: str):
    """The tokenizer of a model or of the base under an adapter; the pad token is EOS where there is none."""
    path = model_path(name)
    with _loading(name):
        if is_adapter(name) and not (Path(path) / "tokenizer_config.json").is_file():
            path = _adapter_config(path).base_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model={name!r}: its tokenizer has no end-of-sequence token, so a model could not "
                         "learn where an answer ends. Give the tokenizer an eos_token and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks, not the id, decide what counts
    return tokenizer


def load_policy(recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The policy of a recipe, ready to be trained.

    `tuning=full` gives a float32 model whose weights all require a gradient. `lora` and `qlora` give a
    `PeftModel` with the trainable float32 adapter `default` on one base model (4-bit NF4 for `qlora`). When
    `model` is a PEFT folder, training goes on from that adapter and a frozen copy, `initial`, stays beside
    it.
    """
    adapter = is_adapter(recipe.model)
    if recipe.tuning == "full":
        if adapter:
            raise ValueError(f"model={recipe.model!r} is a PEFT adapter, and tuning=full trains all weights. "
                             "Use tuning=lora (or qlora) to go on from it, or merge it into its base first.")
        policy = load_base(recipe.model, torch.float32)
    else:
        folder, base = model_path(recipe.model), recipe.model
        if adapter:
            with _loading(recipe.model):
                config = _adapter_config(folder)
            refuse_unaverageable(config)
            base = config.base_model_name_or_path
        model = load_base(base, compute_dtype(recipe), four_bit=recipe.tuning == "qlora")
        model.requires_grad_(False)
        if adapter:
            with _loading(recipe.model):
                policy = PeftModel.from_pretrained(model, folder, is_trainable=True)
            add_initial_adapter(policy)
        else:
            torch.manual_seed(recipe.seed)
            config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha,
                                lora_dropout=recipe.lora_dropout, target_modules="all-linear",
                                task_type="CAUSAL_LM")
            policy = get_peft_model(model, config)
    if recipe.gradient_checkpointing:
        checkpointed = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def load_base(name: str, dtype: torch.dtype, *, four_bit: bool = False) -> PreTrainedModel:
    """A causal language model on this process's device, without dropout; `four_bit` quantises it to NF4."""
    options: dict = {"dtype": dtype}
    if four_bit:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ValueError("tuning=qlora needs bitsandbytes for the 4-bit base, and it is not installed. "
                             "Install it (pip install bitsandbytes) or use tuning=lora.") from error
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
        options["device_map"] = {"": this_process().device}
    with _loading(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            model_path(name), output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its files lack {', '.join(missing[:3])}, which would be random numbers")
        if getattr(model, "_hf_peft_config_loaded", False):  # as transformers does with an adapter on the Hub
            raise ValueError("it is a PEFT adapter: download it and give its folder with tuning=lora")
    if four_bit:
        guard_4bit(model)
    else:
        model.to(this_process().device)
    _switch_dropout_off(model)
    return model


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

    Without a GPU accelerate has to be told, or each of several processes takes itself for the only one.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def _adapter_config(folder: str) -> PeftConfig:
    config = PeftConfig.from_pretrained(folder)
    if not config.base_model_name_or_path:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return config


@contextmanager
def _loading(name: str):
    """One ValueError for all that goes wrong inside: what was looked for, why it failed, what to give."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would be random numbers
            yield
    except (OSError, ValueError, RuntimeError, SafetensorError, UserWarning) as error:
        looks_local = Path(model_path(name)).exists() or name.startswith((".", "/", "~"))
        where = "as a local folder" if looks_local else "as a local folder and on the Hugging Face Hub"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".!")
        raise ValueError(f"model={name!r} could not be loaded; looked for {where}. Reason: {reason}. Give a "
                         "folder made by save_pretrained, a Hub name, or an embedded world "
                         f"({', '.join(WORLDS)}).") from error


def keep_freed_memory() -> None:
    """On Linux: let the C library keep the memory of freed tensors for the next ones, up to 1 GiB each.

    By default each large tensor goes back to the system and the next one comes page by page, filled with zeros:
    7 % of an optimizer step of 70 M parameters on two cores. The peak is the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # not in musl
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
