"""Scores: statistics of an evaluation, each with a bootstrap interval over problems.

A problem is one unit: its samples are resampled together, since they are not independent. Samples
without a verdict count as neither right nor wrong, and a problem that a score is not defined for
(no verdict at all, fewer than k) is left out of it, which its `num_problems` shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Bool, Float, Int

NUM_RESAMPLES = 10_000
"""Bootstrap resamples behind an interval."""
RESAMPLED_AT_ONCE = 4_000_000
"""Numbers that the bootstrap of a median holds at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A statistic with its 95 % percentile interval."""

    value: float
    low: float
    high: float
    num_problems: int
    """Problems that it is of."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """The samples of one problem, in the order in which they were asked for."""

    is_correct: Float[np.ndarray, " samples"]
    """1 or 0, NaN without a verdict."""
    length: Int[np.ndarray, " samples"]
    """Tokens; 0 of a request that failed, which is left out of what is said of lengths."""
    is_cut_off: Bool[np.ndarray, " samples"]
    """Whether the length limit ended the sample, with or without an answer."""
    group: Int[np.ndarray, " samples"] | None
    """Which samples have equal answers, -1 for one that votes for nothing; None: not known."""

    @property
    def pass_at_1(self) -> float:
        """Share of correct samples; NaN without a verdict."""
        return _mean(self.is_correct[~np.isnan(self.is_correct)])

    @property
    def lengths(self) -> Int[np.ndarray, " sampled"]:
        """Tokens of each sample that there is."""
        return self.length[self.length > 0]

    @property
    def mean_length(self) -> float:
        """Mean tokens of a sample; NaN if all requests failed."""
        return _mean(self.lengths)

    @property
    def cut_off_share(self) -> float:
        """Share of the samples that were cut off; NaN if all requests failed."""
        return _mean(self.is_cut_off[self.length > 0])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def pass_at(samples: Samples, k: int) -> float:
    """Chance that k of the n graded samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k) with c correct: the unbiased estimate of pass@k (M. Chen et al.,
    arXiv 2107.03374). NaN where n < k.
    """
    graded = samples.is_correct[~np.isnan(samples.is_correct)]
    n, c = len(graded), int(graded.sum())
    return float("nan") if n < k else 1 - comb(n - c, k) / comb(n, k)


def majority(samples: Samples) -> float:
    """Whether the answer that most samples give is correct (self-consistency, arXiv 2203.11171).

    Of several such answers one is drawn, so the share of correct ones is its expectation: it
    depends on no order. Samples without an answer or a verdict have no vote; nobody's vote is
    wrong. NaN if no sample has a verdict, or it is not known which answers are equal.
    """
    is_graded = ~np.isnan(samples.is_correct)
    if samples.group is None or not is_graded.any():
        return float("nan")
    votes, is_correct = samples.group[is_graded], samples.is_correct[is_graded]
    groups, counts = np.unique(votes[votes >= 0], return_counts=True)
    if not len(groups):
        return 0.0
    winners = groups[counts == counts.max()]
    return float(np.mean([is_correct[votes == winner].mean() for winner in winners]))


def scores(
    problems: Sequence[Samples], *, pass_ks: Sequence[int], num_samples: int, seed: int
) -> dict[str, Score]:
    """All statistics of a benchmark by their name.

    Args:
        problems: The samples of each problem.
        pass_ks: The k of pass@k.
        num_samples: Samples of a problem, which is the k of maj@k.
        seed: Of the bootstrap.
    """
    by_problem = {
        "pass@1": [problem.pass_at_1 for problem in problems],
        **{f"pass@{k}": [pass_at(each, k) for each in problems] for k in pass_ks if k > 1},
        f"maj@{num_samples}": [majority(problem) for problem in problems],
        "length": [problem.mean_length for problem in problems],
        "cut_off": [problem.cut_off_share for problem in problems],
    }
    found = {}
    for name, values in by_problem.items():
        known = np.array([value for value in values if not np.isnan(value)])
        if len(known):
            low, high = bootstrap_interval(known, seed=seed)
            found[name] = Score(
                value=float(known.mean()), low=low, high=high, num_problems=len(known)
            )
    if sampled := [problem for problem in problems if len(problem.lengths)]:
        found["median_length"] = median_length(sampled, seed=seed)
    return found


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, up to `limit`."""
    return tuple(2**power for power in range(limit.bit_length()))


def bootstrap_interval(values: Float[np.ndarray, " problems"], *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, resampled by problem."""
    levels, counts = np.unique(values, return_counts=True)  # a few: shares of k answers
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(len(values), counts / len(values), NUM_RESAMPLES)
    means = resampled @ levels / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def median_length(problems: Sequence[Samples], *, seed: int) -> Score:
    """Median of the lengths of all samples; problems are resampled with all of theirs."""
    lengths = np.concatenate([problem.lengths for problem in problems])
    owner = np.repeat(np.arange(len(problems)), [len(problem.lengths) for problem in problems])
    order = np.argsort(lengths, kind="stable")
    lengths, owner = lengths[order], owner[order]
    rng = np.random.default_rng(seed)
    share, size = np.full(len(problems), 1 / len(problems)), RESAMPLED_AT_ONCE // len(lengths) + 1
    medians: list[np.ndarray] = []
    for start in range(0, NUM_RESAMPLES, size):
        times = rng.multinomial(len(problems), share, min(size, NUM_RESAMPLES - start))
        medians.append(_weighted_medians(lengths, times[:, owner]))
    low, high = np.percentile(np.concatenate(medians), [2.5, 97.5])
    return Score(
        value=float(np.median(lengths)), low=float(low), high=float(high),
        num_problems=len(problems),
    )  # fmt: skip


def _weighted_medians(
    ascending: Int[np.ndarray, " samples"], times: Int[np.ndarray, "resamples samples"]
) -> Float[np.ndarray, " resamples"]:
    """Median of `ascending` with each value repeated `times`: the mean of the middle two."""
    below = times.cumsum(1)
    total = below[:, -1:]
    lower = (below < (total + 1) // 2).sum(1)
    upper = (below < total // 2 + 1).sum(1)
    return (ascending[lower] + ascending[upper]) / 2


def paired_difference(
    ours: Float[np.ndarray, " problems"], theirs: Float[np.ndarray, " problems"], *, seed: int
) -> Score:
    """Mean of `ours - theirs` over the problems that both know, in the same order."""
    differences = ours - theirs
    known = differences[~np.isnan(differences)]
    if not len(known):
        return Score(value=float("nan"), low=float("nan"), high=float("nan"), num_problems=0)
    low, high = bootstrap_interval(known, seed=seed)
    return Score(value=float(known.mean()), low=low, high=high, num_problems=len(known))
