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
from .sharing import without_dropout

DEVICES = ("cuda",)  # on a CPU it has no gradient
LONG = 600  # seconds of a run; in a shorter one compiling, about a minute, takes what it could save
GAIN = 1.05  # times as fast; less is noise
TURNED = 0.05  # relative difference of the gradients; what bfloat16 rounds is less, a wrong kernel more
SAMPLE = 2**16  # numbers of each weight's gradient that are compared
KERNELS = 64  # lengths, precisions, with and without gradient: torch gives up at 8, and takes all memory


def prefer_flex(models, batches: list[dict], score, times: int, check: Callable) -> tuple[bool, str]:
    """Whether `models` take FlexAttention for packed rows from now on, and a line that says why, or "".

    models: the policy, which is tried, and its reference. batches: packed rows on the device; score: the
    function of model and batch that training takes; times: how often a run goes through as much as `batches`.
    check: raises if packed rows are not exact with what the policy has by then. Compiled and tried only if
    these passes take at least `LONG` seconds; what fails leaves SDPA as it was.
    """
    policy = models[0]
    with without_dropout(policy):
        if _passes(policy, batches, score, 1)[0] * times < LONG:
            return False, ""
        seconds, grads = _passes(policy, batches, score, 3)
        set_flex(models, True)
        try:
            torch._dynamo.config.recompile_limit = max(KERNELS, torch._dynamo.config.recompile_limit)
            check()
            flex_seconds, flex_grads = _passes(policy, batches, score, 3)
            turned = ((flex_grads - grads).norm() / grads.norm()).item()
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


def _passes(policy, batches: list[dict], score, number: int) -> tuple[float, torch.Tensor]:
    """Seconds of the fastest of so many passes, after one that may compile, and some of the gradients.

    A pass goes through all batches: without a gradient, as the reference does, then with one, as the policy.
    """
    weights, spans = [weight for weight in policy.parameters() if weight.requires_grad], []
    for _ in range(1 + number):
        policy.zero_grad()
        _synchronize()
        start = time.perf_counter()
        for batch in batches:
            with torch.no_grad():
                score(policy, batch)
            score(policy, batch).sum().backward()
        _synchronize()
        spans.append(time.perf_counter() - start)
    grads = [weight.grad.flatten()[:SAMPLE].float() for weight in weights if weight.grad is not None]
    policy.zero_grad()
    return min(spans[1:]), torch.cat(grads)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
