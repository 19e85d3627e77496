"""Load a policy: all its weights, LoRA or QLoRA, with the device and the precision that fit this machine.

Trainable weights are float32 always. An AdamW step at a learning rate of 1e-6 is smaller than half a bfloat16
ulp of most weights, so a policy stored in bfloat16 hardly moves; on a GPU the speed comes from autocast
instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from .recipe import Recipe
from .reference import add_initial_adapter, guard_4bit, refuse_unaverageable
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
    if is_adapter(name) and not (Path(path) / "tokenizer_config.json").is_file():
        path = PeftConfig.from_pretrained(path).base_model_name_or_path
    tokenizer = _load(AutoTokenizer, path, name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model={name!r}: its tokenizer has no end-of-sequence token, so a model could not learn where "
            f"an answer "
            "ends. Give the tokenizer an eos_token and save it again."
        )
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
            raise ValueError(
                f"model={recipe.model!r} is a PEFT adapter, and tuning=full trains whole weights. Use "
                f"tuning=lora (or "
                "qlora) to go on from the adapter, or merge it into its base first."
            )
        policy = load_base(recipe.model, torch.float32)
    else:
        folder = model_path(recipe.model)
        if adapter:
            config = PeftConfig.from_pretrained(folder)
            refuse_unaverageable(config)
            base = config.base_model_name_or_path
        else:
            base = recipe.model
        dtype = compute_dtype(recipe)
        model = load_base(base, dtype, four_bit=recipe.tuning == "qlora")
        model.requires_grad_(False)
        if adapter:
            policy = PeftModel.from_pretrained(model, folder, is_trainable=True)
            add_initial_adapter(policy)
        else:
            torch.manual_seed(recipe.seed)
            policy = get_peft_model(
                model,
                LoraConfig(
                    r=recipe.lora_rank,
                    lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
                    lora_dropout=recipe.lora_dropout,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
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
            raise ValueError(
                "tuning=qlora needs bitsandbytes for the 4-bit base, and it is not installed. "
                "Install it (pip install 'tralign_mini[quant]') or use tuning=lora."
            ) from error
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": this_process().device}
    model = _load(AutoModelForCausalLM, model_path(name), name, **options)
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


def _load(loader, path: str, name: str, **options):
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        looks_local = Path(path).exists() or name.startswith((".", "/", "~"))
        where = "as a local folder" if looks_local else "as a local folder and on the Hugging Face Hub"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model={name!r} could not be loaded; looked for {where}. Reason: {reason} "
            f"Give a folder made by save_pretrained, a Hub name, or an embedded world ({', '.join(WORLDS)})."
        ) from error
