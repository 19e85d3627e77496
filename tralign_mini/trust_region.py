"""The trust region: when the reference policy moves, and how far (arXiv 2404.09656).

Every tau optimizer steps:   reference <- alpha * policy + (1 - alpha) * reference

in parameter space, after the optimizer step. A *hard* update is alpha = 1: the reference becomes the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import nn


@dataclass(frozen=True)
class TrustRegion:
    """How the reference follows the policy: by the share `alpha`, every `tau` optimizer steps.

    alpha: the weight of the *policy* in the update, in (0, 1]; 1 is a hard update.
    tau:   a *period* in optimizer steps, >= 1. (In DQN's soft update, tau is the name of the weight.)
    Both are None if the reference never moves: `TrustRegion.fixed()`. ValueError for anything else.
    """

    alpha: float | None
    tau: int | None

    def __post_init__(self):
        if self.alpha is None and self.tau is None:
            return
        _check_alpha(self.alpha)
        if not isinstance(self.tau, Integral) or isinstance(self.tau, bool) or self.tau < 1:
            raise ValueError(f"tau = {self.tau!r}: it counts optimizer steps from update to update, a whole "
                             "number >= 1. For a reference that never moves: TrustRegion.fixed().")

    @classmethod
    def soft(cls, alpha: float, tau: int = 1) -> TrustRegion:
        """Move a part of the way, often."""
        return cls(alpha, tau)

    @classmethod
    def hard(cls, tau: int) -> TrustRegion:
        """Become the policy, seldom."""
        return cls(1.0, tau)

    @classmethod
    def fixed(cls) -> TrustRegion:
        """Never move: plain DPO, IPO or KTO."""
        return cls(None, None)

    @property
    def kind(self) -> str:
        """"fixed", "hard" (alpha = 1) or "soft"."""
        if self.tau is None:
            return "fixed"
        return "hard" if self.alpha == 1 else "soft"

    def is_due(self, step: int) -> bool:
        """Does the reference move after `step` finished optimizer steps? Not at 0: nothing was learnt yet."""
        return self.tau is not None and step > 0 and step % self.tau == 0

    def updates(self, total_steps: int) -> int:
        """How often the reference moves in a run of `total_steps` optimizer steps."""
        return 0 if self.tau is None else total_steps // self.tau


@torch.no_grad()
def update_reference(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, for every parameter and buffer, in place.

    For alpha < 1 the arithmetic has the reference's precision, float32 or better. alpha = 1 copies to the bit
    in any dtype (and rounds only if the reference is stored in fewer bits than the policy). Integer and bool
    buffers are copied, and a number of a float buffer that is the same in both stays, infinities (of a mask)
    included. Tied tensors move once. Source: arXiv 2404.09656.

    ValueError, before anything is touched, if the modules differ in names or shapes, share memory, or hold
    something that cannot be averaged (quantized weights, a 16-bit reference with alpha < 1).
    """
    _check_alpha(alpha)
    fused, single, copied = [], [], []
    for name, target, source in _matched(reference, policy):
        if alpha == 1 or not target.is_floating_point():
            copied.append((target, source))
        elif target.element_size() < 4:
            raise ValueError(
                f"the reference stores {name} in {target.dtype} and alpha = {alpha!r}: 16 bits lose small "
                "steps (50 updates with alpha 0.1 cover 9 % of the way). Use reference.float().")
        else:
            alike = (target.dtype, target.device) == (source.dtype, source.device)
            (fused if alike and isinstance(target, nn.Parameter) else single).append((target, source))

    if fused:
        torch._foreach_lerp_(*zip(*fused), alpha)
    for target, source in single:  # one at a time: never a second copy of the model
        source = source.to(target)
        moved = target.lerp(source, alpha)  # NaN where both are the same infinity
        target.copy_(moved.where(target != source, target))
    for target, source in copied:
        target.copy_(source)


def _matched(reference, policy):
    """[(name, reference's tensor, policy's tensor)], tied ones once; ValueError if they do not match."""
    targets, sources = _tensors(reference), _tensors(policy)
    here, there = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (targets, sources))
    if different := [f"{name} {here.get(name, 'missing')} and {there.get(name, 'missing')}"
                     for name in here | there if here.get(name) != there.get(name)]:
        raise ValueError(f"reference and policy differ in {len(different)} tensors: "
                         f"{', '.join(different[:3])}. Load both from one model. Is one wrapped (DDP)?")
    for name, tensor in [*targets.items(), *sources.items()]:
        _check_averageable(name, tensor)
    policy_memory = {_place(source)[:2] for source in sources.values()}
    matched = {}
    for name, target in targets.items():
        if target.numel() == 0:
            continue
        if _place(target)[:2] in policy_memory:
            raise ValueError(f"{name} of the reference shares its memory with the policy, so it would follow "
                             "every gradient step. Copy the policy before training: copy.deepcopy(policy).")
        first, _, source = matched.setdefault(_place(target), (name, target, sources[name]))
        if _place(source) != _place(sources[name]):
            raise ValueError(f"the reference ties {name} to {first} and the policy does not. Make the "
                             "reference a copy of this policy: copy.deepcopy(policy).")
    return list(matched.values())


def _tensors(module):
    """Parameters and buffers by name: every name of a tied one, and buffers that `state_dict` leaves out."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _place(tensor):
    """Equal for two tensors in the same memory, also where they are two Python objects."""
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def _check_averageable(name, tensor):
    # bitsandbytes by its class names: its codes can be stored in a floating-point dtype, too
    quantized = type(tensor).__name__ in ("Params4bit", "Int8Params")
    if quantized or (isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()):
        raise ValueError(f"{name} is quantized ({type(tensor).__name__}, {tensor.dtype}): an average of "
                         "codes is not the code of an average. Train an adapter on the quantized model and "
                         "use an adapter reference (AdapterReference), which averages adapters.")
    if tensor.numel() and tensor.data_ptr() == 0:
        raise ValueError(f"{name} has no memory of its own here (offloaded to the meta device, or sharded as "
                         f"a {type(tensor).__name__}). Load the whole model into memory.")


def _check_alpha(alpha):
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 < alpha <= 1:
        raise ValueError(f"alpha = {alpha!r}: the weight of the policy in the new reference is in (0, 1]; 1 "
                         "is a hard update. For a reference that never moves: TrustRegion.fixed().")
