"""Intervals: 95 % intervals over seeds, of means, differences and ratios."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t); NaN bounds for one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return "" if np.isnan(self.mean) else f"{self.mean:.1f}"
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def mean_interval(values: Float[np.ndarray, " seeds"]) -> Interval:
    """Mean and its 95 % interval by Student's t."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(mean=mean, low=float(mean - half), high=float(mean + half))


def difference_interval(
    ours: Float[np.ndarray, " seeds"], theirs: Float[np.ndarray, " others"]
) -> Interval:
    """Difference of two means and its 95 % interval (Welch's t, unequal variances)."""
    if not len(theirs):
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    mean = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    error, freedom = _welch(ours, theirs)
    half = float(stats.t.ppf(0.975, freedom) * error)
    return Interval(mean=mean, low=mean - half, high=mean + half)


def difference_p(ours: Float[np.ndarray, " seeds"], theirs: Float[np.ndarray, " others"]) -> float:
    """Two-sided p value of the same test: of two numbers or more each, which are not all alike."""
    error, freedom = _welch(ours, theirs)
    return float(2 * stats.t.sf(abs(ours.mean() - theirs.mean()) / error, freedom))


def _welch(
    ours: Float[np.ndarray, " seeds"], theirs: Float[np.ndarray, " others"]
) -> tuple[float, float]:
    """Standard error of a difference of means, and Welch's degrees of freedom."""
    squares = [values.var(ddof=1) / len(values) for values in (ours, theirs)]
    parts = [
        square**2 / (len(values) - 1)
        for square, values in zip(squares, (ours, theirs), strict=True)
    ]
    freedom = sum(squares) ** 2 / max(sum(parts), np.finfo(float).tiny)
    return float(sum(squares) ** 0.5), float(max(freedom, 1.0))


def jackknife_interval(value: float, without: Float[np.ndarray, " seeds"]) -> Interval:
    """What was estimated from the seeds of an arm together, and its 95 % interval, from what it is
    without each of them (Efron and Stein, 1981); of a mean it is that of `mean_interval`."""
    if len(without) < 2:
        return Interval(mean=value, low=float("nan"), high=float("nan"))
    around = mean_interval((len(without) - 1) * without)
    half = around.high - around.mean
    return Interval(mean=value, low=value - half, high=value + half)


def ratio_interval(
    log_ratio: float,
    without_ours: Float[np.ndarray, " seeds"],
    without_theirs: Float[np.ndarray, " others"],
) -> Interval:
    """Ratio whose logarithm was estimated from the seeds of two arms, and its 95 % interval.

    The variance is the jackknife's (Efron and Stein, 1981): of each arm, with n seeds, (n - 1)/n
    times the squares of what it is without each of them, off their mean. Student's t has Welch's
    degrees of freedom.

    Args:
        log_ratio: By all seeds.
        without_ours: Without each seed of one arm.
        without_theirs: Without each of the other.
    """
    mean = float(np.exp(log_ratio))
    if min(len(without_ours), len(without_theirs)) < 2:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    error, freedom = _welch(*((len(each) - 1) * each for each in (without_ours, without_theirs)))
    half = float(stats.t.ppf(0.975, freedom) * error)
    return Interval(mean=mean, low=mean * float(np.exp(-half)), high=mean * float(np.exp(half)))


def ratio_text(ratio: Interval) -> str:
    """A ratio and its interval, if it has one, to two places."""
    interval = "" if np.isnan(ratio.low) else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{ratio.mean:.2f}{interval}"
