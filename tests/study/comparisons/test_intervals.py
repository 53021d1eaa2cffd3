"""Intervals over seeds, against the textbook and by simulation."""

import numpy as np
import pytest

from treerpo_ray.study.comparisons.intervals import (
    difference_interval,
    jackknife_interval,
    mean_interval,
    ratio_interval,
)


def test_a_mean_has_the_interval_of_student() -> None:
    interval = mean_interval(np.array([1.0, 2.0, 3.0]))
    # t(0.975, 2) = 4.30265, standard error 1 / sqrt(3)
    assert (interval.mean, interval.low) == pytest.approx((2, 2 - 4.30265 / 3**0.5), rel=1e-4)
    assert np.isnan(mean_interval(np.array([5.0])).low)


def test_a_difference_has_the_interval_of_welch() -> None:
    interval = difference_interval(np.array([3.0, 5.0]), np.array([1.0, 1.0, 1.0]))
    # Only the first varies: one degree of freedom, standard error 1, t(0.975, 1) = 12.7062
    assert (interval.mean, interval.high) == pytest.approx((3, 3 + 12.7062), rel=1e-4)


def test_intervals_of_means_cover_in_simulation() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(10, 3, (2000, 5))
    found = [mean_interval(row) for row in draws]
    share = np.mean([interval.low < 10 < interval.high for interval in found])
    # 4 standard deviations of a share of 2000 at 0.95
    assert share == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("deviations", [(3.0, 1.0), (1.0, 3.0)])
def test_intervals_of_differences_cover_in_simulation(deviations: tuple[float, float]) -> None:
    """Five draws around 7 less three around 5.

    Welch's degrees of freedom are an estimate: it costs a point where the three are the wider ones.
    """
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(7, deviations[0], (2000, 5)), rng.normal(5, deviations[1], (2000, 3))
    found = [difference_interval(*pair) for pair in zip(ours, theirs, strict=True)]
    share = np.mean([interval.low < 2 < interval.high for interval in found])
    assert 0.92 < share < 0.97


def test_a_ratio_has_the_interval_of_a_jackknife_on_logarithms() -> None:
    """The ratio is 2 without one seed of ours and 8 without the other, else 4."""
    interval = ratio_interval(np.log(4.0), np.log([2.0, 8.0]), np.log([4.0, 4.0, 4.0]))
    # (n - 1)/n of the squares: half of 2 log(2)^2; one degree of freedom, t(0.975, 1) = 12.7062
    assert (interval.mean, interval.high) == pytest.approx((4, 4 * 2**12.7062), rel=1e-4)
    assert interval.low * interval.high == pytest.approx(4**2)
    assert np.isnan(ratio_interval(0.0, np.array([]), np.log([4.0, 4.0])).high)


def test_of_a_mean_the_jackknife_is_the_interval_of_student() -> None:
    values = np.array([1.0, 2.0, 4.0])
    without = (values.sum() - values) / 2
    found, expected = jackknife_interval(values.mean(), without), mean_interval(values)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high])
    assert np.isnan(jackknife_interval(3.0, np.array([])).low)


def test_of_means_the_jackknife_is_the_interval_of_welch() -> None:
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.7])
    without = [(each.sum() - each) / (len(each) - 1) for each in (ours, theirs)]
    log = ours.mean() - theirs.mean()
    found = ratio_interval(log, without[0] - theirs.mean(), ours.mean() - without[1])
    expected = difference_interval(ours, theirs)
    assert [np.log(found.low), np.log(found.high)] == pytest.approx([expected.low, expected.high])
