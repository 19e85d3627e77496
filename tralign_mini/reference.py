"""The reference policy: a frozen float32 copy or, with LoRA, an adapter beside the policy's on one base.

With LoRA the average of arXiv 2404.09656 (sec. 3) is taken over the *weights*:

    B_ref A_ref <- alpha s B A + (1 - alpha) B_ref A_ref          (s: the policy's scaling, absorbed)

Averaging A and B one by one is another point, alpha (1 - alpha) (B - B_ref)(A - A_ref) away. So the reference
has a larger rank: it stacks the factors while they fit, which is exact, and is the best product of its rank
after that.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter_math import ROUNDING, best_rank, precise, product_norm
from .adapters import POLICY, add_copy, averageable_layers, copy_policy, factors, switched, write_factors
from .trust_region import TrustRegion, update_reference

REFERENCE = "reference"


def make_reference(policy: nn.Module, *, rank: int | None = None) -> FrozenReference | AdapterReference:
    """The reference for this policy: an adapter if it is a `PeftModel`, else a frozen copy."""
    if isinstance(policy, PeftModel):
        return AdapterReference(policy, rank=rank)
    if rank is not None:
        raise ValueError(f"rank={rank}: this policy has no adapter, its reference is a copy. Leave rank out.")
    return FrozenReference(policy)


class FrozenReference:
    """A float32 copy of a policy trained in full. ValueError for a quantised or an adapted policy."""

    def __init__(self, policy: nn.Module):
        if isinstance(policy, PeftModel):
            raise ValueError("The policy has adapters: a copy would average A and B one by one, not the "
                             "weights. Use AdapterReference(policy).")
        if method := getattr(policy, "quantization_method", None):
            raise ValueError(f"The policy is quantised ({method.value}): codes can be neither trained nor "
                             "averaged. Load it unquantised, or train a LoRA adapter on it.")
        self.policy, self.updates = policy, 0
        # float32: in 16 bits a small step of the average would be rounded away
        self.model = copy.deepcopy(policy).float().requires_grad_(False).eval()

    @contextmanager
    def using(self):
        """Yield the module that is the reference, in eval mode, without gradients."""
        with torch.no_grad():
            yield self.model.eval()

    def update(self, alpha: float) -> dict[str, float]:
        """reference <- alpha * policy + (1 - alpha) * reference. Exact, so there is nothing to log."""
        update_reference(self.model, self.policy, alpha)
        self.updates += 1
        return {}

    def save(self, folder: Path) -> None:
        """Write weights, buffers and the number of updates: reference.safetensors, reference.json."""
        _save(folder, self._tensors(), {"updates": self.updates})

    def load(self, folder: Path) -> None:
        """Take back, to the bit, what `save` wrote. ValueError, and nothing changed, if it does not fit."""
        self.updates = _load(folder, self._tensors())["updates"]

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())  # tied ones appear once


class AdapterReference:
    """An adapter `reference` beside the policy's adapter `default` on one base; starts as its exact copy.

    policy: a `PeftModel` with plain LoRA on linear layers; ValueError where the average of products B A would
    leave something out. rank: the reference's R, at least the policy's (largest) r; 4 r if None. Its factors
    are float32 and frozen, its scaling is 1.
    """

    def __init__(self, policy: PeftModel, *, rank: int | None = None):
        layers = averageable_layers(policy)
        largest = max(layer.r[POLICY] for layer in layers.values())
        rank = 4 * largest if rank is None else rank
        if rank < largest:
            raise ValueError(f"rank={rank}: the reference could not hold a copy of the policy, whose rank is "
                             f"{largest}. Leave rank out to get {4 * largest}.")
        self.policy, self.rank, self.updates, self._layers = policy, rank, 0, layers
        self._used = add_copy(policy, layers, REFERENCE, rank)  # ranks in use; the factors are zero beyond
        self._errors = dict.fromkeys(layers, 0.0)  # bounds of the accumulated error, absolute Frobenius norms

    def using(self):
        """A context with the policy's module *as* the reference, in eval mode, without gradients."""
        return switched(self.policy, REFERENCE)

    @torch.no_grad()
    def update(self, alpha: float) -> dict[str, float]:
        """B_ref A_ref <- alpha s B A + (1 - alpha) B_ref A_ref; alpha = 1 copies the factors.

        Exact while the ranks add up to R at most, then the best product of rank R. Returns Frobenius norms
        relative to the update's, alpha |s B A - B_ref A_ref| (at least float32's resolution of the policy),
        pooled over modules and (`..._worst`) of the worst one: `reference/truncation_error` is t_k, what this
        update has cut off; `reference/error_bound` is e_k = (1 - alpha) e_{k-1} + t_k, a bound of what all
        have. ValueError for an alpha outside (0, 1] and for a policy that is not finite.
        """
        TrustRegion.soft(alpha)  # checks alpha
        self._check_factors()
        self.updates += 1
        cuts, norms = dict.fromkeys(self._layers, 0.0), {}
        if alpha == 1:
            self._used = {name: copy_policy(layer, REFERENCE) for name, layer in self._layers.items()}
        else:
            for names in self._groups():
                self._average(names, alpha, cuts, norms)
        for name, cut in cuts.items():
            self._errors[name] = (1 - alpha) * self._errors[name] + cut
        return _relative("truncation_error", cuts, norms) | _relative("error_bound", self._errors, norms)

    def _average(self, names: list[str], alpha: float, cuts: dict, norms: dict) -> None:
        """The soft update of modules of equal shape; notes the norms of cuts and of updates."""
        B, A = self._stacked(names, POLICY)
        B_ref, A_ref = self._stacked(names, REFERENCE)
        policy_norms = product_norm(B, A)
        moves = alpha * product_norm(torch.cat([B, -B_ref], 2), torch.cat([A, A_ref], 1))
        norms.update(zip(names, torch.maximum(moves, ROUNDING * policy_norms).tolist(), strict=True))
        B, B_ref = alpha * B, (1 - alpha) * B_ref
        full = []
        for i, (name, norm) in enumerate(zip(names, policy_norms.tolist(), strict=True)):
            used, added = self._used[name], A.shape[1] if norm else 0
            if used + added > self.rank:
                full.append(i)
                continue
            new_B = torch.cat([B_ref[i, :, :used], B[i, :, :added]], 1)
            new_A = torch.cat([A_ref[i, :used], A[i, :added]])
            write_factors(self._layers[name], REFERENCE, new_B, new_A)
            self._used[name] = used + added
        if full:
            stacks = torch.cat([B_ref[full], B[full]], 2), torch.cat([A_ref[full], A[full]], 1)
            for i, new_B, new_A, cut, used in zip(full, *best_rank(*stacks, self.rank), strict=True):
                write_factors(self._layers[names[i]], REFERENCE, new_B, new_A)
                cuts[names[i]], self._used[names[i]] = cut.item(), int(used)

    def save(self, folder: Path) -> None:
        """Write the factors, and the ranks in use, error bounds and number of updates, as two files."""
        state = {"rank": self.rank, "updates": self.updates, "used": self._used, "errors": self._errors}
        _save(folder, self._tensors(), state)

    def load(self, folder: Path) -> None:
        """Take back, to the bit, what `save` wrote. ValueError, and nothing changed, if it does not fit."""
        state = _load(folder, self._tensors(), rank=self.rank)
        self.updates, self._used, self._errors = state["updates"], state["used"], state["errors"]

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{factor}": getattr(layer, factor)[REFERENCE].weight
                for name, layer in self._layers.items() for factor in ("lora_A", "lora_B")}

    def _groups(self) -> list[list[str]]:
        """Names of modules, those of equal shape together: one batched QR and SVD for each group."""
        groups = defaultdict(list)
        for name, layer in self._layers.items():
            A, B = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
            groups[A.device, A.shape, B.shape].append(name)
        return list(groups.values())

    def _stacked(self, names: list[str], adapter: str) -> tuple[Tensor, Tensor]:
        pairs = [factors(self._layers[name], adapter) for name in names]
        return torch.stack([precise(B) for B, _ in pairs]), torch.stack([precise(A) for _, A in pairs])

    def _check_factors(self) -> None:
        for name, layer in self._layers.items():
            dtype = layer.lora_A[REFERENCE].weight.dtype
            if dtype != torch.float32:
                raise ValueError(f"The reference's factors on {name} were cast to {dtype}, in which small "
                                 "steps are rounded away. Cast the policy before its reference is made.")
            if not all(factor.isfinite().all() for factor in factors(layer, POLICY)):
                raise ValueError(f"The policy's adapter on {name} is not finite, so the reference does not "
                                 "follow it. Training has diverged: lower the learning rate.")


def _relative(name: str, errors: dict[str, float], norms: dict[str, float]) -> dict[str, float]:
    """Errors over the updates' norms: pooled (root of the sum of squares) and worst module; 0/0 is 0."""
    pooled = math.hypot(*norms.values())
    worst = max((errors[module] / norm for module, norm in norms.items() if norm), default=0.0)
    total = math.hypot(*errors.values()) / pooled if pooled else 0.0
    return {f"reference/{name}": total, f"reference/{name}_worst": worst}


def _save(folder: Path, tensors: dict[str, Tensor], state: dict) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contents, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(state, indent=1))


@torch.no_grad()
def _load(folder: Path, tensors: dict[str, Tensor], **expected) -> dict:
    """Fill `tensors`, all or none; returns the saved state, which has to agree with what is `expected`."""
    folder = Path(folder)
    if not (folder / "reference.json").is_file():
        raise ValueError(f"{folder} holds no saved reference: there is no reference.json in it.")
    try:
        state = json.loads((folder / "reference.json").read_text())
        saved = load_file(folder / "reference.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"The reference saved in {folder} cannot be read ({error}): it is damaged. Go on "
                         "from an older checkpoint.") from error
    def forms(named: dict[str, Tensor]) -> dict:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()}

    here, there = expected | forms(tensors), {key: state.get(key) for key in expected} | forms(saved)
    wrong = [f"{key} is {there.get(key, 'missing')} there, {here.get(key, 'missing')} here"
             for key in here | there if here.get(key) != there.get(key)]
    if wrong:
        raise ValueError(f"The reference saved in {folder} does not fit: {'; '.join(wrong[:3])}. Make policy "
                         "and reference with the settings of the run that saved it.")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return state
