"""PPO's mathematics, by hand and against another implementation, and one iteration of it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EOS, logps_by_hand, tiny_neox, tiny_tokenizer, weights, write_model
from hypothesis import given
from hypothesis import strategies as st
from lora_helpers import adapted
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_helpers import PROMPTS, says_w5, tiny_ppo, tiny_reward_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tralign_mini.ppo import adapted as adapted_coefficient
from tralign_mini.ppo import gae, k3, policy_losses, token_rewards, value_losses, whiten
from tralign_mini.ppo_models import active, completion_values
from tralign_mini.reference import FrozenReference
from tralign_mini.reward import RewardModel
from tralign_mini.tokens import collate


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_batch(seed: int, extra: int = 0):
    """Random numbers for completions of 1 to 6 tokens, padded to the longest and `extra` more."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (4,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rewards, values = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    pad = (0, extra)
    garbage = torch.nn.functional.pad  # what stands on padding must not matter: pad with 7
    return garbage(rewards, pad, value=7.0), garbage(values, pad, value=7.0), garbage(mask, pad, value=False)


# ---------------------------------------------------------------- the mathematics, by hand


def test_reward_is_the_kl_penalty_at_each_token_and_the_score_at_the_last():
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    log_ratio = tensor([0.5, -1.0, 2.0], [1.0, 0.0, 9.0], [-2.0, 9.0, 9.0])
    rewards = token_rewards(tensor(10.0, 20.0, 30.0), log_ratio, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, tensor([-0.05, 0.1, 9.8], [-0.1, 20.0, 0.0], [30.2, 0.0, 0.0]))


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5.  deltas: 1 + 0.5 * 4 - 2 = 1;  0 + 0.5 * 6 - 4 = -1;  2 + 0 - 6 = -4
    # advantages from the end: -4;  -1 + 0.25 * -4 = -2;  1 + 0.25 * -2 = 0.5;  returns: advantage + value
    rewards, values = tensor([1.0, 0.0, 2.0], [3.0, 99.0, 99.0]), tensor([2.0, 4.0, 6.0], [1.0, 99.0, 99.0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, tensor([0.5, -2.0, -4.0], [2.0, 0.0, 0.0]))
    torch.testing.assert_close(returns, tensor([2.5, 2.0, 2.0], [3.0, 0.0, 0.0]))


@given(st.integers(0, 1000))
def test_gae_with_lambda_1_is_the_rest_of_the_rewards_and_with_0_one_step(seed):
    rewards, values, mask = random_batch(seed)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    rest = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, rest)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    torch.testing.assert_close(advantages, (rewards + 0.9 * following - values) * mask)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_more_padding_changes_nothing(seed, extra):
    (rewards, values, mask), (rewards2, values2, mask2) = random_batch(seed), random_batch(seed, extra)
    length = mask.shape[1]
    scores = rewards[:, 0]
    tokens = [token_rewards(scores, r, m, kl_coef=0.3) for r, m in ((rewards, mask), (rewards2, mask2))]
    torch.testing.assert_close(tokens[1][:, :length], tokens[0])
    assert not tokens[1][:, length:].any()
    for one, other in zip(gae(rewards, values, mask, gamma=0.9, lam=0.8),
                          gae(rewards2, values2, mask2, gamma=0.9, lam=0.8)):
        torch.testing.assert_close(other[:, :length], one)
        assert not other[:, length:].any()
    torch.testing.assert_close(whiten(values2, mask2)[:, :length], whiten(values, mask))


def test_whitening_is_over_real_tokens_alone():
    mask = torch.tensor([[True, True], [True, False]])
    white = whiten(tensor([1.0, 2.0], [6.0, 1000.0]), mask)  # mean 3, variance (4 + 1 + 9) / 3
    torch.testing.assert_close(white, tensor([-2.0, -1.0], [3.0, 0.0]) / math.sqrt(14 / 3))


def test_policy_clip_by_hand():
    old = torch.zeros(5, dtype=torch.float64)
    logps = tensor(0.0, math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5))[0:5].requires_grad_()
    advantages = tensor(2.0, 1.0, -1.0, 1.0, -1.0)
    losses, ratio = policy_losses(logps, old, advantages, clip=0.2)
    torch.testing.assert_close(ratio, tensor(1.0, 1.5, 1.5, 0.5, 0.5))
    torch.testing.assert_close(losses, tensor(-2.0, -1.2, 1.5, -0.5, 0.8))  # the worse of the two, always
    losses.sum().backward()
    # d(-A ratio)/d logp = -A ratio where the unclipped loss counts, 0 where clipping decides
    torch.testing.assert_close(logps.grad, tensor(-2.0, 0.0, 1.5, -0.5, 0.0))


def test_value_clip_by_hand():
    values = tensor(1.1, 3.0, 3.0).requires_grad_()
    losses = value_losses(values, tensor(1.0, 1.0, 1.0), tensor(2.0, 4.0, 0.0), clip=0.5)
    torch.testing.assert_close(losses, tensor(0.405, 3.125, 4.5))  # 0.9, max(1, 2.5), max(3, 1.5)
    losses.sum().backward()
    torch.testing.assert_close(values.grad, tensor(-0.9, 0.0, 3.0))


def test_k3_is_unbiased_and_never_negative():
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    log_ratio = (policy / reference).log()
    assert (k3(log_ratio) >= 0).all() and (log_ratio < 0).any()
    torch.testing.assert_close((policy * k3(log_ratio)).sum(), (policy * log_ratio).sum())
    torch.testing.assert_close(k3(tensor(math.log(2.0))), tensor(0.5 - 1 + math.log(2.0)))


def test_kl_coefficient_by_hand():
    assert adapted_coefficient(0.5, 7.0, None) == 0.5
    assert adapted_coefficient(0.5, 12.0, 6.0) == pytest.approx(0.5 * 1.02)  # of an error, at most 20 %
    assert adapted_coefficient(0.5, 0.0, 6.0) == pytest.approx(0.5 * 0.98)
    assert adapted_coefficient(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)


def test_the_numbers_of_torchtune():
    """torchtune 0.6.1: rlhf.get_rewards_ppo, estimate_advantages (0.98, 0.9), PPOLoss (0.2, 0.2).

    Recorded on random input, not run: it is no dependency. It whitens advantages and adds their mean again.
    """
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    scores = tensor(-0.49, -0.6, -0.56)
    logps = tensor([-0.67, -0.2, -1.94, -1.4, -0.76], [-0.63, -0.9, -0.56, 0, 0], [-0.67, 0, 0, 0, 0])
    reference = tensor([-0.06, -1.19, -0.57, -0.83, -0.9], [-0.21, -0.45, -0.61, 0, 0], [-1.95, 0, 0, 0, 0])
    values = tensor([1.07, 0.32, -0.07, -1.0, 1.16], [-0.4, 1.22, -0.81, 0, 0], [-1.77, 0, 0, 0, 0])
    new_logps = tensor([-0.89, -0.232, -1.996, -1.612, -0.956], [-0.814, -0.924, -0.056, 0, 0],
                       [-1.03, 0, 0, 0, 0])
    new_values = tensor([0.983, 0.482, 0.599, -1.432, 1.373], [-0.07, 1.094, -0.828, 0, 0],
                        [-1.767, 0, 0, 0, 0])
    rewards = token_rewards(scores, logps - reference, mask, kl_coef=0.05)
    close = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(rewards, tensor(
        [0.0305, -0.0495, 0.0685, 0.0285, -0.497], [0.021, 0.0225, -0.6025, 0, 0],
        [-0.624, 0, 0, 0, 0]), **close)
    advantages, returns = gae(rewards, values, mask, gamma=0.98, lam=0.9)
    torch.testing.assert_close(returns, tensor(
        [-0.214012, -0.31278, -0.290726, -0.296174, -0.497], [-0.378307, -0.588285, -0.6025, 0, 0],
        [-0.624, 0, 0, 0, 0]), **close)
    theirs = tensor([-1.253023, -0.624403, -0.226656, 0.665792, -1.613059],
                    [0.007344, -1.759091, 0.1867, 0, 0], [1.092613, 0, 0, 0, 0])
    real, n = advantages[mask], int(mask.sum())
    ours = whiten(advantages, mask) * math.sqrt((n - 1) / n) + real.mean() * mask  # their variance: by n - 1
    torch.testing.assert_close(ours, theirs, **close)
    losses, ratio = policy_losses(new_logps[mask], logps[mask], theirs[mask], clip=0.2)
    assert losses.mean().item() == pytest.approx(0.370768, abs=2e-6)
    assert (ratio.sum() + 6).item() / 15 == pytest.approx(0.967251, abs=2e-6)  # theirs counts padding, as 1
    assert (losses > -theirs[mask] * ratio).double().mean().item() == pytest.approx(1 / 9)
    errors = value_losses(new_values[mask], values[mask], returns[mask], clip=0.2)
    assert errors.mean().item() == pytest.approx(0.662531, abs=2e-6)


# ---------------------------------------------------------------- one iteration


POLICIES = {"full": lambda: tiny_neox().train(), "lora": lambda: adapted().train()}


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    return tiny_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.mark.parametrize("tuning", POLICIES)
@pytest.mark.parametrize("micro", [None, 2])
def test_ratio_is_exactly_1_at_the_first_minibatch(tuning, micro):
    ppo = tiny_ppo(POLICIES[tuning](), micro_batch_size=micro)
    for step in range(2):
        rollout = ppo.rollout(PROMPTS, step)
        for rows, batch in sum(rollout.minibatches, []):  # nothing learnt yet: all of them
            assert torch.equal(ppo._logps(batch).detach(), rollout.logps[rows][rollout.mask[rows]])
        assert ppo.update(rollout, step)["ratio/first"] == 1.0


def test_a_rollout_is_what_it_says():
    """Log-probs, KL, EOS penalty and reward of a rollout, from their definitions."""
    reference_model = tiny_neox(seed=3)
    ppo = tiny_ppo(reference=FrozenReference(reference_model), kl_coef=0.3, missing_eos_penalty=2.0, lam=1.0,
                   whiten=False, max_completion_tokens=30, batch_size=64)
    rollout = ppo.rollout(PROMPTS * 8, 0)
    sequences = rollout.samples.sequences
    logps, reference = logps_by_hand(ppo.policy, sequences), logps_by_hand(reference_model, sequences)
    kl, ended = logps - reference, torch.tensor([ids[-1] == EOS for _, ids in sequences])
    assert 0 < ended.sum() < len(ended)
    torch.testing.assert_close(rollout.logps.sum(1).double(), logps, atol=1e-5, rtol=1e-5)
    scores = torch.tensor(says_w5(None, rollout.samples.texts))
    total = scores - 2.0 * ~ended - 0.3 * kl
    # the value function starts at 0 and gamma = lambda = 1: the first return is the whole reward
    assert not rollout.values.any()
    torch.testing.assert_close(rollout.returns[:, 0].double(), total, atol=1e-5, rtol=1e-5)
    last = rollout.mask.sum(1) - 1
    assert torch.equal(rollout.mask.sum(1), torch.tensor([len(ids) for _, ids in sequences]))
    at_end = rollout.returns.gather(1, last[:, None])[:, 0]
    assert (at_end - scores + 2.0 * ~ended).abs().max() < 3.0  # the score is there, less one token's penalty
    numbers = rollout.numbers
    assert numbers["kl/sequence"] == pytest.approx(kl.mean().item(), abs=1e-5)
    assert numbers["reward/model"] == pytest.approx(scores.mean().item())
    assert numbers["reward/mean"] == pytest.approx(total.mean().item(), abs=1e-5)
    assert numbers["eos_rate"] == pytest.approx(ended.double().mean().item())
    assert numbers["entropy"] == pytest.approx((-logps.sum() / rollout.mask.sum()).item(), abs=1e-5)
    assert numbers["kl/k3"] > 0


def test_micro_batches_change_nothing():
    results = []
    for micro in (None, 1):
        ppo = tiny_ppo(micro_batch_size=micro, ppo_epochs=2)
        numbers = ppo.update(ppo.rollout(PROMPTS, 0), 0)
        results.append((numbers, weights(ppo.policy), weights(ppo.value)))
    (one, policy, value), (other, policy2, value2) = results
    for name in one:
        assert other[name] == pytest.approx(one[name], abs=2e-5, rel=1e-4), name
    for ours, theirs in ((policy, policy2), (value, value2)):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tuning", POLICIES)
def test_policy_and_value_gradients_are_separate(tuning):
    """A value loss moves nothing of the policy, a policy loss nothing of the values."""
    for frozen, moving in ((0, 1), (1, 0)):
        ppo = tiny_ppo(POLICIES[tuning](), ppo_epochs=1)
        groups = ppo.trained
        assert not {id(w) for w in groups[0]} & {id(w) for w in groups[1]}
        rollout = ppo.rollout(PROMPTS, 0)
        if frozen == 0:
            rollout.advantages.zero_()  # no policy loss
        else:
            rollout.returns.copy_(rollout.values)  # no value loss
        before = [[w.detach().clone() for w in group] for group in groups]
        others = {n: w for n, w in weights(ppo.policy).items() if ".default." not in n and ".value." not in n}
        ppo.update(rollout, 0)
        assert all(torch.equal(a, b) for a, b in zip(before[frozen], groups[frozen]))
        assert any(not torch.equal(a, b) for a, b in zip(before[moving], groups[moving]))
        if tuning == "lora":  # base model, reference
            now = weights(ppo.policy)
            assert all(torch.equal(weight, now[name]) for name, weight in others.items())


@pytest.mark.parametrize("tuning", POLICIES)
def test_it_learns_what_is_rewarded(tuning):
    ppo = tiny_ppo(POLICIES[tuning](), kl_coef=0.01, learning_rate=1e-2 if tuning == "full" else 3e-2)
    found = []
    for step in range(12):
        rollout = ppo.rollout(PROMPTS * 2, step)
        found.append(rollout.numbers["reward/model"])
        ppo.update(rollout, step)
    assert found[-1] > found[0] + 1.5
    assert rollout.numbers["kl/sequence"] > 1


@pytest.mark.parametrize("tuning", POLICIES)
def test_gradient_checkpointing_changes_nothing(tuning):
    """It computes the forward again in the backward: the value function's with its own adapter."""
    results = []
    for checkpointed in (False, True):
        ppo = tiny_ppo(POLICIES[tuning](), ppo_epochs=1)
        for model in (ppo.policy.get_base_model() if tuning == "lora" else ppo.policy, ppo.value.backbone):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        generator = torch.Generator().manual_seed(0)
        for weight in ppo.trained[1]:  # at its start the value adapter equals the policy's, under a head of 0
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        before = [weight.detach().clone() for weight in ppo.trained[1]]
        ppo.update(ppo.rollout(PROMPTS, 0), 0)
        assert not any(map(torch.equal, ppo.trained[1], before))  # all of it learns
        results.append([weight.detach().clone() for group in ppo.trained for weight in group])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_loss_that_is_not_finite_stops_before_the_weights_change():
    ppo = tiny_ppo()
    rollout = ppo.rollout(PROMPTS, 0)
    rollout.advantages[rollout.mask] = float("nan")
    before = weights(ppo.policy)
    with pytest.raises(FloatingPointError, match="step 1: loss/policy and gradient norms not finite"):
        ppo.update(rollout, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(ppo.policy).items())


def test_weights_that_are_not_finite_stop_the_run_before_the_next_samples():
    ppo = tiny_ppo(ppo_epochs=1, minibatches=1, learning_rate=1e38)
    rollout = ppo.rollout(PROMPTS, 0)
    with pytest.raises(FloatingPointError, match="step 1: weights are not finite any more. Training stops"):
        for _ in range(2):
            ppo.update(rollout, 0)


@pytest.mark.parametrize("reward", [[1.0], [[1.0]] * 8, 1.0, [1.0] * 7])
def test_a_reward_is_one_number_for_each_completion(reward):
    with pytest.raises(ValueError, match="the reward of 8 completions has shape .* one number for each"):
        tiny_ppo(reward=lambda prompts, texts: reward).rollout(PROMPTS, 0)


# ---------------------------------------------------------------- value function and reward


def test_values_start_from_the_reward_model(reward_folder):
    model = RewardModel.load(reward_folder)
    ppo = tiny_ppo(reward=str(reward_folder))
    rollout = ppo.rollout(PROMPTS, 0)
    scores = model.score_ids(rollout.samples.sequences)
    assert rollout.numbers["reward/model"] == pytest.approx(scores.mean().item(), abs=1e-6)
    for (prompt, completion), values in zip(rollout.samples.sequences, rollout.values):
        for t in range(len(completion)):  # V of a state is what the reward model says of the text so far
            so_far = model.model(torch.tensor([[*prompt, *completion[:t]]])).logits.item()
            assert values[t].item() == pytest.approx(so_far, abs=1e-5)
    ppo.update(rollout, 0)
    torch.testing.assert_close(model.score_ids(rollout.samples.sequences), scores)  # the reward stays


def test_lora_has_one_base_and_an_adapter_for_each(tmp_path):
    """Policy, reference, value and reward on one base; the value function starts as the reward model."""
    base = str(write_model(tmp_path / "base"))
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lora = {"target_modules": "all-linear", "init_lora_weights": False}
        head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        classifier = get_peft_model(classifier, LoraConfig(r=3, **head, **lora))
        classifier.save_pretrained(tmp_path / "reward")
        tiny_tokenizer().save_pretrained(tmp_path / "reward")
        policy = AutoModelForCausalLM.from_pretrained(base)
        policy = get_peft_model(policy, LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
    alone = RewardModel.load(tmp_path / "reward")
    ppo = tiny_ppo(policy.train(), reward=str(tmp_path / "reward"))
    assert isinstance(alone.model, PeftModel)
    assert set(policy.peft_config) == {"default", "reference", "reward", "value"}
    big = [w for name, w in policy.named_parameters() if "lora" not in name]
    mine = {w.data_ptr() for w in big} | {w.data_ptr() for w in policy.parameters()}
    assert all(w.data_ptr() in mine for n, w in ppo.value.named_parameters() if n != "score.weight")
    rollout = ppo.rollout(PROMPTS, 0)
    sequences = rollout.samples.sequences
    expected = alone.score_ids(sequences)
    assert rollout.numbers["reward/model"] == pytest.approx(expected.mean().item(), abs=1e-5)
    prompt, completion = sequences[0]
    with active(ppo.value):
        values = completion_values(ppo.value, collate([(prompt, completion)], 0))
    for t in range(len(completion)):
        so_far = alone.score_ids([(prompt[:-1], [*prompt[-1:], *completion[:t]])]).item()
        assert values[t].item() == pytest.approx(so_far, abs=1e-5)
    ppo.update(rollout, 0)
    assert list(policy.active_adapters) == ["default"]
    again = ppo.score(PROMPTS, rollout.samples)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)  # the frozen reward did not learn
