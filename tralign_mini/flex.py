"""FlexAttention for packed rows on a GPU, where it is exact and faster than SDPA: tried, not believed.

SDPA takes the mask as a tensor and goes through all of a row for every token. FlexAttention skips the blocks
of 128 x 128 tokens in which nobody sees anybody, but has to be compiled first, for short runs in vain. Whole
sequences and sampling stay with SDPA.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .attention import set_flex

DEVICES = ("cuda",)  # on a CPU it has no gradient
LONG = 600  # seconds of a run; in a shorter one compiling, about a minute, takes what it could save
GAIN = 1.05  # times as fast; less is noise
TURNED = 0.05  # relative difference of the gradients; what bfloat16 rounds is less, a wrong kernel more


def prefer_flex(models, batches: list[dict], score, times: int, check: Callable) -> tuple[bool, str]:
    """Whether `models` take FlexAttention for packed rows from now on, and a line that says why, or "".

    models: the policy, which is tried, and its reference. batches: packed rows on the device, of different
    lengths; score: the function of model and batch that training takes; times: how often a run goes through
    as much as `batches`. check: raises if packed rows are not exact with what the policy has by then.
    Compiled and tried only in a run of at least `LONG` seconds; what fails leaves SDPA as it was.
    """
    seconds, grads = _pass(models[0], batches, score)
    if seconds * times < LONG:
        return False, ""
    set_flex(models, True)
    try:
        check()
        flex_seconds, flex_grads = _pass(models[0], batches, score)
        turned = _norm([flex - grad for flex, grad in zip(flex_grads, grads)]) / _norm(grads)
        if not turned <= TURNED:
            raise ArithmeticError(f"its gradients differ by {turned:.1%}")
    except Exception as error:  # whatever it is: SDPA has just worked
        set_flex(models, False)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return False, f"packed rows with SDPA; FlexAttention fails here: {reason}"
    gain = seconds / flex_seconds
    if gain >= GAIN:
        return True, f"packed rows with FlexAttention: {gain:.2f} times as fast as with SDPA"
    set_flex(models, False)
    return False, f"packed rows with SDPA: FlexAttention is {gain:.2f} times as fast"


def _pass(model, batches: list[dict], score) -> tuple[float, list[torch.Tensor]]:
    """Seconds forward and backward through all batches, the best of three, and the scores' gradients."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    spans = []
    for _ in range(4):  # the first compiles
        _synchronize()
        start, total = time.perf_counter(), None
        for batch in batches:
            grads = torch.autograd.grad(score(model, batch).sum(), weights, materialize_grads=True)
            total = grads if total is None else torch._foreach_add(total, grads)
        _synchronize()
        spans.append(time.perf_counter() - start)
    return min(spans[1:]), list(total)


def _norm(tensors: list[torch.Tensor]) -> float:
    return torch.nn.utils.get_total_norm(tensors).item()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
