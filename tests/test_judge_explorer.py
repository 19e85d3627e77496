"""A simulated judge: its verdicts by hand, what each way of asking removes, and the panel's picture."""

from __future__ import annotations

import time

import numpy as np
import pytest

import tralign_mini as tr
from tralign_mini.metrics import mean_interval
from tralign_mini.widgets.judge_explorer import WAYS, judged, win_rates

ONCE, BOTH, EQUAL_LENGTH = WAYS
NO_FAULTS = {"place": 0.0, "length": 0.0, "noise": 0.0}


def pairs(seed: int = 0):
    """40 runs of 50 pairs: true gaps around 0, and answers of a that are 3 words longer for no reason."""
    rng = np.random.default_rng(seed)
    runs = np.repeat([f"run {i}" for i in range(40)], 50)
    return runs, rng.normal(0, 2, 2000), rng.normal(3, 6, 2000).round()


def errors(**faults) -> dict:
    """Mean error of each way, with its interval."""
    rates = win_rates(*pairs(), *judged(*pairs()[1:], **NO_FAULTS | faults))
    return {name: mean_interval(rates[name] - rates["true"]) for name in WAYS}


@pytest.mark.parametrize("faults, first, second", [
    ({}, [1, 0, 1, 0.5], [1, 0, 1, 0.5]),
    ({"place": 0.5}, [1, 0, 1, 1], [1, 0, 0, 0]),  # decides where the gap is smaller than that
    ({"length": 0.5}, [0, 1, 1, 0.5], [0, 1, 1, 0.5]),  # 1 - 0.5 * 4 words, -1 + 0.5 * 4 words
])
def test_verdicts_by_hand(faults, first, second):
    found = judged([1.0, -1.0, 0.2, 0.0], [-4, 4, 0, 0], **NO_FAULTS | faults)
    assert [verdicts.tolist() for verdicts in found] == [first, second]


def test_noise_is_drawn_for_each_question_and_is_the_same_in_each_picture():
    settings = NO_FAULTS | {"noise": 1.0}
    first, second = judged(np.zeros(4000), np.zeros(4000), **settings)
    for share in (first.mean(), np.mean(first == second)):
        assert share == pytest.approx(0.5, abs=0.03)
    assert (judged(np.zeros(4000), np.zeros(4000), **settings)[0] == first).all()
    seen = judged(np.ones(4000), np.zeros(4000), **settings)[0]
    assert seen.mean() == pytest.approx(0.841, abs=0.02)  # P(1 + a standard normal > 0)


def test_rates_of_runs_by_hand():
    gold, longer, first, second = [1, -1, 1, 1], [2, 0, 1, 1], np.array([1, 1, 0, 1]), np.array([1, 0, 0, 0])
    rates = win_rates(["x", "x", "y", "y"], gold, longer, first, second)
    assert rates.index.tolist() == ["x", "y"]
    assert rates["true"].tolist() == [0.5, 1.0] and rates[ONCE].tolist() == [1.0, 0.5]
    assert rates[BOTH].tolist() == [0.75, 0.25]  # a contradiction is a tie


def test_a_judge_without_faults_reports_the_truth():
    rates = win_rates(*pairs(), *judged(*pairs()[1:], **NO_FAULTS))
    assert (rates[ONCE] == rates["true"]).all() and (rates[BOTH] == rates["true"]).all()


def test_both_orders_remove_the_place_and_equal_length_the_length():
    place, length = errors(place=1.0, noise=1.0), errors(length=0.3, noise=1.0)
    assert place[ONCE].low > 0.1 > 0.03 > abs(place[BOTH].value)
    assert length[ONCE].low > 0.05 and length[BOTH].low > 0.05 > 0.03 > abs(length[EQUAL_LENGTH].value)


def test_in_both_orders_nobody_has_an_advantage():
    runs, gold, longer = pairs()
    faults = NO_FAULTS | {"place": 0.7}
    forth, back = (win_rates(runs, gap, longer, *judged(gap, longer, **faults)) for gap in (gold, -gold))
    np.testing.assert_allclose(forth[BOTH], 1 - back[BOTH], atol=1e-12)
    assert (forth[ONCE] + back[ONCE] > 1).all()


def test_the_sliders_change_what_is_drawn():
    panel = tr.widgets.judge_explorer(*pairs())
    assert panel.wait() and panel.error is None
    seen = [bytes(panel.image.value)]
    for slider, value in ((panel.place, 2.0), (panel.length, 0.3), (panel.noise, 3.0)):
        slider.value = value
        assert panel.wait() and panel.error is None
        seen.append(bytes(panel.image.value))
    assert len(set(seen)) == 4
    error = errors(place=2.0, length=0.3, noise=3.0)[ONCE].value
    assert [text.get_text() for text in panel.axes[1].texts][0].startswith(f"{error:+.2f} [")
    first, second = judged(*pairs()[1:], place=2.0, length=0.3, noise=3.0)
    assert f"{np.mean(first != second):.0%} of the pairs" in panel.axes[0].texts[0].get_text()
    begun = time.thread_time()
    panel.picture()
    assert time.thread_time() - begun < 0.25
