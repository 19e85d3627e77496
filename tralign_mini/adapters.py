"""Several LoRA adapters on one base model: which can be averaged, adding a frozen copy, switching and back.

The policy is the adapter `default` (PEFT's own name for the first). Beside it stand `reference` and,
when training began from an adapter, `initial`. All share the base model, which never changes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

POLICY, INITIAL = "default", "initial"

LEFT_OUT = {  # settings of LoraConfig under which the adapter is not just a product B A per linear layer
    "use_dora": "DoRA also learns the magnitude of every output",
    "lora_bias": "a bias is learnt beside B",
    "modules_to_save": "these modules are trained in full",
    "trainable_token_indices": "the embeddings of these tokens are trained in full",
    "target_parameters": "these are bare parameters, not linear layers",
    "layer_replication": "replicated layers share one base layer",
    "use_qalora": "QALoRA pools the inputs of A",
    "alora_invocation_tokens": "aLoRA acts on some of the tokens only",
    "megatron_config": "Megatron splits the factors over processes",
}


def refuse_unaverageable(peft_config: PeftConfig) -> None:
    """ValueError, with the reason, for an adapter that is anything but products B A on frozen weights."""
    if peft_config.peft_type != PeftType.LORA:
        found = f"peft_type={getattr(peft_config.peft_type, 'value', peft_config.peft_type)}"
        reason = "it has no pair of factors B A per weight"
    elif peft_config.bias != "none":
        found, reason = f"bias={peft_config.bias!r}", "biases of the base model are trained in place"
    elif peft_config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        found = f"init_lora_weights={peft_config.init_lora_weights!r}"
        reason = "such an initialisation depends on the base weights and may change them"
    else:
        variants = [f.name for f in dataclasses.fields(peft_config) if f.metadata.get("is_lora_variant")]
        setting = next((name for name in (*LEFT_OUT, *variants) if getattr(peft_config, name, None)), None)
        if setting is None:
            return
        found = f"{setting}={getattr(peft_config, setting)!r}"
        reason = LEFT_OUT.get(setting, "this variant of LoRA computes more than the product B A")
    raise ValueError(f"The adapter has {found}: {reason}, which the average of a moving reference would "
                     "silently leave out. Use a plain LoraConfig.")


def averageable_layers(policy: PeftModel) -> dict[str, LoraLayer]:
    """The policy's LoRA layers by module name; ValueError for what an average of products leaves out."""
    if list(policy.active_adapters) != [POLICY]:
        raise ValueError(f"The active adapter is {policy.active_adapter!r}; the policy has to be the adapter "
                         f"{POLICY!r} alone. Load it under this name, as PEFT does by itself.")
    refuse_unaverageable(policy.peft_config[POLICY])
    layers = {}
    for name, module in policy.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and POLICY in module.r:
            if POLICY not in module.lora_A or not isinstance(module.lora_A[POLICY], nn.Linear):
                raise ValueError(f"{name} is a {type(module.get_base_layer()).__name__} with LoRA: only "
                                 "linear layers can be averaged. Take it out of target_modules.")
            layers[name] = module
    trained = {id(w[POLICY].weight) for layer in layers.values() for w in (layer.lora_A, layer.lora_B)}
    beside = [name for name, w in policy.named_parameters() if w.requires_grad and id(w) not in trained]
    if beside:
        raise ValueError(f"{len(beside)} parameters beside the adapter are trained (the first: {beside[0]}): "
                         "a reference of adapters would never see them move. Freeze them.")
    return layers


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), float32, detached; B includes the scaling, which differs with the rank."""
    B, A = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    return B.detach().float() * layer.scaling[adapter], A.detach().float()


@torch.no_grad()
def write_factors(layer: LoraLayer, adapter: str, B: Tensor, A: Tensor) -> None:
    """Make B A the adapter's product: B (out, k), A (k, in) with k up to its rank, zeros beyond."""
    for weight, part in ((layer.lora_B[adapter].weight, B), (layer.lora_A[adapter].weight, A)):
        weight.zero_()
        weight[: part.shape[0], : part.shape[1]] = part


def copy_policy(layer: LoraLayer, adapter: str) -> int:
    """Make `adapter` an exact copy of the policy's product; returns the rank used, 0 if it is zero."""
    B, A = factors(layer, POLICY)
    write_factors(layer, adapter, B, A)
    return A.shape[0] if B.any() and A.any() else 0


def add_copy(policy: PeftModel, layers: dict[str, LoraLayer], adapter: str, rank: int) -> dict[str, int]:
    """Add a frozen float32 copy of the policy, of scaling 1, on just these layers; returns the ranks used."""
    guard_4bit(policy)  # what the copy is for, a pass in eval mode, would spoil 4-bit weights
    if adapter in policy.peft_config:
        raise ValueError(f"The policy already has an adapter {adapter!r}: go on with it, or remove it first "
                         f"with policy.delete_adapter({adapter!r}).")
    # PEFT matches a string in full, but the entries of a list against endings of names
    exactly = "|".join(map(re.escape, layers))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly, inference_mode=True)
    # PEFT draws A at random. A run must not draw other numbers because there is a reference beside it
    with torch.random.fork_rng(devices=[]):
        policy.add_adapter(adapter, config)
    for layer in layers.values():
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            factor.float().requires_grad_(False)
    return {name: copy_policy(layer, adapter) for name, layer in layers.items()}


def add_initial_adapter(policy: PeftModel) -> None:
    """Keep what the policy's adapter is now as the frozen adapter `initial`, unless it is still zero."""
    layers = averageable_layers(policy)
    if any(B.any() and A.any() for B, A in (factors(layer, POLICY) for layer in layers.values())):
        add_copy(policy, layers, INITIAL, rank=max(layer.r[POLICY] for layer in layers.values()))


def using_initial(policy: PeftModel):
    """The module *as* the initial policy: the adapter `initial` if there is one, else the base."""
    return switched(policy, INITIAL if INITIAL in policy.peft_config else None)


@contextmanager
def switched(policy: PeftModel, adapter: str | None):
    """Yield the module with another adapter (None: the base), in eval mode, without gradients.

    On exit all that PEFT changes is as it was: active adapter, requires_grad, mode of every module.
    """
    if any(layer.disable_adapters for layer in policy.modules() if isinstance(layer, LoraLayer)):
        raise RuntimeError(f"The policy's adapters are switched off, so {adapter or 'the base'!r} cannot be "
                           "switched to. Leave policy.disable_adapter() or using_initial() first.")
    active = policy.active_adapter
    gradients = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        with eval_mode(policy), torch.no_grad(), nullcontext() if adapter else policy.disable_adapter():
            if adapter:
                policy.set_adapter(adapter, inference_mode=True)
            yield policy
    finally:
        policy.set_adapter(active)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def guard_4bit(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in eval mode; call it before a model's first forward.

    On CPUs with AVX512-BF16 a forward in eval mode repacks the weights for inference: training after it has
    silently wrong gradients in layers without bias. RuntimeError if it happened already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # only bitsandbytes' Linear4bit has it
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise RuntimeError(f"A forward in eval mode has already repacked the 4-bit weights of {name}:"
                                   " gradients would be wrong. Load the model again, call guard_4bit first.")
            module.support_avx512bf16_for_cpu = False
