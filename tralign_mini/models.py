"""Load a policy: all its weights, LoRA or QLoRA, with the device and the precision that fit this machine.

Trainable weights are float32 always. An AdamW step at a learning rate of 1e-6 is smaller than half a bfloat16
ulp of most weights, so a policy stored in bfloat16 hardly moves; on a GPU the speed comes from autocast
instead.
"""

from __future__ import annotations

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
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
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

    separate_pad: take another special token than EOS, for a sequence classifier, which reads at the last
    token that is no padding: it has to see whether an answer has an end.
    """
    path = model_path(name)
    with loading(name):
        if is_adapter(name) and not (Path(path) / "tokenizer_config.json").is_file():
            path = _adapter_config(path).base_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model={name!r}: its tokenizer has no end-of-sequence token, so no answer could "
                         "end. Give the tokenizer an eos_token and save it again.")
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
                             "(and the model a row for it).")
        tokenizer.pad_token = free[0]
    return tokenizer


def load_policy(recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The policy of a recipe, ready to be trained: for `method=reward` a sequence classifier with a new head.

    `tuning=full`: all weights in float32. `lora`, `qlora`: a `PeftModel` with the trainable float32 adapter
    `default` on one base model (4-bit NF4 for `qlora`). When `model` is a PEFT folder, training goes on from
    that adapter, and a frozen copy, `initial`, stays beside it.
    """
    (base, config), reward = start_of(recipe), recipe.method == "reward"
    head_seed = recipe.seed if reward else None
    if recipe.tuning == "full":
        policy = load_base(base, torch.float32, head_seed=head_seed)
    else:
        model = load_base(base, compute_dtype(recipe), four_bit=recipe.tuning == "qlora", head_seed=head_seed)
        model.requires_grad_(False)
        if config is None:
            torch.manual_seed(recipe.seed)
            policy = get_peft_model(model, fresh_adapter(recipe))
        elif reward:
            with loading(recipe.model):
                policy = _with_new_head(model, config, recipe.model)
        else:
            with loading(recipe.model):
                policy = PeftModel.from_pretrained(model, recipe.model, is_trainable=True)
            add_initial_adapter(policy)
    if reward:
        set_pad_token(policy, load_tokenizer(recipe.model, separate_pad=True))
    if recipe.gradient_checkpointing:
        checkpointed = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def start_of(recipe: Recipe) -> tuple[str, LoraConfig | None]:
    """The base model's name, and the config of the adapter that training goes on from, if there is one."""
    if not is_adapter(recipe.model):
        return recipe.model, None
    if recipe.tuning == "full":
        raise ValueError(f"model={recipe.model!r} is a PEFT adapter, and tuning=full trains all weights. "
                         "Use tuning=lora (or qlora), or merge it into its base first.")
    with loading(recipe.model):
        config = _adapter_config(recipe.model)
    if recipe.method != "reward":
        refuse_unaverageable(config)
    config.inference_mode = False
    return config.base_model_name_or_path, config


def fresh_adapter(recipe: Recipe) -> LoraConfig:
    """The policy's adapter, if training does not go on from one."""
    kind = HEAD if recipe.method == "reward" else {"task_type": "CAUSAL_LM"}
    return LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
                      target_modules="all-linear", **kind)


def load_base(name: str, dtype: torch.dtype, *, four_bit: bool = False, classifier: bool = False,
              head_seed: int | None = None) -> PreTrainedModel:
    """A causal language model on this process's device, without dropout; `four_bit` quantises it to NF4.

    classifier: a sequence classifier with one label instead, its head in float32. With a `head_seed` it may
    be made of a language model: the head that it lacks is drawn from N(0, 1 / hidden_size^2).
    """
    classifier, options = classifier or head_seed is not None, {"dtype": dtype}
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if four_bit:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ValueError("tuning=qlora needs bitsandbytes: pip install bitsandbytes.") from error
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["score"] if classifier else None)
        options["device_map"] = {"": this_process().device}
    with loading(name):
        if is_adapter(name):
            raise ValueError("it is a PEFT adapter: download its base and take tuning=lora")
        options |= {"config": config_of(model_path(name), classifier), "output_loading_info": True}
        model, info = auto.from_pretrained(model_path(name), **options)
        missing = sorted(info["missing_keys"])
        if missing == ["score.weight"] and head_seed is not None:
            generator = torch.Generator().manual_seed(head_seed)
            head = torch.randn(model.score.weight.shape, generator=generator) / model.score.in_features
            model.score.weight.data, missing = head.to(model.score.weight), []
        if missing:
            raise ValueError(f"its files lack {', '.join(missing[:3])}, which would be random numbers")
    if classifier:
        model.score.float()  # rewards of 8 bits would tie
    if four_bit:
        guard_4bit(model)
    else:
        model.to(this_process().device)
    return model


def config_of(path: str, classifier: bool) -> PretrainedConfig:
    """A model's config, without dropout: the log-ratio compares policies, noise in one is no preference."""
    config = AutoConfig.from_pretrained(path, **{"num_labels": 1} if classifier else {})
    text = config.get_text_config()
    for name in [name for name, value in vars(text).items() if "drop" in name and isinstance(value, float)]:
        setattr(text, name, 0.0)
    return config


def set_pad_token(classifier: PreTrainedModel | PeftModel, tokenizer) -> None:
    """By this token the classifier's own forward, and that of its saved copy, finds the end of a text."""
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _with_new_head(model: PreTrainedModel, config: LoraConfig, folder: str) -> PeftModel:
    """The adapter of a language model (or of a classifier) on a classifier, trainable, as is the head."""
    config.task_type, config.modules_to_save = HEAD.values()
    policy = get_peft_model(model, config)
    head = {"base_model.model.score.weight": model.score.original_module.weight}  # unless the folder has one
    found = set_peft_model_state_dict(policy, head | load_peft_weights(folder, device="cpu"))
    wrong = [key for key in found.missing_keys if ".default." in key]
    if wrong := wrong + found.unexpected_keys:
        raise ValueError(f"its adapter does not fit the model under it: {', '.join(wrong[:3])}")
    return policy


def this_process() -> PartialState:
    """Which one of how many processes this is, and its device: its CUDA GPU, or else the CPU.

    The others wait while the main one samples or computes a fixed reference: NCCL gives up after 10 minutes.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))


def _adapter_config(folder: str) -> PeftConfig:
    config = PeftConfig.from_pretrained(folder)
    if not config.base_model_name_or_path:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return config


@contextmanager
def loading(name: str):
    """One ValueError for all that goes wrong inside: what was looked for, why it failed, what to give.

    Nothing but errors is printed: missing keys are checked, the last of the Hub's retries is in the message.
    """
    before = [(library, library.get_verbosity()) for library in (logging, hub_logging)]
    try:
        for library, _ in before:
            library.set_verbosity_error()
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
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
