"""Intervals: 95 % intervals in closed form of shares, of their means and of their differences.

They stay honest where none or all is right: a bootstrap, whose resamples are then all alike, would
claim certainty. For one answer a problem that of a share is Wilson's.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

Z = NormalDist().inv_cdf(0.975)

Ends = tuple[float, float]


def share(values: Float[np.ndarray, " problems"], num_draws: int) -> Ends:
    """Wilson's score interval of the mean of shares, at the effective number of answers.

    Answers to the same problem are dependent, so they count as many independent ones as would give
    the spread over problems that is seen (Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015):
    between the number of problems, which is taken where all values are 0 or all 1 and the spread
    tells nothing, and `num_draws`.

    Args:
        values: Of each problem, from 0 to 1.
        num_draws: Answers that they are of; of a share of sets of answers, those without overlap.
    """
    mean, spread, size = float(values.mean()), float(values.var()), float(len(values))
    if 0 < mean < 1:
        alone = mean * (1 - mean)
        size = num_draws if spread * num_draws <= size * alone else size * alone / spread
    middle = mean + Z**2 / (2 * size)
    half = Z * sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    low, high = ((middle + side * half) / (1 + Z**2 / size) for side in (-1, 1))
    return (0.0 if mean <= 0 else min(low, mean)), (1.0 if mean >= 1 else max(high, mean))


def difference(
    ours: Float[np.ndarray, " problems"],
    theirs: Float[np.ndarray, " problems"],
    our_ends: Ends,
    their_ends: Ends,
) -> Ends:
    """Interval of the mean of ours less that of theirs, of the same problems, from that of each.

    Newcombe's for paired shares (Stat. Med. 17, 1998, method 10 without its correction): what lies
    between an end and its mean adds up like standard errors, less what both sides share.
    """
    means = float(ours.mean()), float(theirs.mean())
    below, above = zip(*_arms(means, (our_ends, their_ends)), strict=True)
    shared = 0.0
    if ours.std() > 0 and theirs.std() > 0:
        shared = float(np.corrcoef(ours, theirs)[0, 1])
    low = _sum_of_squares(below[0], above[1], shared)
    high = _sum_of_squares(above[0], below[1], shared)
    return means[0] - means[1] - low, means[0] - means[1] + high


def _sum_of_squares(first: float, second: float, shared: float) -> float:
    return sqrt(max(0.0, first**2 + second**2 - 2 * shared * first * second))


def mean(values: Sequence[float], ends: Sequence[Ends]) -> Ends:
    """Interval of the plain mean of independent statistics, from that of each: what lies between
    an end and its value adds up like standard errors (Zou and Donner, Stat. Med. 27, 2008)."""
    middle, arms = sum(values) / len(values), list(_arms(values, ends))
    low, high = (sqrt(sum(arm[side] ** 2 for arm in arms)) / len(values) for side in (0, 1))
    return middle - low, middle + high


def _arms(values: Sequence[float], ends: Sequence[Ends]) -> Sequence[Ends]:
    return [(value - low, high - value) for value, (low, high) in zip(values, ends, strict=True)]
