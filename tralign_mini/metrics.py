"""Numbers that judge a policy: means with intervals, win rates, diversity.

A leaf: numpy, scipy and sacrebleu only. Every interval is a 95 % interval over what is passed in, usually the
evaluation prompts of one run: it says nothing about other seeds. For seeds, pass one number a run.
KL is not here: it is `mean_interval` of the log-ratios of a policy's own samples (`generate.sample`,
`logprobs.completion_logps`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams
from scipy import stats
from scipy.special import expit

RESAMPLES = 2000
WEAK_PRIOR = 0.01  # precision of the length model's coefficients: a standard deviation of 10
TIE = 1e-9  # two rewards this close are equal: sums of the same terms in another order differ by rounding


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of `values` with Student's t interval. One value has no spread: low and high are NaN."""
    x = _numbers(values, "values")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def outcomes(a, b) -> np.ndarray:
    """What `a` gets of each comparison: 1 for a higher score than `b`, 0.5 for an equal one, 0."""
    gap = np.subtract(a, b)
    return np.where(np.abs(gap) <= TIE, 0.5, gap > 0)


def win_rate(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval:
    """Share of prompts on which `a` scores higher than `b`; a tie counts half.

    a, b: scores of the same prompts in the same order. The interval is a percentile bootstrap over prompts,
    except where every prompt has the same outcome: there the bootstrap collapses to a point, and the exact
    binomial bound (Clopper-Pearson) is given.
    """
    a, b = _numbers(a, "a"), _numbers(b, "b")
    if a.size != b.size:
        raise ValueError(f"win_rate compares prompt by prompt, but a has {a.size} scores and b has {b.size}. "
                         "Score both policies on the same prompts.")
    won = outcomes(a, b)
    rate = float(won.mean())
    if np.ptp(won) == 0:
        return _unanimous(rate, a.size)
    kinds = np.array([0.0, 0.5, 1.0])  # loss, tie, win: to resample prompts is to resample their counts
    shares = [np.mean(won == kind) for kind in kinds]
    draws = np.random.default_rng(seed).multinomial(a.size, shares, size=RESAMPLES)
    return _percentiles(rate, draws @ kinds / a.size)


def length_controlled(a: Sequence[float], b: Sequence[float], length_a: Sequence[float],
                      length_b: Sequence[float], *, seed: int = 0) -> Interval:
    """The win rate of `a` as it would be if its answers were as long as those of `b` (arXiv 2404.04475).

    a, b: scores as for `win_rate`; length_a, length_b: how long the answers are, in any unit. Fitted to the
    outcomes (a tie is half a win) is P(a wins) = sigmoid(theta + phi tanh(d / std(d))), d = length_a -
    length_b; the value is sigmoid(theta), the model at d = 0, and the interval a percentile bootstrap over
    prompts. Unlike the paper's it has no term for the difficulty of an instruction, which is known for
    AlpacaEval's own only, and a weak Gaussian prior where its code has an L1 penalty and two gamed baselines.
    Unanimous outcomes: as `win_rate`. NaN if all d are one number but 0: it might be length or policy.
    """
    rate = win_rate(a, b, seed=seed)  # refuses bad scores
    lengths = _numbers(length_a, "length_a"), _numbers(length_b, "length_b")
    if {len(a)} != {length.size for length in lengths}:
        raise ValueError(f"length_controlled got {len(a)} scores a side, {lengths[0].size} lengths of a and "
                         f"{lengths[1].size} of b. Give one length for each answer.")
    won, longer, n = outcomes(a, b), lengths[0] - lengths[1], len(a)
    if np.ptp(won) == 0 or not longer.any():
        return rate
    rng, draws = np.random.default_rng(seed), []
    for part in np.array_split(range(RESAMPLES), 1 + RESAMPLES * n // 2**22):  # so much memory at once
        draws.append(_at_equal_length(won, longer, rng.multinomial(n, np.full(n, 1 / n), size=len(part))))
    return _percentiles(at_equal_length(won, longer), np.concatenate(draws))


def at_equal_length(won: Sequence[float], longer: Sequence[float]) -> float:
    """The value of `length_controlled` alone, of `outcomes` and of how much longer the answers of a are."""
    won, longer = np.asarray(won, dtype=float), np.asarray(longer, dtype=float)
    if np.ptp(won) == 0 or not longer.any():
        return float(won.mean())
    return float(_at_equal_length(won, longer, np.ones((1, won.size)))[0])


def probability_of_improvement(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval:
    """P(A > B) + P(A = B) / 2 for independent draws A and B: Mann-Whitney's U divided by the number of pairs.

    a, b: one score a run (or a prompt), not paired, lengths may differ. Percentile bootstrap that resamples
    each side on its own; if all pairs agree, the exact binomial bound of min(len(a), len(b)) disjoint pairs.
    """
    a, b = _numbers(a, "a"), _numbers(b, "b")
    won = outcomes(a[:, None], b[None, :])
    value = float(won.mean())
    if np.ptp(won) == 0:
        return _unanimous(value, min(a.size, b.size))
    rng = np.random.default_rng(seed)
    of_a = rng.multinomial(a.size, np.full(a.size, 1 / a.size), size=RESAMPLES)
    of_b = rng.multinomial(b.size, np.full(b.size, 1 / b.size), size=RESAMPLES)
    return _percentiles(value, ((of_a @ won) * of_b).sum(axis=1) / (a.size * b.size))


def self_bleu(texts: Sequence[str], n: int = 3) -> float:
    """How alike `texts` are: mean BLEU-n of each against all others, 0 (nothing shared) to 1 (all equal).

    sacrebleu's sentence BLEU (tokenizer 13a, exponential smoothing, effective order), divided by 100; an
    empty text counts 1 if another one is empty too, else 0. It grows with the number of texts, so compare
    equal numbers only. n = 3 as in the code of arXiv 2404.09656.
    """
    counts, lengths = zip(*_ngrams(texts, 1, n, at_least=2))
    # The references of a text are all others. For each n-gram the largest and second largest count of any
    # text give the clip "largest count among the others" without merging all references anew for every text.
    first, second = Counter(), Counter()
    for grams in counts:
        for gram, count in grams.items():
            second[gram] = max(second[gram], min(count, first[gram]))
            first[gram] = max(first[gram], count)
    texts_of_length, scores = Counter(lengths), []
    for grams, length in zip(counts, lengths):
        if length == 0:
            scores.append(float(texts_of_length[0] > 1))
            continue
        correct, total = [0] * n, [0] * n
        for gram, count in grams.items():
            others = second[gram] if count == first[gram] else first[gram]
            correct[len(gram) - 1] += min(count, others)
            total[len(gram) - 1] += count
        others = texts_of_length - Counter([length])  # for the brevity penalty: the nearest length of another
        closest = min(others, key=lambda other: (abs(other - length), other))
        score = BLEU.compute_bleu(correct, total, length, closest, smooth_method="exp", effective_order=True,
                                  max_ngram_order=n)
        scores.append(score.score / 100)
    return float(np.mean(scores))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams divided by all n-grams, over all texts (Li et al. 2016); words by tokenizer 13a."""
    grams = Counter()
    for of_text, _ in _ngrams(texts, n, n, at_least=1):
        grams.update(of_text)
    if not grams:
        raise ValueError(f"None of the {len(texts)} texts has {n} words, so there is no {n}-gram to count. "
                         "Choose a smaller n.")
    return len(grams) / grams.total()


def _ngrams(texts: Sequence[str], low: int, high: int, *, at_least: int) -> list[tuple[Counter, int]]:
    """Of each text its n-grams of these orders, as often as they occur, and its number of words."""
    if isinstance(texts, str):
        raise ValueError("texts is a single string: pass a list of strings.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{i}] is {type(text).__name__}, not a string.")
    if len(texts) < at_least or high < 1:
        raise ValueError(f"Diversity needs at least {at_least} text(s) and n >= 1, not {len(texts)} and "
                         f"n={high}.")
    tokenize = BLEU().tokenizer
    return [extract_all_word_ngrams(tokenize(text.rstrip()), low, high) for text in texts]


def _at_equal_length(won: np.ndarray, longer: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """sigmoid(theta) of the fits in which prompt i counts counts[r, i] times, (r,): Newton, all at once."""
    if np.ptp(longer) == 0:
        return np.full(len(counts), np.nan)
    x = np.tanh(longer / longer.std())
    design, products = np.stack([np.ones_like(x), x]), np.stack([np.ones_like(x), x, x, x * x], axis=1)
    coefficients = np.zeros((len(counts), 2))
    for _ in range(50):
        p = expit(coefficients @ design)
        gradient = (counts * (won - p)) @ design.T - WEAK_PRIOR * coefficients
        curvature = ((counts * p * (1 - p)) @ products).reshape(-1, 2, 2) + WEAK_PRIOR * np.eye(2)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0].clip(-2, 2)  # far steps overshoot
        coefficients += step
        if np.abs(step).max() < 1e-9:
            break
    return expit(coefficients[:, 0])


def _unanimous(value: float, n: int) -> Interval:
    """All n outcomes equal `value`: each with probability p or more, 0.025 = p ** n; the rest is free."""
    p = 0.025 ** (1 / n)
    return Interval(value, value * p, value * p + 1 - p)


def _percentiles(value: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _numbers(values: Sequence[float], name: str) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: pass a flat list with at least one number.")
    bad = np.flatnonzero(~np.isfinite(x))
    if bad.size:
        raise ValueError(f"{name} holds {bad.size} value(s) that are not finite, the first at index {bad[0]} "
                         f"({x[bad[0]]}). Drop or repair them first: an average over them means nothing.")
    return x
