"""The losses: by hand, their gradients by hand, properties, TRL's trainers as the oracle, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_neox, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tralign_mini.logprobs import completion_logps
from tralign_mini.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss

LN2 = math.log(2)
PAIRED = {  # name: the loss of four log-prob tensors; ORPO and SimPO do not look at the reference
    "dpo": lambda pc, pr, rc, rr: dpo_loss(pc, pr, rc, rr, beta=0.1),
    "dpo_smoothed": lambda pc, pr, rc, rr: dpo_loss(pc, pr, rc, rr, beta=0.1, label_smoothing=0.2),
    "ipo": lambda pc, pr, rc, rr: ipo_loss(pc, pr, rc, rr, beta=0.1),
    "orpo": lambda pc, pr, rc, rr: orpo_loss(pc, pr, beta=0.1),
    "simpo": lambda pc, pr, rc, rr: simpo_loss(pc, pr, beta=2.0, gamma=0.5),
}
each_paired = pytest.mark.parametrize("name", PAIRED)


def logps(*numbers, grad=False):
    return torch.tensor(numbers, dtype=torch.float32, requires_grad=grad)


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.detach(), logps(*expected), rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------- by hand


def test_dpo_by_hand():
    """beta = 1/2. Row 0: log-ratios 0 and 0, so h = 0 and the loss is ln 2.

    Row 1: log-ratios 2 ln 3 and 0, h = 2 ln 3, sigmoid(ln 3) = 3/4, loss = ln 4/3. Row 2 is its mirror: ln 4.
    d loss / d chosen = -beta sigmoid(-beta h) = -1/2 * (1/2, 1/4, 3/4); d rejected is the opposite.
    """
    step = 2 * math.log(3)
    chosen, rejected = logps(-5, -5 + step, -5, grad=True), logps(-7, -7, -7 + step, grad=True)
    loss = dpo_loss(chosen, rejected, logps(-5, -5, -5), logps(-7, -7, -7), beta=0.5)
    close(loss.losses, (LN2, math.log(4 / 3), math.log(4)))
    close(loss.chosen_rewards, (0, math.log(3), 0))
    close(loss.rejected_rewards, (0, 0, math.log(3)))
    loss.losses.sum().backward()
    close(chosen.grad, (-1 / 4, -1 / 8, -3 / 8))
    close(rejected.grad, (1 / 4, 1 / 8, 3 / 8))


def test_dpo_curvature_by_hand():
    """d2 loss / dh2 = beta^2 sigmoid(beta h) sigmoid(-beta h): beta^2 / 4, then 3 beta^2 / 16."""
    chosen = logps(0, 2 * math.log(3), grad=True)
    losses = dpo_loss(chosen, logps(0, 0), logps(0, 0), logps(0, 0), beta=0.5).losses
    (slope,) = torch.autograd.grad(losses.sum(), chosen, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), chosen)
    close(curvature, (1 / 16, 3 / 64))


def test_dpo_label_smoothing_by_hand():
    """A quarter of the labels flipped, sigmoid(beta h) = 3/4: the loss is 3/4 ln 4/3 + 1/4 ln 4, its slope 0.

    (A label that is right with probability 3/4 is fitted exactly where the model says 3/4.)
    """
    chosen = logps(2 * math.log(3), grad=True)
    loss = dpo_loss(chosen, logps(0), logps(0), logps(0), beta=0.5, label_smoothing=0.25)
    close(loss.losses, (0.75 * math.log(4 / 3) + 0.25 * math.log(4),))
    loss.losses.sum().backward()
    close(chosen.grad, (0,))


def test_ipo_by_hand():
    """beta = 1/4: the target of h is 2, losses at h = 2, 0, 5 are 0, 4, 9, slopes 2 (h - 2) = 0, -4, 6."""
    chosen, rejected = logps(-3, -5, -2, grad=True), logps(-6, -6, -8, grad=True)
    loss = ipo_loss(chosen, rejected, logps(-4, -4, -3), logps(-5, -5, -4), beta=0.25)
    close(loss.losses, (0, 4, 9))
    close(loss.chosen_rewards, (0.25, -0.25, 0.25))
    close(loss.rejected_rewards, (-0.25, -0.25, -1))
    loss.losses.sum().backward()
    close(chosen.grad, (0, -4, 6))
    close(rejected.grad, (0, 4, -6))


def test_kto_by_hand():
    """beta = 1/2, kl = 1, weights 2 (desirable) and 3 (undesirable); the order is the batch's.

    log-ratio 1 is the reference point: w (1 - 1/2): 1 desirable, 3/2 undesirable.
    log-ratio 1 + 2 ln 3, sigmoid(ln 3) = 3/4: 2 * 1/4 desirable, 3 * 3/4 undesirable.
    Slopes: -/+ w beta s (1 - s) = -2/8, 3/8, and with s (1 - s) = 3/16: -3/16, 9/32.
    """
    far = 1 + 2 * math.log(3)
    policy = logps(-9 + 1, -9 + 1, -9 + far, -9 + far, grad=True)
    desirable = torch.tensor([True, False, True, False])
    loss = kto_loss(policy, logps(-9, -9, -9, -9), desirable, torch.tensor(1.0), beta=0.5, desirable_weight=2,
                    undesirable_weight=3)
    close(loss.losses, (1, 3 / 2, 1 / 2, 9 / 4), 1e-6)
    close(loss.chosen_rewards, (0.5, far / 2), 1e-6)
    close(loss.rejected_rewards, (0.5, far / 2), 1e-6)
    loss.losses.sum().backward()
    close(policy.grad, (-1 / 4, 3 / 8, -3 / 16, 9 / 32), 1e-6)


def test_orpo_by_hand():
    """p = 3/4 against 1/2: odds 3 and 1, odds ratio 3, sigmoid(ln 3) = 3/4. beta = 1/2: ln 4/3 + 1/2 ln 4/3.

    d / d log p of log odds is 1 / (1 - p): 4 (chosen) and -2 (rejected), times -beta (1 - 3/4) = -1/8; the
    log-likelihood adds -1 to the chosen.
    """
    chosen, rejected = logps(math.log(3 / 4), grad=True), logps(math.log(1 / 2), grad=True)
    loss = orpo_loss(chosen, rejected, beta=0.5)
    close(loss.losses, (1.5 * math.log(4 / 3),))
    close(loss.chosen_rewards, (0.5 * math.log(3 / 4),))
    close(loss.rejected_rewards, (0.5 * math.log(1 / 2),))
    loss.losses.sum().backward()
    close(chosen.grad, (-1.5,))
    close(rejected.grad, (0.25,))


def test_simpo_by_hand():
    """beta = 2, gamma = 1: a margin of 1/2 earns just what is asked, ln 2; 1/2 + ln(3) / 2 gives ln 4/3."""
    chosen, rejected = logps(-1, -1 + math.log(3) / 2, grad=True), logps(-1.5, -1.5, grad=True)
    loss = simpo_loss(chosen, rejected, beta=2, gamma=1)
    close(loss.losses, (LN2, math.log(4 / 3)))
    close(loss.chosen_rewards, (-2, -2 + math.log(3)))
    close(loss.rejected_rewards, (-3, -3))
    loss.losses.sum().backward()
    close(chosen.grad, (-1, -0.5))
    close(rejected.grad, (1, 0.5))


# ----------------------------------------------------------------------------------------------- properties

any_logp = st.floats(-1e4, 1e4, width=32)
a_logp = st.floats(-50, -1 / 64, width=32)


def rows(element, columns, max_size=6):
    return st.lists(st.tuples(*[element] * columns), min_size=1, max_size=max_size).map(
        lambda rows: [torch.tensor(column) for column in zip(*rows)])


@each_paired
@settings(max_examples=60, deadline=None)
@given(columns=rows(any_logp | st.sampled_from([0.0, -1e4, 1e4, -1e-7, -1e-30]), 4))
def test_finite_at_extremes_and_so_is_the_gradient(name, columns):
    columns = [column.requires_grad_() for column in columns]
    loss = PAIRED[name](*columns)
    loss.losses.sum().backward()
    gradients = [column.grad for column in columns if column.grad is not None]
    assert len(gradients) == (2 if name in ("orpo", "simpo") else 4)
    for tensor in [*loss, *gradients]:
        assert tensor.isfinite().all() and tensor.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(columns=rows(any_logp | st.sampled_from([0.0, -1e4, 1e4]), 2), kl=st.floats(0, 1e4))
def test_kto_is_finite_at_extremes_and_so_is_the_gradient(columns, kl):
    policy, reference = (column.requires_grad_() for column in columns)
    desirable = torch.arange(len(policy)) % 2 == 0
    loss = kto_loss(policy, reference, desirable, torch.tensor(kl), beta=0.1)
    loss.losses.sum().backward()
    for tensor in [*loss, policy.grad, reference.grad]:
        assert tensor.isfinite().all() and tensor.dtype == torch.float32
    assert ((0 <= loss.losses) & (loss.losses <= 1)).all()


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_have_their_limits_not_just_any_finite_number(margin):
    """-log sigmoid(x) is -x far below 0 and 0 far above; its slope -1 and 0. A clamp would lose the slope."""
    chosen, zero = logps(margin, grad=True), logps(0)
    losses = dpo_loss(chosen, zero, zero, zero, beta=0.5).losses
    losses.sum().backward()
    close(losses, (max(0, -margin / 2),))
    close(chosen.grad, (0 if margin > 0 else -0.5,))

    policy = logps(margin, grad=True)
    close(kto_loss(policy, zero, torch.tensor([True]), 0.0, beta=0.5).losses, (0 if margin > 0 else 1,))


def test_orpo_at_certainty_still_pushes_the_right_way():
    """Probability 1 for the rejected: a large loss, whose gradient lowers it and raises the chosen."""
    chosen, rejected = logps(-1, grad=True), logps(0, grad=True)
    loss = orpo_loss(chosen, rejected, beta=1)
    loss.losses.sum().backward()
    assert loss.losses.item() > 10 and chosen.grad.item() < -1 and rejected.grad.item() > 0


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo"])
@given(columns=rows(a_logp, 4))
def test_a_likelier_chosen_completion_has_a_lower_loss(name, columns):
    pc, pr, rc, rr = columns
    before, after = PAIRED[name](pc, pr, rc, rr).losses, PAIRED[name](pc / 2, pr, rc, rr).losses
    assert ((after < before) | (before < 1e-6)).all()  # at a loss of 1e-6 float32 has nothing left to gain


@given(columns=rows(a_logp, 4), part=st.floats(0.1, 0.9))
def test_ipo_has_a_target_and_closer_is_better_from_both_sides(columns, part):
    pc, pr, rc, rr = columns
    distance = (pc - rc) - (pr - rr) - 5  # the target is 1 / (2 beta) = 5
    before, after = (PAIRED["ipo"](x, pr, rc, rr).losses for x in (pc, pc - part * distance))
    torch.testing.assert_close(after, (1 - part) ** 2 * before, rtol=1e-3, atol=1e-3)


@each_paired
def test_swapping_chosen_and_rejected_raises_the_loss_of_a_separated_pair(name):
    pc, pr, rc, rr = logps(-1.0), logps(-3.0), logps(-2.0), logps(-2.0)
    assert PAIRED[name](pc, pr, rc, rr).losses.item() < PAIRED[name](pr, pc, rr, rc).losses.item()


@given(columns=rows(a_logp, 4), smoothing=st.floats(0, 0.49))
def test_label_smoothing_mixes_the_loss_with_that_of_flipped_labels(columns, smoothing):
    pc, pr, rc, rr = columns
    plain, flipped = (dpo_loss(*order, beta=0.1).losses for order in ((pc, pr, rc, rr), (pr, pc, rr, rc)))
    smoothed = dpo_loss(pc, pr, rc, rr, beta=0.1, label_smoothing=smoothing).losses
    torch.testing.assert_close(smoothed, (1 - smoothing) * plain + smoothing * flipped)


@each_paired
@given(columns=rows(a_logp, 4), seed=st.integers(0, 100))
def test_examples_do_not_see_each_other(name, columns, seed):
    """A permuted batch gives permuted losses, and a row alone gives what it gives in the batch."""
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(seed))
    together = PAIRED[name](*columns)
    for whole, permuted in zip(together, PAIRED[name](*(column[order] for column in columns))):
        torch.testing.assert_close(permuted, whole[order])
    torch.testing.assert_close(PAIRED[name](*(column[:1] for column in columns)).losses, together.losses[:1])


@given(columns=rows(a_logp, 2), seed=st.integers(0, 100))
def test_kto_keeps_the_order_of_the_batch(columns, seed):
    policy, reference = columns
    generator = torch.Generator().manual_seed(seed)
    desirable = torch.rand(len(policy), generator=generator) < 0.5
    order = torch.randperm(len(policy), generator=generator)
    settings = {"kl": torch.tensor(0.3), "beta": 0.1, "desirable_weight": 2.0}
    whole = kto_loss(policy, reference, desirable, **settings)
    permuted = kto_loss(policy[order], reference[order], desirable[order], **settings)
    torch.testing.assert_close(permuted.losses, whole.losses[order])
    torch.testing.assert_close(whole.chosen_rewards, 0.1 * (policy - reference)[desirable])
    torch.testing.assert_close(whole.rejected_rewards, 0.1 * (policy - reference)[~desirable])


@pytest.mark.parametrize("label", [True, False])
def test_kto_takes_a_batch_of_one_kind(label):
    loss = kto_loss(logps(-1, -2), logps(-2, -2), torch.tensor([label, label]), 0.0, beta=1.0)
    assert [len(part) for part in loss] == ([2, 2, 0] if label else [2, 0, 2])


@given(shift=st.floats(-20, 20))
def test_only_the_ratio_to_the_reference_counts(shift):
    pc, pr, rc, rr = logps(-3, -9), logps(-4, -2), logps(-5, -5), logps(-6, -6)
    for name in ("dpo", "dpo_smoothed", "ipo"):
        shifted = PAIRED[name](pc + shift, pr - shift, rc + shift, rr - shift)
        for before, after in zip(PAIRED[name](pc, pr, rc, rr), shifted):
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_rewards_carry_no_gradient_and_losses_do():
    columns = [logps(-3, -4, grad=True) for _ in range(4)]
    outputs = [loss(*columns) for loss in PAIRED.values()]
    outputs.append(kto_loss(columns[0], columns[1], torch.tensor([True, False]), 0.5, beta=0.1))
    for loss in outputs:
        assert loss.losses.requires_grad
        assert not loss.chosen_rewards.requires_grad and not loss.rejected_rewards.requires_grad


@each_paired
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_arithmetic_is_float32(name, dtype):
    """-100.5 and -100 are bfloat16 numbers; a tenth of their difference is not, and must not be rounded."""
    columns = [logps(-100.5, -3.0), logps(-100.0, -5.0), logps(-99.5, -4.0), logps(-99.0, -4.5)]
    exact, low = PAIRED[name](*columns), PAIRED[name](*(column.to(dtype) for column in columns))
    for expected, actual in zip(exact, low):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------- TRL as the oracle

# One batch for a tiny random policy, with another tiny random model as its reference; lengths differ
PAIRS = [
    {"prompt": "w3 w4 w5", "chosen": " w6 w7", "rejected": " w8 w9 w10 w11"},
    {"prompt": "w12", "chosen": " w13 w14 w15", "rejected": " w16"},
    {"prompt": "w20 w21 w22 w23 w24", "chosen": " w25", "rejected": " w26 w27"},
]
# TRL's ORPO averages its likelihood over the batch's tokens, prompts included: the same only for such pairs
ONE_TOKEN_PROMPTS = [{"prompt": "w12", "chosen": " w13 w14 w15", "rejected": " w16"},
                     {"prompt": "w40", "chosen": " w41 w42 w43", "rejected": " w44 w45 w46 w47"}]


@pytest.fixture
def trl_step(tmp_path):
    """trl_step(trainer, config class, rows, ...) -> the trainer after a backward pass, batch, loss."""
    datasets = pytest.importorskip("datasets")

    def step(trainer_class, config_class, rows, *, policy=0, reference=None, **config):
        settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False} | config
        trainer = trainer_class(
            model=tiny_neox(policy), processing_class=tiny_tokenizer(),
            args=config_class(per_device_train_batch_size=len(rows), **settings),
            train_dataset=datasets.Dataset.from_list(rows),
            **({} if reference is None else {"ref_model": tiny_neox(reference)}))
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return trainer, batch, loss.detach()

    return step


def assert_same_step(policy, losses, trainer, loss):
    """Same loss, same gradient in every parameter."""
    losses.mean().backward()
    torch.testing.assert_close(losses.mean().detach(), loss, rtol=0, atol=1e-5)
    for (name, ours), theirs in zip(policy.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_and_ipo_are_trls(trl_step, loss_type):
    """TRL's IPO averages over the length: it gets length-averaged log-probs here."""
    trl, average = pytest.importorskip("trl"), loss_type == "ipo"
    trainer, batch, expected = trl_step(
        trl.DPOTrainer, trl.DPOConfig, PAIRS, reference=1, beta=0.3, loss_type=loss_type)
    policy = tiny_neox(0)
    policy_logps = completion_logps(policy, batch, average=average)
    reference_logps = completion_logps(tiny_neox(1), batch, average=average).detach()
    loss = (ipo_loss if average else dpo_loss)(*policy_logps.chunk(2), *reference_logps.chunk(2), beta=0.3)
    assert_same_step(policy, loss.losses, trainer, expected)
    if not average:  # TRL logs rewards of summed log-probs whatever the loss
        metrics = trainer._metrics["eval"]  # the tiny model is in eval mode
        assert loss.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"][0], abs=1e-5)
        assert loss.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"][0], abs=1e-5)


@pytest.mark.parametrize("seeds, clamped", [((1, 0), False), ((0, 1), True)])
def test_kto_is_trls(trl_step, seeds, clamped):
    trl = pytest.importorskip("trl")
    rows = [{"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
            for key in ("rejected", "chosen") for pair in PAIRS]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7, "beta": 0.3}
    trainer, batch, expected = trl_step(
        trl.KTOTrainer, trl.KTOConfig, rows, policy=seeds[0], reference=seeds[1], **weights)
    policy, reference = tiny_neox(seeds[0]), tiny_neox(seeds[1]).requires_grad_(False)
    mismatched = {name.removeprefix("KL_"): value for name, value in batch.items() if name.startswith("KL_")}
    with torch.no_grad():
        logratios = completion_logps(policy, mismatched) - completion_logps(reference, mismatched)
        kl = logratios.mean().clamp(min=0)
    assert (kl == 0) == clamped
    policy_logps, reference_logps = completion_logps(policy, batch), completion_logps(reference, batch)
    loss = kto_loss(policy_logps, reference_logps, batch["label"].bool(), kl, **weights)
    assert_same_step(policy, loss.losses, trainer, expected)
    metrics = trainer._metrics["eval"]
    assert kl.item() == pytest.approx(metrics["kl"][0], abs=1e-5)
    assert loss.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"][0], abs=1e-5)


def averaged(policy, batch, side):
    """Length-averaged log-probs of one side of a batch of TRL's ORPO and CPO trainers."""
    return completion_logps(policy, {
        "input_ids": batch[f"{side}_input_ids"], "attention_mask": batch[f"{side}_attention_mask"],
        "completion_mask": batch[f"{side}_labels"] != -100}, average=True)


def test_orpo_is_trls(trl_step):
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer, batch, expected = trl_step(
        orpo.ORPOTrainer, orpo.ORPOConfig, ONE_TOKEN_PROMPTS, beta=0.3)
    policy = tiny_neox(0)
    loss = orpo_loss(averaged(policy, batch, "chosen"), averaged(policy, batch, "rejected"), beta=0.3)
    assert_same_step(policy, loss.losses, trainer, expected)


def test_simpo_is_trls(trl_step):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer, batch, expected = trl_step(
        cpo.CPOTrainer, cpo.CPOConfig, PAIRS, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7)
    policy = tiny_neox(0)
    chosen, rejected = averaged(policy, batch, "chosen"), averaged(policy, batch, "rejected")
    loss = simpo_loss(chosen, rejected, beta=2.0, gamma=0.7)
    assert_same_step(policy, loss.losses, trainer, expected)


# ------------------------------------------------------------------------------------------------- refusals


def call(name, **changes):
    """The loss by name on a good batch with some arguments changed."""
    names = [f"{who}_{which}_logps" for who in ("policy", "reference") for which in ("chosen", "rejected")]
    function, arguments = {
        "dpo": (dpo_loss, {key: logps(-1, -2) for key in names}),
        "ipo": (ipo_loss, {key: logps(-1, -2) for key in names}),
        "orpo": (orpo_loss, {key: logps(-1, -2) for key in names[:2]}),
        "simpo": (simpo_loss, {key: logps(-1, -2) for key in names[:2]} | {"gamma": 1.0}),
        "kto": (kto_loss, {"policy_logps": logps(-1, -2), "reference_logps": logps(-1, -2),
                           "desirable": torch.tensor([True, False]), "kl": torch.tensor(0.5)}),
    }[name]
    return function(**({"beta": 0.1} | arguments | changes))


each_loss = pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo", "simpo"])


@each_loss
@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, None, "0.1", True])
def test_a_beta_that_cannot_be_is_refused(name, beta):
    with pytest.raises(ValueError, match=r"beta = .*finite number > 0.*for example, beta=0.1"):
        call(name, beta=beta)


@each_loss
def test_tensors_that_are_no_log_probabilities_are_refused(name):
    first = "policy_logps" if name == "kto" else "policy_chosen_logps"
    second = "reference_logps" if name == "kto" else "policy_rejected_logps"
    for bad, match in {
        torch.zeros(2, 7): r"has shape \(2, 7\).*per-token log-probs\? Sum them first",
        torch.tensor(-1.0): r"has shape \(\).*one number per completion",
        torch.zeros(2, dtype=torch.long): r"is a torch.int64 tensor of shape \(2,\), but .*floating-point",
        -1.0: "is a float, but .*floating-point",
    }.items():
        with pytest.raises(ValueError, match=f"{first} {match}"):
            call(name, **{first: bad})
    for length in (1, 3):  # 1 would broadcast
        with pytest.raises(ValueError, match=rf"shapes differ: .*\(2,\).*{second} \({length},\).*broadcast"):
            call(name, **{second: torch.zeros(length)})


@pytest.mark.parametrize("value", [0.5, -0.1, 1, math.nan, None])
def test_a_label_smoothing_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"label_smoothing = .*\[0, 0.5\)"):
        call("dpo", label_smoothing=value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, None])
def test_a_negative_gamma_is_refused(value):
    with pytest.raises(ValueError, match="gamma = .*number >= 0"):
        call("simpo", gamma=value)


@pytest.mark.parametrize("kl, match", [
    (torch.tensor(-0.1), "kl = -0.1.*never negative.*clamp"),
    (-1.0, "kl = -1.0.*never negative"),
    (torch.tensor(math.nan), "kl = nan"),
    (math.inf, "kl = inf"),
    (torch.tensor(0.1, requires_grad=True), "kl requires grad.*detach"),
    (torch.tensor([0.1, 0.2]), r"shape \(2,\), but the reference point is one number"),
    (None, "kl = None"),
])
def test_a_reference_point_that_cannot_be_is_refused(kl, match):
    with pytest.raises(ValueError, match=match):
        call("kto", kl=kl)


@pytest.mark.parametrize("desirable", [
    torch.tensor([1, 0]), torch.tensor([True]), torch.tensor([[True, False]]), [True, False], None,
])
def test_labels_that_are_no_mask_are_refused(desirable):
    with pytest.raises(ValueError, match=r"desirable is .*bool tensor of shape \(2,\)"):
        call("kto", desirable=desirable)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_weight_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} = .*finite number > 0"):
        call("kto", **{name: value})
