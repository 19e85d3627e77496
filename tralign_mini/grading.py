"""How an exercise is graded: the learner's function beside the right one, and beside planted mistakes."""

from __future__ import annotations

import copy

import torch

from . import losses


class NotYet(Exception):
    """What the learner is told."""


@torch.enable_grad()
def grade(name, learner, rights, cases, mistakes, verified, advice, run=None) -> bool:
    """Compare the learner's function with each of the right ones, then with the mistakes.

    cases: (arguments, keywords); mistakes: (text, function); advice: if it is none of them.
    run(function, *arguments, **keywords), if given, makes one tensor of what a function does.
    """
    def answers(function):
        return [_answer(run, function, case) for case in cases]

    def difference(mine, truth):
        for (a, _), (b, _) in zip(mine, truth):
            if (apart := ~_close(a, b)).any():
                return [[round(x, 4) for x in numbers[apart][:4].tolist()] for numbers in (a, b)]

    try:
        truths = [answers(right) for right in rights]
        mine = [_answer(run, _guarded(learner), case, a.shape) for case, (a, _) in zip(cases, truths[0])]
        truth = next((truth for truth in truths if not difference(mine, truth)), None)
        if truth is None:
            numbers, wanted = difference(mine, truths[0])
            named = (text for text, wrong in mistakes if not difference(mine, answers(wrong)))
            cause = next((f"Exactly that comes out if {text}" for text in named), f"Test it: {advice}")
            raise NotYet(f"It gives {numbers} where {wanted} is right. {cause}")
        for answer, right in zip(mine, truth):
            _check_gradient(*answer, *right)
    except NotYet as message:
        print(f"{name}: not yet. {message}".rstrip())
        return False
    print(f"{name}: right! {verified}")
    return True


def _guarded(function):
    """The learner's function, with a message for whatever it raises."""
    def call(*args, **keywords):
        try:
            return function(*args, **keywords)
        except Exception as error:
            hint = ("Is the update under torch.no_grad()?" if "leaf Variable" in str(error) else
                    "" if error.__traceback__.tb_next else "Pass a function of the docstring's signature.")
            raise NotYet(f"It raises {type(error).__name__}: {str(error).rstrip('.')}. {hint}") from None
    return call


def _answer(run, function, case, shape=None):
    """What the function gives on a copy of the case, as a finite tensor, and the inputs with a gradient."""
    args, keywords = copy.deepcopy(case)
    answer = run(function, *args, **keywords) if run else function(*args, **keywords)
    if isinstance(answer, losses.PreferenceLoss):
        answer = answer.losses
    elif isinstance(answer, (int, float)) and not shape:  # where one number is asked for, it may be Python's
        answer = torch.tensor(float(answer))
    is_tensor = isinstance(answer, torch.Tensor)
    if not is_tensor or not answer.is_floating_point() or shape not in (None, answer.shape):
        got = f"{answer.dtype}, shape {tuple(answer.shape)}" if is_tensor else type(answer).__name__
        asked = f"a floating-point tensor of shape {tuple(shape)}" if shape else "one number"
        hint = ("Is it still to be written, or is `return` missing?" if answer is None else
                "Numbers carry no gradient: leave out .item()." if isinstance(answer, (float, list)) else
                "Leave out .mean() over the batch." if shape and is_tensor and not answer.ndim else "")
        raise NotYet(f"It returns {got}, where {asked} is asked for. {hint}")
    if not answer.isfinite().all():
        raise NotYet("It returns NaN or infinity, maybe for large inputs only: log of a tiny number, exp of "
                      "a large one. torch has logsigmoid, log_softmax and logsumexp instead.")
    return answer, [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]


def _check_gradient(answer, inputs, wanted, wanted_inputs):
    if answer.requires_grad and not wanted.requires_grad:
        raise NotYet("The number is right, but it carries a gradient: training would push on it, too. It "
                      "has to be a constant of the step: torch.no_grad() or .detach().")
    if wanted.requires_grad and not answer.requires_grad:
        raise NotYet("The numbers are right, but carry no gradient, so nothing would be learnt: .detach(), "
                      ".item(), torch.tensor(...) and torch.no_grad() all cut it.")
    if wanted.requires_grad:
        try:
            gradients = torch.autograd.grad(answer.sum(), inputs, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            raise NotYet(f"The numbers are right, but their gradient cannot be taken: {error}") from None
        right = torch.autograd.grad(wanted.sum(), wanted_inputs)
        if not all(_close(a, b).all() for a, b in zip(gradients, right)):
            raise NotYet("The numbers are right, but not their gradient: a part of the policy's is cut off.")


def _close(a, b):
    return torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)
