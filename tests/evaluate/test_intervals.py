"""Intervals: closed forms, honest ends, and as often right as they say."""

import numpy as np
import pytest
from scipy.stats import binomtest

from treerpo_ray.evaluate.intervals import Z, difference, mean, share


def of_one_answer(num_problems: int, num_right: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [num_right, num_problems - num_right])


@pytest.mark.parametrize(("size", "right"), [(1, 1), (7, 0), (7, 7), (30, 1), (400, 380)])
def test_of_one_answer_a_problem_it_is_wilsons(size: int, right: int) -> None:
    expected = binomtest(right, size).proportion_ci(method="wilson")
    found = share(of_one_answer(size, right), num_draws=size)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_of_none_right_the_upper_end_is_that_of_so_many_problems() -> None:
    """Eight answers to a problem that all are wrong may be wrong for one reason."""
    low, high = share(np.zeros(25), num_draws=200)
    assert (low, high) == (0, pytest.approx(Z**2 / (25 + Z**2)))
    low, high = share(np.ones(25), num_draws=200)
    assert (low, high) == (pytest.approx(25 / (25 + Z**2)), 1)


def test_answers_count_as_many_independent_ones_as_the_spread_over_problems_tells() -> None:
    """Two answers: as alike as can be, as unlike as if drawn alone, and more alike than chance."""
    alike = share(of_one_answer(40, 20), num_draws=80)
    assert alike == share(of_one_answer(40, 20), num_draws=40)
    drawn_alone = np.repeat([0.0, 0.5, 1.0], [10, 20, 10])  # a variance of 1/8
    expected = binomtest(40, 80).proportion_ci(method="wilson")
    assert share(drawn_alone, num_draws=80) == pytest.approx((expected.low, expected.high))
    assert share(np.full(40, 0.5), num_draws=80) == pytest.approx((expected.low, expected.high))


def test_shares_of_several_answers_cover_the_truth_about_95_times_in_100() -> None:
    """Problems of any hardness, four answers each: the spread over problems counts."""
    rng, covered, trials = np.random.default_rng(0), 0, 1000
    for _ in range(trials):
        hardness = rng.beta(0.5, 4.5, 60)  # a mean of 1/10
        low, high = share(rng.binomial(4, hardness) / 4, num_draws=240)
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / trials <= 0.98


def test_a_paired_difference_is_newcombes() -> None:
    """50 pairs, of which 20 are right on both sides, 12 in ours alone and 2 in theirs alone."""
    ours = np.repeat([1.0, 1.0, 0.0, 0.0], [20, 12, 2, 16])
    theirs = np.repeat([1.0, 0.0, 1.0, 0.0], [20, 12, 2, 16])
    shared = np.corrcoef(ours, theirs)[0, 1]
    (one, other) = (binomtest(number, 50).proportion_ci(method="wilson") for number in (32, 22))
    down = (0.64 - one.low, other.high - 0.44)
    up = (one.high - 0.64, 0.44 - other.low)
    expected = [
        0.2 + sign * (a**2 + b**2 - 2 * shared * a * b) ** 0.5
        for sign, (a, b) in ((-1, down), (1, up))
    ]
    ends = share(ours, 50), share(theirs, 50)
    assert difference(ours, theirs, *ends) == pytest.approx(expected)
    assert 0.05 < expected[0] < 0.2 < expected[1] < 0.35


def test_two_that_are_both_never_wrong_are_not_known_to_be_equal() -> None:
    ends = share(np.ones(20), 20)
    low, high = difference(np.ones(20), np.ones(20), ends, ends)
    assert (low, high) == (pytest.approx(-(Z**2) / (20 + Z**2)), pytest.approx(Z**2 / (20 + Z**2)))


def test_a_paired_difference_covers_the_truth_about_95_times_in_100() -> None:
    """200 problems of any hardness, of which ours gets each right more often by 0.1."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        chances = 0.9 * rng.random(200)
        ours, theirs = (rng.binomial(8, chances + gain) / 8 for gain in (0.1, 0.0))
        low, high = difference(ours, theirs, share(ours, 1600), share(theirs, 1600))
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_arms_of_a_mean_add_up_like_standard_errors() -> None:
    low, high = mean([0.2, 0.6], [(0.17, 0.26), (0.56, 0.68)])
    assert (low, high) == (pytest.approx(0.4 - 0.05 / 2), pytest.approx(0.4 + 0.1 / 2))
