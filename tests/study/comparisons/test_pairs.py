"""Pairs: p values, and what is left of them after the correction."""

import numpy as np
import pytest

from tests.support.saved_runs.results import make_result
from treerpo_ray.study.comparisons.comparison import Arm, Comparison, Setting, Trial
from treerpo_ray.study.comparisons.pairs import holm, pairs

COMPARISON = Comparison(
    base=[],
    references=[],
    settings={"short": Setting(answer_tokens=1, sampled_tokens=1)},
    arms={name: Arm(num_seeds=2) for name in ("low", "high", "even", "single")},
)


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    p = np.array([0.04, 0.01, 0.015, 0.9])
    # In order 0.01 * 4, 0.015 * 3, 0.04 * 2, 0.9 * 1
    assert holm(p) == pytest.approx(np.array([0.08, 0.04, 0.045, 0.9]))
    assert holm(np.array([0.02, 0.0199])) == pytest.approx(np.array([0.0398, 0.0398]))
    assert holm(np.array([0.6, 0.7])) == pytest.approx(np.array([1.0, 1.0]))


def test_every_pair_of_two_seeds_is_listed_with_the_better_arm_first() -> None:
    shares = {"low": [0.1, 0.2], "high": [0.5, 0.5001], "even": [0.3, 0.3], "single": [0.4]}
    results = [
        make_result(Trial(setting="short", arm=arm, seed=seed), share)
        for arm, own in shares.items()
        for seed, share in enumerate(own)
    ]
    found = {(pair.arm, pair.other): pair for pair in pairs(COMPARISON, results)}
    assert list(found) == [("high", "low"), ("even", "low"), ("high", "even")]
    # 15 points with a standard error of 5 and one degree of freedom: p = 1 - 2 atan(3) / pi
    even = found["even", "low"]
    assert even.ahead.mean == pytest.approx(15)
    assert even.p == pytest.approx(1 - 2 * np.arctan(3) / np.pi)
    assert found["high", "even"].p_corrected == pytest.approx(3 * found["high", "even"].p)
    assert [pair.is_told_apart for pair in found.values()] == [False, False, True]


def test_arms_of_which_neither_varies_are_not_tested() -> None:
    results = [
        make_result(Trial(setting="short", arm=arm, seed=seed), share)
        for arm, share in (("low", 0.0), ("even", 0.5))
        for seed in range(2)
    ]
    assert pairs(COMPARISON, results) == []
