"""Pairs: every two arms of a setting against each other, corrected for how many pairs there are."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from treerpo_ray.study.comparisons.comparison import Comparison, Result
from treerpo_ray.study.comparisons.curves import of_arm
from treerpo_ray.study.comparisons.intervals import Interval, difference_interval, difference_p


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two arms in one setting, the one with the higher mean first."""

    setting: str
    arm: str
    other: str
    ahead: Interval
    """Points of held-out Pass@1 that the first is ahead."""
    p: float
    """Of Welch's t test, two-sided."""
    p_corrected: float
    """By Holm's procedure over all pairs of the comparison."""

    @property
    def is_told_apart(self) -> bool:
        """Whether the first is ahead beyond chance, at 5 % after the correction."""
        return self.p_corrected < 0.05


def pairs(comparison: Comparison, results: list[Result]) -> list[Pair]:
    """All pairs of arms that can be tested, by setting: both of two seeds or more in it, which are
    not the same number each."""
    found = []
    for setting in comparison.settings:
        own = {arm: of_arm(results, setting, arm) for arm in comparison.arms}
        arms = {
            arm: np.array([100 * each.after.pass_at_1 for each in runs])
            for arm, runs in own.items()
            if len(runs) > 1
        }
        for pair in combinations(arms, 2):
            first, other = sorted(pair, key=lambda arm: -arms[arm].mean())
            if np.ptp(arms[first]) or np.ptp(arms[other]):
                ahead = difference_interval(arms[first], arms[other])
                found.append((setting, first, other, ahead, difference_p(arms[first], arms[other])))
    corrected = holm(np.array([p for *_, p in found]))
    return [
        Pair(setting=setting, arm=arm, other=other, ahead=ahead, p=p, p_corrected=float(own_p))
        for (setting, arm, other, ahead, p), own_p in zip(found, corrected, strict=True)
    ]


def holm(p: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """p values by Holm's procedure: that any is below a level then where there is no difference has
    at most that level as its probability."""
    corrected, order = np.empty(len(p)), np.argsort(p)
    left = np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1)
    return corrected
