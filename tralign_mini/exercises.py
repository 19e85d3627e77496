"""Checks for the notebooks' exercises: is a function right, and if not, which usual mistake is in it?

`check_NAME(function)` compares the learner's function with the right one on small inputs, numbers and
gradients. Wrong numbers are looked up among planted mistakes; the one that gives exactly the same is named,
with a hint. A check prints one message and returns True or False. It does not raise, so that a notebook with
open exercises runs to its end; nothing but "right!" and True means solved. The docstrings state the
signatures: names after `*` are passed by keyword, all others by position.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from . import losses
from .grading import NotYet, grade
from .trust_region import update_reference

BETA = "beta is forgotten. Try two values of beta: what should change?"
ALPHA = "alpha and 1 - alpha are swapped. alpha is the weight of the policy: what should alpha = 1 do?"


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(seed):
    return nn.Embedding.from_pretrained(_random(12, 12, seed=seed), freeze=False)


def _logps(n, *extra):
    """Cases: n log-probs of the policy (with gradient), n of the reference, `extra`; beta. Then extremes."""
    for size, spread, beta in ((2, 1, 0.5), (4, 8, 0.1), (4, 1000, 0.5)):
        logps = [(-spread * _random(size, seed=i).abs()).requires_grad_(i < n) for i in range(2 * n)]
        yield [*logps, *(x[:size] if x.ndim else x for x in extra)], {"beta": beta}


def _usual(right):
    """The mistakes that log-ratios invite: the right function, given other arguments."""
    return [
        ("the sign is flipped: rejected minus chosen, or reference minus policy. What should happen as the "
         "policy comes to like the chosen one more?", lambda *x, beta: right(*(-y for y in x), beta=beta)),
        (BETA, lambda *x, beta: right(*x, beta=1.0)),
        ("the reference is not subtracted. What has a policy earned that still equals it?",
         lambda *x, beta: right(*x[: len(x) // 2], *(0 * y for y in x[len(x) // 2 :]), beta=beta)),
    ]


def check_implicit_reward(function) -> bool:
    """`implicit_reward(policy_logps, reference_logps, *, beta)`: log-probs (batch,) -> rewards (batch,)."""
    def right(policy, reference, *, beta):
        return beta * (policy - reference)
    return grade("implicit_reward", function, [right], list(_logps(1)), _usual(right),
                  "Sign, beta and reference are in place.", "a policy equal to its reference earns 0.")


def check_dpo_loss(function) -> bool:
    """`dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    *, beta)`: log-probs (batch,) -> losses (batch,), not their mean. A `PreferenceLoss` is fine, too.
    """
    def right(*logps, beta):
        return losses.dpo_loss(*logps, beta=beta).losses
    return grade("dpo_loss", function, [right], list(_logps(2)), [
        *_usual(right),
        ("the minus in front is forgotten. A loss is minimised.", lambda *x, beta: -right(*x, beta=beta)),
        ("beta stands outside the sigmoid.", lambda *x, beta: beta * right(*x, beta=1.0)),
        ("the log is missing: it is 1 - sigmoid.", lambda *x, beta: -torch.expm1(-right(*x, beta=beta))),
    ], "Values, gradient, no overflow at large margins.", "where policy and reference agree, it is log 2.")


def check_ipo_loss(function) -> bool:
    """`ipo_loss(...)`: the arguments of `dpo_loss`, log-probs summed over tokens -> losses (batch,)."""
    right = losses.ipo_loss
    return grade("ipo_loss", function, [right], list(_logps(2)), [
        *_usual(right),
        ("the target is 1 / beta: its 2 is forgotten.", lambda *x, beta: right(*x, beta=beta / 2)),
        ("the target is beta / 2. A small beta puts it far out.", lambda *x, beta: right(*x, beta=1 / beta)),
        ("this is DPO's loss. IPO is a regression, without a sigmoid.", losses.dpo_loss),
    ], "The margin is drawn to 1 / (2 beta), from both sides.", "at a margin of 1 / (2 beta) the loss is 0.")


def check_kto_loss(function) -> bool:
    """`kto_loss(policy_logps, reference_logps, desirable, kl, *, beta)`: log-probs (batch,), a bool mask
    (batch,) and z0, a scalar tensor -> losses (batch,) in the batch's order; both weights are 1.
    """
    def right(*x, beta):
        return losses.kto_loss(*x, beta=beta).losses

    def given(change):
        return lambda *x, beta: right(*change(*x), beta=beta)
    cases = list(_logps(1, torch.tensor([True, False, False, True]), torch.tensor(0.75)))
    return grade("kto_loss", function, [right], cases, [
        ("the sign is flipped, or the value is taken for the loss.", given(lambda p, r, d, z: (p, r, ~d, z))),
        (BETA, lambda *x, beta: right(*x, beta=1.0)),
        ("the reference is not subtracted. z0 is a log-*ratio*.", given(lambda p, r, d, z: (p, 0 * r, d, z))),
        ("z0 is forgotten. A log-ratio is large next to it.", given(lambda p, r, d, z: (p, r, d, 0 * z))),
        ("every completion counts as desirable.", given(lambda p, r, d, z: (p, r, d | True, z))),
    ], "Both kinds of completions, z0 and beta.", "at a log-ratio of z0 every loss is 0.5.")


def check_reference_point(function) -> bool:
    """`reference_point(logratios)`: (n, n) -> KTO's z0, one number without gradient.

    logratios[i, j] belongs to completion j after prompt i: the diagonal holds the data's own pairs. Each
    prompt is to be paired with another one's completion; with which one, is free.
    """
    def ways(rule):
        next_ones = [lambda x, k=k: rule(x.roll(k, 1).diagonal()) for k in (1, 2, 3)]
        return [*next_ones, lambda x: rule(x[~torch.eye(4, dtype=torch.bool)])]
    cases = [([(_random(4, 4) + shift + 4 * torch.eye(4)).requires_grad_()], {}) for shift in (0.5, -2)]
    return grade("reference_point", function, ways(lambda x: x.mean().clamp(min=0).detach()), cases, [
        ("z0 comes from matched pairs, the diagonal. Rolling that changes nothing: its mean stays the same.",
         lambda x: x.diagonal().mean().clamp(min=0)),
        ("matched pairs are in the mean, too.", lambda x: x.mean().clamp(min=0)),
        *(("it is not clamped at 0: such a mean may be negative.", way) for way in ways(torch.mean)),
        *(("each row is clamped, not the mean.", way) for way in ways(lambda x: x.clamp(min=0).mean())),
    ], "Mismatched pairs, clamped after the mean, no gradient.", "which entries have i != j?")


def check_completion_logps(function) -> bool:
    """`completion_logps(logits, batch)`: a model's logits (n, L, vocabulary) and tensors (n, L) `input_ids`,
    `attention_mask`, `completion_mask` by name -> log p(completion | prompt), (n,), summed, EOS included.
    """
    ids = torch.tensor([[3, 4, 5, 6, 7, 1, 0], [8, 9, 2, 5, 2, 6, 1], [9, 3, 5, 4, 2, 7, 0]])
    counted = (torch.arange(7) >= torch.tensor([[3], [2], [4]])) & (ids > 0)  # 0 is padding, 1 is EOS
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "completion_mask": counted}
    cases = [([_random(3, 7, 10).requires_grad_(), batch], {})]

    def version(counted, shift=1, score=torch.log_softmax):
        def logps(logits, batch):
            tokens = score(logits[:, : 7 - shift], -1).gather(-1, ids[:, shift:, None])[..., 0]
            return (tokens * counted[:, shift:]).sum(-1)
        return logps
    return grade("completion_logps", function, [version(counted)], cases, [
        ("prompt tokens are counted. Which mask knows where the completion begins?", version(ids > 0)),
        ("prompt tokens are counted, and padding.", version(ids > -1)),
        ("the mean is taken for the sum.", version(counted / counted.sum(-1, keepdim=True))),
        ("the shift by one is forgotten: logits at t are for the token at t + 1.", version(counted, 0)),
        ("the mask is not shifted along: the first token is out.", version(counted.roll(1, 1))),
        ("EOS is left out. Where to stop is a part of the answer.", version(counted & (ids != 1))),
        ("the softmax is forgotten: logits are no log-probs.", version(counted, score=lambda x, _: x)),
    ], "The completion's tokens, EOS too, each predicted one place earlier.", "print what your mask keeps.")


def check_update_reference(function) -> bool:
    """`update_reference(reference, policy, alpha)`: two modules; moves the reference's weights in place."""
    def run(update, reference, policy, alpha):
        old, before = reference.weight, policy.weight.clone()
        returned = update(reference, policy, alpha)
        if reference.weight is not old or isinstance(returned, nn.Module) and returned is not reference:
            raise NotYet("The reference is replaced, not moved in place: who holds the old object sees no "
                          "update. lerp_, mul_, add_ and copy_ write into a tensor.")
        if old.requires_grad:
            raise NotYet("The gradient is tracked: all past policies stay in memory, as parts of the "
                          "reference's graph. Is the update under torch.no_grad()?")
        if old.data_ptr() == policy.weight.data_ptr() or not torch.equal(policy.weight, before):
            raise NotYet("The policy is moved, or both share their memory now. Copy its numbers only.")
        return old.clone()

    def moving(rule):
        return lambda r, p, alpha: r.weight.data.copy_(rule(r.weight, p.weight, alpha))
    cases = [([_model(1).requires_grad_(False), _model(2), alpha], {}) for alpha in (0.25, 0.6, 1.0)]
    return grade("update_reference", function, [update_reference], cases, [
        ("nothing moves. `p = ...` names a new tensor; the old one stays.", moving(lambda r, p, a: r)),
        (ALPHA, moving(lambda r, p, a: (1 - a) * p + a * r)),
        ("1 - alpha is forgotten: the old weights count in full.", moving(lambda r, p, a: r + a * p)),
    ], "By alpha, in place, without gradient.", "with alpha = 1, is it the policy then?", run)


def check_training(function) -> bool:
    """`training(policy, reference, optimizer, logps, *, steps, alpha, tau, beta)`: TR-DPO on one batch.

    `logps(model)` gives the log-probs of chosen and of rejected completions, each (batch,). A step minimises
    the mean DPO loss; after every tau-th step comes `tr.update_reference(reference, policy, alpha)`.
    """
    def run(training, policy, **how):
        reference, sgd = copy.deepcopy(policy), torch.optim.SGD(policy.parameters(), lr=10.0)
        training(policy, reference, sgd, lambda m: m.weight.log_softmax(1).unbind(1)[:2], **how)
        if reference.weight.grad is not None:
            raise NotYet("Gradient flows through the reference: a backward pass for nothing, and an "
                          "optimizer given it would train it. Is logps(reference) under torch.no_grad()?")
        return torch.cat([policy.weight, reference.weight]).detach()

    def version(order, first=1, share=lambda alpha: alpha):
        def training(policy, reference, optimizer, logps, *, steps, alpha, tau, beta):
            for step in range(first, steps + first):
                for action in order.split():
                    if action == "zero":
                        optimizer.zero_grad()
                    elif action == "loss":
                        fixed = (x.detach() for x in logps(reference))
                        losses.dpo_loss(*logps(policy), *fixed, beta=beta).losses.mean().backward()
                    elif action == "step":
                        optimizer.step()
                    elif step % tau == 0:
                        update_reference(reference, policy, share(alpha))
        return training
    right, early = "zero loss step move", ("zero loss move step", "move zero loss step")
    cases = [([_model(0)], {"steps": 8, "beta": 0.5, "alpha": a, "tau": t}) for a, t in ((0.25, 4), (0.6, 1))]
    return grade("training", function, [version(right)], cases, [
        ("nothing moves. Is optimizer.step() there?", version("")),
        *(("the reference moves before the optimizer step, and lags.", version(order)) for order in early),
        *(("there is an update at step 0: count from 1.", version(order, 0)) for order in (right, *early)),
        ("the reference never moves. Is it replaced by a copy?", version("zero loss step")),
        ("zero_grad() is forgotten: the gradients of all steps add up.", version("loss step move")),
        (ALPHA, version(right, share=lambda alpha: 1 - alpha)),
    ], "Step, then update; no gradient in the reference.", "alpha = tau = 1: each step starts at h = 0.", run)


def check_average_adapters(function) -> bool:
    """`average_adapters(B, A, B_ref, A_ref, *, alpha)` -> factors (B_new, A_new) of the soft update of the
    *weights*, the policy's B A and the reference's B_ref A_ref. B (out, r), A (r, in); a new rank <= r + r.
    """
    def run(average, *factors, alpha):
        new = average(*factors, alpha=alpha)
        got = [tuple(getattr(x, "shape", ())) for x in new] if isinstance(new, tuple) else type(new).__name__
        if got not in [[(5, k), (k, 6)] for k in (1, 2, 3, 4)]:
            raise NotYet(f"It returns {got}; asked are tensors (B_new, A_new), here (5, k), (k, 6), k <= 4.")
        return new[0].double() @ new[1].double()

    def stack(weight):
        return lambda B, A, B_ref, A_ref, alpha: (
            torch.cat([weight(alpha) * B, weight(1 - alpha) * B_ref], 1), torch.cat([A, A_ref]))
    factors = [_random(*shape, seed=seed) for seed, shape in enumerate([(5, 2), (2, 6), (5, 2), (2, 6)])]
    cases = [(factors, {"alpha": alpha}) for alpha in (0.25, 0.6)]
    return grade("average_adapters", function, [stack(lambda w: w)], cases, [
        ("A and B are averaged one by one. Multiply it out: which terms mix the two adapters?",
         lambda B, A, B_ref, A_ref, alpha: (B_ref.lerp(B, alpha), A_ref.lerp(A, alpha))),
        (ALPHA, stack(lambda w: 1 - w)),
        ("alpha is squared: it scales both factors.", stack(lambda w: w**2)),
    ], "The average of the products.", "which larger factors have a sum as their product?", run)


def check_kl_estimate(function) -> bool:
    """`kl_estimate(policy, other, completions, sample, logps)` -> estimate of KL(policy || other).

    `sample(model)` draws completions from a model, `logps(model, completions)` gives their log-probs, (n,);
    `completions` are the training data's.
    """
    def sample(model):
        seeded = torch.Generator().manual_seed(0)
        return torch.multinomial(model.weight[0].softmax(-1), 64, replacement=True, generator=seeded)

    def logps(model, completions):
        return model.weight[0].log_softmax(-1)[completions].detach()

    def ratio(p, o, completions):
        return (logps(p, completions) - logps(o, completions)).mean()
    case = [_model(1), _model(2), torch.arange(12), sample, logps], {}
    return grade("kl_estimate", function, [lambda p, o, *_: ratio(p, o, sample(p))], [case], [
        ("it is the log-ratio on the training completions. Did the policy draw those?",
         lambda p, o, c, *_: ratio(p, o, c)),
        ("the sign is flipped.", lambda p, o, *_: ratio(o, p, sample(p))),
        ("the samples are the other model's.", lambda p, o, *_: ratio(p, o, sample(o))),
        ("it is KL(other || policy). Who draws?", lambda p, o, *_: ratio(o, p, sample(o))),
        ("the sum is taken for the mean.", lambda p, o, *_: 64 * ratio(p, o, sample(p))),
    ], "The policy's own samples, policy minus other.", "KL(p || q) is the mean of log p - log q under p.")


def check_advantages(function) -> bool:
    """`advantages(rewards, values, *, lam)` -> generalized advantage estimates of one completion, (T,)."""
    from .ppo import gae

    def right(rewards, values, *, lam):
        every = torch.ones(1, len(rewards), dtype=torch.bool)
        return gae(rewards[None], values[None], every, gamma=1.0, lam=lam)[0][0]

    def moved(by):
        """The right function, given rewards of which it makes a wrong one."""
        return lambda r, v, lam: right(r + by(v), v, lam=lam)
    last = torch.tensor([0.0, 0, 0, 1])
    cases = [([_random(4), _random(4, seed=1)], {"lam": lam}) for lam in (0.9, 0.5)]
    return grade("advantages", function, [right], cases, [
        ("lam is forgotten, or taken for 1. How much should a distant surprise count?",
         lambda r, v, lam: right(r, v, lam=1.0)),
        ("only the next step counts. Which delta come after it?", lambda r, v, lam: right(r, v, lam=0.0)),
        ("after the last token its own value comes once more. What is still to come after the end?",
         moved(lambda v: last * v)),
        ("the next value is left out of delta.", moved(lambda v: -torch.cat([v[1:], v[:1] * 0]))),
        ("the values are added: these are the returns.", lambda r, v, lam: right(r, v, lam=lam) + v),
        ("it walks forwards. Can the first token know what came later?",
         lambda r, v, lam: right((r + torch.cat([v[1:], v[:1] * 0]) - v).flip(0), 0 * v, lam=lam).flip(0)),
    ], "Backwards, and nothing comes after the end.", "what are delta and its sum for the last two tokens?")


def check_clipped_loss(function) -> bool:
    """`clipped_loss(logps, old_logps, advantages, *, clip)` -> PPO's loss of each token, (n,)."""
    from .ppo import policy_losses

    def right(logps, old_logps, advantages, *, clip):
        return policy_losses(logps, old_logps, advantages, clip=clip)[0]

    def parts(logps, old_logps, advantages, clip):
        ratio = (logps - old_logps).exp()
        return ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    cases = [([_random(8).requires_grad_(), _random(8, seed=1), _random(8, seed=2)], {"clip": clip})
             for clip in (0.2, 0.5)]
    return grade("clipped_loss", function, [right], cases, [
        ("the sign is flipped. An optimizer makes losses small.", lambda *x, clip: -right(*x, clip=clip)),
        ("nothing is clipped.", lambda *x, clip: -parts(*x, clip)[0]),
        ("the ratio is clipped always. A good token that became less likely has no gradient then: who brings "
         "it back?", lambda *x, clip: -parts(*x, clip)[1]),
        ("the larger of the two counts. Which one is pessimistic?",
         lambda *x, clip: -torch.maximum(*parts(*x, clip))),
        ("clip is taken for 0.2, whatever it is.", lambda *x, clip: right(*x, clip=0.2)),
        ("the ratio is a difference of logs. Take exp.",
         lambda new, o, a, clip: -torch.minimum((new - o) * a, (new - o).clamp(1 - clip, 1 + clip) * a)),
    ], "Clipped only where going further would pay.", "try ratios around the clip, both signs.")


def check_both_orders(function) -> bool:
    """`both_orders(first, second)` -> what a gets for each pair, (n,): 1, 0.5 or 0.

    Verdicts of a judge asked twice: 1.0, the answer in the first place won; 0.0, the second; 0.5, a tie. In
    `first` the first place is a's, in `second` it is b's.
    """
    def right(first, second):
        return torch.where(first == 1 - second, first, torch.full_like(first, 0.5))
    said = torch.tensor([1.0, 0.5, 0.0])
    case = [said.repeat_interleave(3), said.repeat(3)], {}
    return grade("both_orders", function, [right], [case], [
        ("the second verdict is not mirrored. Who stood in the first place there?",
         lambda first, second: right(first, 1 - second)),
        ("the two are averaged. A judge that says \"a\" and then \"a tie\" has contradicted itself.",
         lambda first, second: (first + 1 - second) / 2),
        ("only the first order counts. What would a judge get that always names the first place?",
         lambda first, second: first),
        ("a contradiction is a loss. Whose loss would it be with a and b exchanged?",
         lambda first, second: right(first, second) * (first == 1 - second)),
    ], "Who wins has to win in both places.", "write down all nine cases.")
