"""Tiny policies with LoRA, and what their adapters amount to as dense weights (by PEFT's own arithmetic)."""

from __future__ import annotations

import torch
from helpers import VOCAB, tiny_neox
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn


def adapted(model: nn.Module | None = None, *, seed: int = 0, **lora) -> PeftModel:
    """A policy with LoRA on all its linear layers; random A and B, so that it is not the base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        defaults = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False}
        return get_peft_model(tiny_neox() if model is None else model, LoraConfig(**defaults | lora))


def two_linears() -> nn.Module:
    """The smallest thing PEFT adapts: names `first` (6 -> 8) and `second` (8 -> 5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 5)})


@torch.no_grad()
def shake(policy: PeftModel, seed: int, size: float = 0.3) -> None:
    """Move the policy's factors at random: what an optimizer does, as far as the reference can tell."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        if ".default." in name:
            weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight.dtype))


def lora_layers(policy: PeftModel) -> dict[str, LoraLayer]:
    return {n: m for n, m in policy.base_model.model.named_modules() if isinstance(m, LoraLayer)}


def dense(policy: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The adapter as dense weights, in float64."""
    weights = {}
    for name, layer in lora_layers(policy).items():
        B, A = layer.lora_B[adapter].weight.detach().double(), layer.lora_A[adapter].weight.detach().double()
        weights[name] = layer.scaling[adapter] * B @ A
    return weights


def norm(weights: dict[str, torch.Tensor]) -> float:
    return sum(weight.square().sum().item() for weight in weights.values()) ** 0.5


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: left[name] - right[name] for name in left}


def average(alpha: float, left: dict, right: dict) -> dict[str, torch.Tensor]:
    return {name: alpha * left[name] + (1 - alpha) * right[name] for name in left}


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits.detach()


def gradients(policy: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a language-modelling loss, in train mode, for everything that is trained."""
    policy.train().zero_grad()
    policy(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.requires_grad}
