"""Pairs: every two arms of a setting against each other, corrected for how many pairs there are."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy import stats

from treerpo_ray.study.comparisons.comparison import Comparison, Result
from treerpo_ray.study.comparisons.curves import of_arm
from treerpo_ray.study.comparisons.intervals import Interval, difference_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two arms in one setting, the one with the higher mean first."""

    setting: str
    arm: str
    other: str
    ahead: Interval
    """Points of held-out Pass@1 that the first is ahead."""
    p: float
    """Of Welch's t test, two-sided; NaN where an arm has a single seed, or neither varies."""
    p_corrected: float
    """By Holm's procedure over all pairs of the comparison that have a p."""

    @property
    def is_told_apart(self) -> bool:
        """Whether the first is ahead beyond chance, at 5 % after the correction."""
        return self.p_corrected < 0.05


def pairs(comparison: Comparison, results: list[Result]) -> list[Pair]:
    """All pairs of arms that have results in the same setting, by setting."""
    found = []
    for setting in comparison.settings:
        arms = {
            arm: np.array([100 * each.after.pass_at_1 for each in own])
            for arm in comparison.arms
            if (own := of_arm(results, setting, arm))
        }
        for pair in combinations(arms, 2):
            first, other = sorted(pair, key=lambda arm: -arms[arm].mean())
            ahead, p = difference_interval(arms[first], arms[other]), _p(arms[first], arms[other])
            found.append((setting, first, other, ahead, p))
    corrected = holm(np.array([p for *_, p in found]))
    return [
        Pair(setting=setting, arm=arm, other=other, ahead=ahead, p=p, p_corrected=float(own))
        for (setting, arm, other, ahead, p), own in zip(found, corrected, strict=True)
    ]


def holm(p: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """p values by Holm's procedure: what is below a level then, all of them with a probability of
    at most that level wrongly. NaN does not count and stays."""
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    left = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1)
    return corrected


def _p(ours: Float[np.ndarray, " seeds"], theirs: Float[np.ndarray, " others"]) -> float:
    if min(len(ours), len(theirs)) < 2 or not (np.ptp(ours) or np.ptp(theirs)):
        return float("nan")
    told = ((own.mean(), own.std(ddof=1), len(own)) for own in (ours, theirs))
    (mean, std, count), (other_mean, other_std, other_count) = told
    # Of the moments: `ttest_ind` warns where an arm does not vary.
    test = stats.ttest_ind_from_stats(
        mean, std, count, other_mean, other_std, other_count, equal_var=False
    )
    return float(test.pvalue)
