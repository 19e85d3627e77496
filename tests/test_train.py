"""A run does what the papers say: the reference moves by the formula, and a step is a step however cut."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from helpers import (
    PAD,
    assert_close,
    logps_by_hand,
    make_trainer,
    metrics,
    random_rows,
    run_once,
    tiny_llama,
    tiny_neox,
    tiny_run,
    weights,
    without,
)
from lora_helpers import dense
from transformers import TrainerCallback

import tralign_mini as tr
from tralign_mini import runs
from tralign_mini.data import collate

WITH_REFERENCE = ("dpo", "ipo", "kto")
METHODS = (*WITH_REFERENCE, "orpo", "simpo", "sft")

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


class Recorder(TrainerCallback):
    """Keeps what policy and reference are after each optimizer step, and at the start (entry 0)."""

    def __init__(self, trainer):
        self.trainer, self.policies, self.references = trainer, [], []

    def on_train_begin(self, *args, **kwargs):
        self.on_step_end()

    def on_step_end(self, *args, **kwargs):
        policy, reference = self.trainer.policy, self.trainer.reference
        lora = hasattr(policy, "peft_config")
        self.policies.append(dense(policy) if lora else weights(policy))
        self.references.append(dense(policy, "reference") if lora else weights(reference.model))


@pytest.fixture
def recorder(monkeypatch):
    """The recorder of the next run."""
    made = []

    class Recorded(tr.AlignmentTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(Recorder(self))
            self.add_callback(made[-1])

    monkeypatch.setattr(runs, "AlignmentTrainer", Recorded)
    return made


# ---------------------------------------------------------------- the reference moves by the formula


@pytest.mark.parametrize(
    "settings",
    [{"method": "dpo"}, {"method": "ipo", "beta": 0.3}, {"method": "kto"}, {"tuning": "lora"}],
    ids=["dpo", "ipo", "kto", "lora"],
)
def test_tau_beyond_the_last_step_is_the_plain_method_to_the_bit(folder, settings):
    name = "-".join(str(value) for value in settings.values())
    plain = run_once(folder, f"fixed-{name}", **settings)
    assert len(plain) == 8 and plain[-1]["kl/reference"] > 0
    for kind in ("soft", "hard"):
        moving = run_once(folder, f"{kind}-{name}", reference=kind, tau=9, **settings)
        assert without(moving, "alpha", "tau") == without(plain, "alpha", "tau")
        assert {row["tau"] for row in moving} == {9} and {row["tau"] for row in plain} == {None}


def test_a_reference_that_does_move_changes_the_run(folder):
    plain = run_once(folder, "fixed-dpo", method="dpo")
    moving = run_once(folder, "soft-2", reference="soft", tau=2)
    losses = [[row["loss"] for row in rows] for rows in (plain, moving)]
    assert losses[0][:2] == losses[1][:2]  # the first update comes after step 2
    assert all(a != b for a, b in zip(losses[0][2:], losses[1][2:], strict=True))
    assert [row["reference_updates"] for row in moving] == [0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize(("tuning", "tolerance"), [("full", 0), ("lora", 1e-5)])
def test_alpha_1_tau_1_starts_every_step_at_zero_margin(folder, kind, tuning, tolerance):
    rows = run_once(folder, f"copy-{kind}-{tuning}", reference=kind, alpha=1.0, tau=1, tuning=tuning)
    for row in rows:
        for name in ("rewards/margin", "rewards/chosen", "logratio/chosen", "logratio/rejected"):
            assert abs(row[name]) <= tolerance, (row["step"], name)
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    logps = [row["logps/chosen"] for row in rows]
    assert len(set(logps)) == 8 and rows[-1]["kl/initial"] > 1e-3  # while the policy moves


@pytest.mark.parametrize(
    ("settings", "alpha", "tau"),
    [
        ({"reference": "soft", "alpha": 0.3, "tau": 2}, 0.3, 2),
        ({"reference": "soft", "alpha": 0.6}, 0.6, 1),
        ({"reference": "hard", "tau": 3}, 1.0, 3),
        ({"reference": "soft", "alpha": 0.3, "tuning": "lora", "reference_rank": 32}, 0.3, 1),
        ({"reference": "hard", "tau": 3, "tuning": "lora"}, 1.0, 3),
    ],
    ids=["soft every 2", "soft every step", "hard", "lora soft", "lora hard"],
)
def test_the_reference_after_k_updates_equals_the_formula(tmp_path, recorder, settings, alpha, tau):
    tr.train(tiny_run(tmp_path, eval_prompts=1, **settings))
    [seen] = recorder
    assert len(seen.references) == 9
    expected = {name: weight.double() for name, weight in seen.policies[0].items()}
    for step, (policy, reference) in enumerate(zip(seen.policies, seen.references, strict=True)):
        if step and step % tau == 0:
            expected = {name: alpha * policy[name].double() + (1 - alpha) * expected[name] for name in policy}
        elif step:
            before = seen.references[step - 1]
            assert all(torch.equal(reference[name], before[name]) for name in reference), step
        for name, weight in reference.items():
            assert torch.allclose(weight.double(), expected[name], rtol=0, atol=1e-6), (step, name)
            if alpha == 1 and step % tau == 0 and "tuning" not in settings:
                assert torch.equal(weight, policy[name])
    moved = [(seen.policies[-1][name] - seen.references[-1][name]).abs().max() for name in expected]
    start = [(seen.references[0][name] - seen.references[-1][name]).abs().max() for name in expected]
    assert max(moved) > 1e-4 and max(start) > 1e-4  # 100 times the tolerance: the formula was put to the test


# ---------------------------------------------------------------- a step is a step


def one_run(directory, **settings):
    trainer = make_trainer(directory, **settings)
    trainer.train()
    return metrics(directory), weights(trainer.policy), trainer


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method, tmp_path):
    # Llama: the gradient of a bias on keys is zero but for rounding, and AdamW blows that up to full steps
    settings = {"method": method, "rows": random_rows(method, 20), "learning_rate": 2e-4}
    if method in WITH_REFERENCE:
        settings |= {"reference_model": tiny_llama(seed=3)}
    (tmp_path / "8").mkdir()
    whole, policy, _ = one_run(tmp_path / "8", policy=tiny_llama().train(), **settings)
    assert all(row["grad_norm"] > 1e-3 for row in whole)
    for micro in (4, 2, 1):
        (tmp_path / str(micro)).mkdir()
        settings |= {"policy": tiny_llama().train(), "micro_batch_size": micro}
        cut, other, _ = one_run(tmp_path / str(micro), **settings)
        assert_close(whole, cut)
        for name in policy:
            assert torch.allclose(policy[name], other[name], rtol=0, atol=1e-5), name


def test_a_step_that_forgot_to_divide_by_the_accumulation_would_show(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole, *_ = one_run(tmp_path / "a")
    monkeypatch.setattr(
        tr.AlignmentTrainer, "loss_is_scaled_for_ga", False
    )  # Trainer divides by it once more
    cut, *_ = one_run(tmp_path / "b", micro_batch_size=2)
    with pytest.raises(AssertionError, match="grad_norm"):
        assert_close(whole, cut)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo", "beta": 0.4, "label_smoothing": 0.2},
        {"method": "ipo", "beta": 0.4, "logps": "mean"},
        {"method": "ipo", "beta": 0.4},
        {"method": "orpo", "beta": 0.4},
        {"method": "simpo", "beta": 2.5, "simpo_gamma": 1.5},
        {"method": "sft"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_first_loss_by_hand(settings, tmp_path):
    method = settings["method"]
    rows = random_rows(method, 8)
    policy, other = tiny_neox(), tiny_neox(seed=3)
    first = one_run(
        tmp_path,
        rows=rows,
        reference_model=other if method in WITH_REFERENCE else None,
        max_steps=1,
        policy=tiny_neox().train(),
        **settings,
    )[0][0]

    def logps(model, side):
        pairs = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
        sums = logps_by_hand(model, pairs)
        mean = method in ("orpo", "simpo") or settings.get("logps") == "mean"
        return sums / torch.tensor([len(completion) for _, completion in pairs]) if mean else sums

    if method == "sft":
        tokens = sum(len(row["completion_ids"]) for row in rows)
        expected = -logps(policy, "completion").sum() / tokens
        assert first["loss"] == pytest.approx(expected.item(), abs=1e-5)
        return
    chosen, rejected = logps(policy, "chosen"), logps(policy, "rejected")
    if method in WITH_REFERENCE:
        h = chosen - logps(other, "chosen") - rejected + logps(other, "rejected")
        if method == "dpo":
            expected = -0.8 * torch.nn.functional.logsigmoid(0.4 * h) - 0.2 * torch.nn.functional.logsigmoid(
                -0.4 * h
            )
        else:
            expected = (h - 1 / 0.8) ** 2
        assert first["rewards/margin"] == pytest.approx(0.4 * h.mean().item(), abs=1e-5)
        assert first["rewards/accuracy"] == (h > 0).double().mean().item()
        assert first["logratio/chosen"] == pytest.approx(
            (chosen - logps(other, "chosen")).mean().item(), abs=1e-5
        )
    elif method == "simpo":
        expected = -torch.nn.functional.logsigmoid(2.5 * (chosen - rejected) - 1.5)
    else:
        odds = [logp.exp() / (1 - logp.exp()) for logp in (chosen, rejected)]
        expected = -chosen - 0.4 * torch.nn.functional.logsigmoid((odds[0] / odds[1]).log())
    assert first["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-5)


def test_the_learning_rate_warms_up_and_falls(tmp_path):
    rates = {}
    for scheduler in ("linear", "constant"):
        (tmp_path / scheduler).mkdir()
        rows, *_ = one_run(
            tmp_path / scheduler, lr_scheduler=scheduler, warmup_steps=2, max_steps=6, learning_rate=1e-3
        )
        rates[scheduler] = [row["learning_rate"] for row in rows]
    assert rates["linear"] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates["constant"] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3])


# ---------------------------------------------------------------- KTO's reference point


def reference_point(trainer):
    """(z0 of the first step, its micro-batches, its rows)."""
    micro_batches, found, compute = 8 // (trainer.recipe.micro_batch_size or 8), [], trainer._reference_point
    trainer._reference_point = lambda ratios: found.append(compute(ratios)) or found[-1]
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), micro_batches, "cpu")
    if micro_batches == 1:  # matched and mismatched completions share their prompts: z0 comes with the loss
        trainer.compute_loss(trainer.model, batches[0])
    [kl] = found
    return kl, batches, [trainer.stream[i] for i in range(8)]


def z0_by_hand(policy, reference, rows):
    mismatched = [(row["prompt_ids"], row["mismatched_ids"]) for row in rows]
    return (logps_by_hand(policy, mismatched) - logps_by_hand(reference, mismatched)).mean().item()


def test_z0_is_the_mean_log_ratio_of_mismatched_pairs_clamped_and_detached(tmp_path):
    one, other = tiny_neox(), tiny_neox(seed=3)
    found = []
    for policy, reference in ((one, other), (other, one)):
        trainer = make_trainer(tmp_path, method="kto", policy=policy.train(), reference_model=reference)
        kl, _, rows = reference_point(trainer)
        by_hand = z0_by_hand(policy.eval(), reference.eval(), rows)
        assert kl.item() == pytest.approx(max(by_hand, 0), abs=1e-4)
        assert not kl.requires_grad and kl.ndim == 0
        found.append(by_hand)
    assert found[0] == pytest.approx(-found[1]) and abs(found[0]) > 1  # so one of the two was clamped


def test_z0_is_not_the_mean_over_the_matched_batch(tmp_path):
    policy, reference = tiny_neox(), tiny_neox(seed=3)
    trainer = make_trainer(tmp_path, method="kto", policy=policy, reference_model=reference)
    _, _, rows = reference_point(trainer)
    mismatched = z0_by_hand(policy, reference, rows)
    matched = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    matched = (logps_by_hand(policy, matched) - logps_by_hand(reference, matched)).mean().item()
    assert abs(mismatched - matched) > 0.1


def test_z0_is_of_the_whole_step_however_it_is_cut(tmp_path):
    policies = {"policy": tiny_neox(seed=3).train(), "reference_model": tiny_neox()}
    if (
        z0_by_hand(
            tiny_neox(seed=3),
            tiny_neox(),
            [row | {"mismatched_ids": row["completion_ids"]} for row in random_rows("kto")],
        )
        < 0
    ):
        policies = {"policy": tiny_neox().train(), "reference_model": tiny_neox(seed=3)}
    found = []
    for micro in (8, 2, 1):
        kl, batches, _ = reference_point(
            make_trainer(tmp_path, method="kto", micro_batch_size=micro, **policies)
        )
        assert len(batches) == 8 // micro and (micro == 8 or all(batch["kl"] is kl for batch in batches))
        assert not any("mismatched" in batch for batch in batches)
        found.append(kl.item())
    assert found[0] > 0.1
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_no_gradient_flows_through_z0(tmp_path):
    policy, reference = tiny_neox(seed=3).train(), tiny_neox()
    trainer = make_trainer(tmp_path, method="kto", policy=policy, reference_model=reference)
    kl, [batch], rows = reference_point(trainer)
    sequences = collate([(row["prompt_ids"], row["completion_ids"]) for row in rows], PAD)
    trainer.compute_loss(trainer.model, batch).backward()
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])

    def gradient(z0):
        ratio = tr.completion_logps(policy, sequences) - tr.completion_logps(reference, sequences).detach()
        value = torch.where(
            batch["desirable"], torch.sigmoid(0.05 * (ratio - z0)), torch.sigmoid(0.05 * (z0 - ratio))
        )
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad((1 - value).mean(), list(policy.parameters()))]
        )

    mismatched = collate([(row["prompt_ids"], row["mismatched_ids"]) for row in rows], PAD)
    attached = (
        tr.completion_logps(policy, mismatched) - tr.completion_logps(reference, mismatched).detach()
    ).mean()
    if attached < 0:
        attached = attached - attached.detach()  # clamped at 0, but with its gradient
    assert torch.allclose(found, gradient(kl), atol=1e-6)
    assert (found - gradient(attached)).norm() > 0.01 * found.norm()


def test_z0_restarts_at_zero_after_a_hard_update(folder):
    z0 = [row["kto/z0"] for row in run_once(folder, "kto-hard", method="kto", reference="hard", tau=2)]
    assert max(z0) > 1e-3
    assert z0[0::2] == [0, 0, 0, 0]


# ---------------------------------------------------------------- what a row says


PAIRED_KEYS = {
    "step",
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "logps/chosen",
    "logps/rejected",
    "learning_rate",
    "grad_norm",
}
REFERENCE_KEYS = {"logratio/chosen", "logratio/rejected", "alpha", "tau", "reference_updates"}
KEYS = {
    "dpo": PAIRED_KEYS | REFERENCE_KEYS,
    "ipo": PAIRED_KEYS | REFERENCE_KEYS,
    "kto": (PAIRED_KEYS | REFERENCE_KEYS | {"kto/z0"}) - {"rewards/accuracy"},
    "orpo": PAIRED_KEYS,
    "simpo": PAIRED_KEYS,
    "sft": {"step", "epoch", "loss", "logps/chosen", "learning_rate", "grad_norm"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_row_has_the_documented_keys_and_kl_only_when_it_was_measured(folder, method):
    rows = run_once(
        folder,
        f"fixed-{method}",
        method=method,
        **({"beta": 0.3} if method == "ipo" else {}),
        **({"eval_steps": 3} if method in ("orpo", "simpo", "sft") else {}),
    )
    measured = {"kl/initial", "length/completion"} | ({"kl/reference"} if method in WITH_REFERENCE else set())
    for row in rows:
        due = row["step"] in ((4, 8) if method in WITH_REFERENCE else (3, 6, 8))  # and after the last step
        assert row.keys() == KEYS[method] | (measured if due else set()), row["step"]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_a_lora_update_reports_its_errors_in_the_row_of_its_step(folder):
    rows = run_once(folder, "lora-errors", tuning="lora", reference="soft", alpha=0.3, tau=2, max_steps=12)
    assert [any(key.startswith("reference/") for key in row) for row in rows] == [False, True] * 6
    errors = [row["reference/error_bound"] for row in rows if "reference/error_bound" in row]
    assert (
        errors[:4] == [0] * 4 and errors[4] > 0
    )  # rank 8 holds the sum of four adapters of rank 2, but not of five


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_gradients_are_clipped_by_their_norm_however_many_there_are(tmp_path, size):
    """As many as Pythia's embedding has: one float32 sum of their squares is 0.2 % off."""
    head, body = torch.nn.Linear(512, 50304, bias=False), torch.nn.Linear(4, 4)
    head.weight.grad = size * torch.randn(50304, 512) * torch.rand(50304, 1) ** 4
    body.bias.grad = torch.full((4,), size)  # its weight has none
    norm = torch.cat([head.weight.grad.flatten(), body.bias.grad]).double().norm().item()
    before = head.weight.grad.clone()
    trainer = make_trainer(tmp_path, max_grad_norm=0.5)
    assert trainer._clip_grad_norm(torch.nn.ModuleList([head, body])).item() == pytest.approx(norm, rel=1e-5)
    scale = min(1, 0.5 / norm)
    torch.testing.assert_close(head.weight.grad, before * scale)
    torch.testing.assert_close(body.bias.grad, torch.full((4,), size * scale))


def test_same_seed_same_metrics_other_seed_others(folder):
    settings = {"tuning": "lora", "lora_dropout": 0.1, "reference": "soft", "tau": 2}
    first, again, other = (
        run_once(folder, f"seed-{i}", seed=seed, **settings) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert all(a["loss"] != b["loss"] for a, b in zip(first[1:], other[1:], strict=True))


# ---------------------------------------------------------------- when it goes wrong


@pytest.mark.parametrize("settings", [{}, {"tuning": "lora", "reference": "soft"}], ids=["full", "lora soft"])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, settings):
    poisoned = tr.AlignmentTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        factor = float("nan") if self.state.global_step == 5 else 1.0
        return poisoned(self, model, inputs, *args, **kwargs) * factor

    monkeypatch.setattr(tr.AlignmentTrainer, "compute_loss", compute_loss)
    settings = tiny_run(tmp_path, save_steps=1, eval_prompts=1, eval_steps=1000, **settings)
    with pytest.raises(
        (FloatingPointError, ValueError), match="not finite|step 6 .* the last checkpoint is kept"
    ):
        tr.train(settings)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert tr.Run(tmp_path / "run").last_checkpoint.name == "checkpoint-5"
    assert all(p.isfinite().all() for p in tr.Run(tmp_path / "run").policy.parameters())


def test_a_learning_rate_that_explodes_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss of step \d is .*smaller learning_rate"):
        tr.train(tiny_run(tmp_path, learning_rate=1e30, eval_steps=1000, eval_prompts=1))


def test_a_batch_that_cannot_be_spread_is_refused(monkeypatch):
    module = importlib.import_module("tralign_mini.train")
    monkeypatch.setattr(module, "this_process", lambda: type("Three", (), {"num_processes": 3}))
    with pytest.raises(ValueError, match=r"batch_size=8 cannot be spread over 3 process"):
        module.training_arguments(tr.Recipe(model="none", data="none", batch_size=8), None, 1)


def test_tensorboard_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tr.train(tiny_run(tmp_path, tensorboard=True, eval_prompts=1))
    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in metrics(run.directory)]
    assert len(events.Scalars("kl/initial")) == 2


def test_no_tensorboard_files_without_asking(folder):
    run_once(folder, "fixed-dpo", method="dpo")
    assert not list((folder / "fixed-dpo").rglob("*tfevents*"))
