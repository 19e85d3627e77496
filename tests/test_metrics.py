"""metrics: values by hand, sacrebleu and scipy as oracles, coverage of the intervals, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU
from scipy import optimize, stats
from scipy.special import expit

from tralign_mini import metrics

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


def test_mean_interval_by_hand():
    # mean 2, sample deviation 1, n = 3: half width 4.302653 (t, 2 degrees of freedom) / sqrt(3)
    value, low, high = metrics.mean_interval([1, 2, 3])
    assert value == 2
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


def test_mean_interval_of_one_value_has_no_bounds():
    value, low, high = metrics.mean_interval([7.0])
    assert value == 7 and math.isnan(low) and math.isnan(high)


def test_mean_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        _, low, high = metrics.mean_interval(rng.normal(3.0, 2.0, size=12))
        hits += low <= 3.0 <= high
    assert 930 <= hits <= 970


def test_win_rate_by_hand_ties_half():
    assert metrics.win_rate([2, 0, 1, 1], [1, 1, 1, 0]).value == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_outcomes_by_hand():
    assert metrics.outcomes([2, 0.1 + 0.2, 1], [1, 0.3, 3]).tolist() == [1, 0.5, 0]
    assert metrics.outcomes(np.array([[1], [2]]), [1, 2]).tolist() == [[0.5, 0], [1, 0.5]]


def test_win_rate_takes_rounding_for_a_tie():
    assert metrics.win_rate([0.1 + 0.2, 1.0], [0.3, 0.0]).value == 0.75


def test_win_rate_is_paired_where_probability_of_improvement_is_not():
    a, b = [1, 2, 3, 4], [0, 1, 2, 3]  # a wins every prompt; of 16 pairs it wins 10 and ties 3
    assert metrics.win_rate(a, b).value == 1
    assert metrics.probability_of_improvement(a, b).value == pytest.approx(11.5 / 16)


def test_win_rate_interval_is_that_of_a_proportion():
    # 60 of 100: the bootstrap of a proportion is binomial(100, 0.6) / 100, whose 2.5 % and 97.5 % points are
    # known
    _, low, high = metrics.win_rate([1] * 60 + [0] * 40, [0] * 60 + [1] * 40)
    assert low == pytest.approx(stats.binom.ppf(0.025, 100, 0.6) / 100, abs=0.011)
    assert high == pytest.approx(stats.binom.ppf(0.975, 100, 0.6) / 100, abs=0.011)


def test_ties_narrow_the_interval():
    a_tie, b_tie = [1] * 10 + [0] * 80 + [0] * 10, [0] * 10 + [0] * 80 + [1] * 10
    a_bet, b_bet = [1] * 50 + [0] * 50, [0] * 50 + [1] * 50
    tie, bet = metrics.win_rate(a_tie, b_tie), metrics.win_rate(a_bet, b_bet)
    assert tie.value == bet.value == 0.5
    assert tie.high - tie.low < 0.6 * (bet.high - bet.low)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1] * 5, [0] * 5, (1, 0.025**0.2, 1)),  # five wins of five are no proof of 100 %
        ([0] * 5, [1] * 5, (0, 0, 1 - 0.025**0.2)),
        ([1] * 5, [1] * 5, (0.5, 0.5 * 0.025**0.2, 1 - 0.5 * 0.025**0.2)),
    ],
)
def test_unanimous_outcomes_keep_an_honest_interval(a, b, expected):
    assert metrics.win_rate(a, b) == pytest.approx(expected)
    assert metrics.probability_of_improvement(a, b) == pytest.approx(expected)


def test_unanimous_bound_is_clopper_pearson():
    exact = stats.binomtest(7, 7).proportion_ci(0.95, method="exact")
    assert metrics.win_rate([1] * 7, [0] * 7)[1:] == pytest.approx((exact.low, exact.high))


@given(numbers, numbers)
@settings(max_examples=50, deadline=None)
def test_probability_of_improvement_is_mann_whitney(a, b):
    a, b = np.round(a), np.round(b)
    value, low, high = metrics.probability_of_improvement(a, b)
    assert value == pytest.approx(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))
    assert 0 <= low <= high <= 1
    assert metrics.probability_of_improvement(b, a).value == pytest.approx(1 - value)


def test_probability_of_improvement_interval_covers():
    # P(N(0.5, 1) > N(0, 1)) = Phi(0.5 / sqrt 2)
    rng, truth = np.random.default_rng(1), stats.norm.cdf(0.5 / math.sqrt(2))
    hits = 0
    for _ in range(100):
        _, low, high = metrics.probability_of_improvement(rng.normal(0.5, 1, 40), rng.normal(0, 1, 30))
        hits += low <= truth <= high
    assert 88 <= hits <= 99


@given(numbers)
@settings(max_examples=50, deadline=None)
def test_swapping_sides_mirrors_the_win_rate(a):
    b = a[::-1]
    assert metrics.win_rate(a, b).value == pytest.approx(1 - metrics.win_rate(b, a).value)


def test_same_seed_same_interval():
    a, b = list(range(20)), [9.5] * 20
    assert metrics.win_rate(a, b, seed=3) == metrics.win_rate(a, b, seed=3)
    assert metrics.probability_of_improvement(a, b, seed=3) == metrics.probability_of_improvement(
        a, b, seed=3)


def plain_self_bleu(texts, n):
    bleu = BLEU(max_ngram_order=n, effective_order=True)
    return np.mean(
        [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100 for i, text in enumerate(texts)])


words = st.lists(st.sampled_from("a b c d the cat".split()), min_size=1, max_size=12).map(" ".join)


@given(st.lists(words, min_size=2, max_size=8), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_self_bleu_is_sacrebleu_against_all_others(texts, n):
    assert metrics.self_bleu(texts, n) == pytest.approx(plain_self_bleu(texts, n))


def test_self_bleu_by_hand():
    # each has 2 of 3 words and 1 of 2 pairs in the other one, no triple: exp smoothing gives 1 / (2 * 1)
    value = metrics.self_bleu(["a b c", "a b d"], n=3)
    assert value == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))


def test_self_bleu_ends_of_the_scale():
    assert metrics.self_bleu(["the cat sat down"] * 4) == pytest.approx(1)
    assert metrics.self_bleu(["a b c d", "e f g h"]) == 0


def test_a_policy_that_says_nothing_is_not_diverse():
    assert metrics.self_bleu(["", "", ""]) == 1
    assert metrics.self_bleu(["", "a b c d", "e f g h"]) == 0


def test_distinct_n_by_hand():
    assert metrics.distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert metrics.distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab | ab


def outcomes(rng, d, theta, phi):
    """Who wins under the model of arXiv 2404.04475: (scores of a, scores of b)."""
    wins = rng.random(len(d)) < expit(theta + phi * np.tanh(d / np.std(d)))
    return wins.astype(float), 1.0 - wins


def test_length_controlled_by_hand():
    """a is longer in 80 prompts and wins 72, shorter in 20 and wins 10: theta is the mean of the logits.

    (log 9 + log 1) / 2 = log 3, hence 3/4, where the plain rate is 0.82.
    """
    a = [1] * 72 + [0] * 8 + [1] * 10 + [0] * 10
    b, lengths = [1 - x for x in a], ([20] * 80 + [10] * 20, [10] * 80 + [20] * 20)
    value, low, high = metrics.length_controlled(a, b, *lengths)
    assert value == pytest.approx(0.75, abs=1e-3) and low < 0.75 < high
    assert metrics.win_rate(a, b).value == 0.82


def test_at_equal_length_is_the_value_of_length_controlled():
    rng = np.random.default_rng(3)
    won, longer = rng.choice([0, 0.5, 1], 30), rng.integers(-9, 9, 30)
    value = metrics.length_controlled(won, 1 - won, longer, np.zeros(30)).value
    assert metrics.at_equal_length(won, longer) == value != won.mean()
    assert metrics.at_equal_length([1, 0, 1], [0, 0, 0]) == pytest.approx(2 / 3)
    assert metrics.at_equal_length([1, 1], [3, 4]) == 1 and np.isnan(metrics.at_equal_length([1, 0], [3, 3]))


def test_length_controlled_is_even_for_equals_of_whom_one_is_longer():
    rng = np.random.default_rng(0)
    d = rng.normal(15, 20, size=2000)
    a, b = outcomes(rng, d, 0.0, 2.0)
    value, low, high = metrics.length_controlled(a, b, 100 + d, np.full(2000, 100.0))
    assert low < 0.5 < high and high - low < 0.08 and metrics.win_rate(a, b).low > 0.65


def test_length_controlled_covers_the_truth(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    rng, hits = np.random.default_rng(1), 0
    for seed in range(100):
        d = rng.normal(20, 30, size=100)
        a, b = outcomes(rng, d / d.std(), 0.5, 1.5)
        _, low, high = metrics.length_controlled(a, b, d, np.zeros(100), seed=seed)
        hits += low <= expit(0.5) <= high
    assert 88 <= hits <= 99


def test_length_controlled_is_the_minimum_of_its_loss():
    """Against a general optimiser, ties included, in any unit of length."""
    rng = np.random.default_rng(2)
    a, length_a, length_b = rng.choice([0, 0.5, 1], 40), rng.integers(5, 30, 40), rng.integers(5, 25, 40)
    d = length_a - length_b
    x = np.tanh(d / d.std())

    def loss(w):
        logits = w[0] + w[1] * x
        return np.sum(np.logaddexp(0, logits) - a * logits) + metrics.WEAK_PRIOR / 2 * np.dot(w, w)

    expected = expit(optimize.minimize(loss, [0.0, 0.0]).x[0])
    for unit in (1, 6):
        value = metrics.length_controlled(a, 1 - a, unit * length_a, unit * length_b).value
        assert value == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.integers(0, 9), st.integers(0, 9)), min_size=2))
@settings(max_examples=30, deadline=None)
def test_swapping_sides_mirrors_the_length_controlled_rate(rows):
    a, length_a, length_b = map(np.array, zip(*rows))
    forth = metrics.length_controlled(a, 1 - a, length_a, length_b)
    back = metrics.length_controlled(1 - a, a, length_b, length_a)
    assert back.value == pytest.approx(1 - forth.value, nan_ok=True)
    assert back.low == pytest.approx(1 - forth.high, nan_ok=True)


def test_length_controlled_where_length_says_nothing_or_all():
    a, b = [1, 1, 0, 1], [0, 0, 1, 0]
    assert metrics.length_controlled(a, b, [5] * 4, [5] * 4) == metrics.win_rate(a, b)
    ever = [1] * 5, [0] * 5
    assert metrics.length_controlled(*ever, range(5), [1] * 5) == metrics.win_rate(*ever)
    assert all(np.isnan(metrics.length_controlled(a, b, [6] * 4, [5] * 4)))  # always one longer: unknowable
    value, low, high = metrics.length_controlled(a, b, [9, 8, 1, 7], [5] * 4)  # the longer one always wins
    assert 0 < low <= value <= high < 1


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.length_controlled([1, 0], [0, 1], [1, 2], [1]), "2 lengths of a and 1 of b"),
    (lambda: metrics.length_controlled([1, 0], [0, 1], [1, float("nan")], [1, 2]), "length_a holds 1 value"),
    (lambda: metrics.mean_interval([]), "at least one number"),
    (lambda: metrics.mean_interval([[1, 2]]), r"shape \(1, 2\)"),
    (lambda: metrics.mean_interval([1, float("nan")]), "not finite, the first at index 1"),
    (lambda: metrics.win_rate([1, 2], [1]), "a has 2 scores and b has 1"),
    (lambda: metrics.win_rate([1, 2], [1, float("inf")]), "b holds 1 value"),
    (lambda: metrics.probability_of_improvement([], [1]), "a has shape"),
    (lambda: metrics.self_bleu(["one"]), "at least 2"),
    (lambda: metrics.self_bleu("one text"), "single string"),
    (lambda: metrics.self_bleu(["a", None]), r"texts\[1\] is NoneType"),
    (lambda: metrics.self_bleu(["a", "b"], n=0), "n >= 1"),
    (lambda: metrics.distinct_n([], 1), "at least 1"),
    (lambda: metrics.distinct_n(["a b"], 3), "smaller n"),
    (lambda: metrics.distinct_n(["a b"], 0), "n >= 1"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
