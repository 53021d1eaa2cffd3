"""Scores: statistics of an evaluation, each with a 95 % interval over problems.

A problem is one unit, since its samples are not independent: intervals of shares are those of
`intervals`, those of lengths are of a bootstrap that resamples them together. Samples
without a verdict count as neither right nor wrong, and a problem that a score is not defined for
(no verdict at all, fewer than k) is left out of it, which its `num_problems` shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from jaxtyping import Bool, Float, Int

from treerpo_ray.evaluate import intervals

NUM_RESAMPLES = 10_000
"""Bootstrap resamples behind an interval."""
RESAMPLED_AT_ONCE = 4_000_000
"""Numbers that the bootstrap holds at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float
    num_problems: int
    """Problems that it is of."""

    @property
    def ends(self) -> intervals.Ends:
        """Those of the interval."""
        return self.low, self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A statistic of two evaluations of the same problems."""

    ours: Score
    theirs: Score
    difference: Score
    """Ours less theirs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """A statistic with its bootstrap distribution over problems."""

    value: float
    resampled: Float[np.ndarray, " resamples"]
    num_problems: int

    @property
    def score(self) -> Score:
        """The statistic with its interval."""
        low, high = np.percentile(self.resampled, [2.5, 97.5])
        return Score(
            value=self.value, low=float(low), high=float(high), num_problems=self.num_problems
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """The samples of one problem, in the order in which they were asked for."""

    is_correct: Float[np.ndarray, " samples"]
    """1 or 0, NaN without a verdict; with partial credit 0: right is what has the whole reward."""
    length: Int[np.ndarray, " samples"]
    """Tokens; 0 of a request that failed, which is left out of what is said of lengths."""
    is_cut_off: Bool[np.ndarray, " samples"]
    """Whether the length limit ended the sample, with or without an answer."""
    group: Int[np.ndarray, " samples"] | None
    """Which samples have equal answers, -1 for one that votes for nothing; None: not known."""
    reward: Float[np.ndarray, " samples"] | None = None
    """From 0 to 1, NaN without a verdict; None: it is `is_correct`, none has partial credit."""

    @property
    def pass_at_1(self) -> float:
        """Share of correct samples; NaN without a verdict."""
        return _mean(self.is_correct[~np.isnan(self.is_correct)])

    @property
    def mean_reward(self) -> float:
        """Mean reward of a sample; NaN without a verdict."""
        rewards = self.is_correct if self.reward is None else self.reward
        return _mean(rewards[~np.isnan(rewards)])

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
    """All statistics of a benchmark by their name; those that no problem has are left out.

    Args:
        problems: The samples of each problem.
        pass_ks: The k of pass@k.
        num_samples: Samples of a problem, which is the k of maj@k.
        seed: Of the bootstrap.
    """
    shares = _shares(problems, pass_ks, num_samples, _has_partial(problems))
    found = {name: each.of(each.is_known).score for name, each in shares.items() if each.is_any}
    lengths = {name: each.score for name, each in _lengths(problems, seed=seed).items()}
    return found | lengths


def paired(
    ours: Sequence[Samples],
    theirs: Sequence[Samples],
    *,
    pass_ks: Sequence[int],
    num_samples: int,
    seed: int,
) -> dict[str, Pair]:
    """All statistics of ours, theirs and ours less theirs, of the same problems in the same order.

    A problem that a statistic is not defined for on one side is left out of it. The other
    arguments are those of `scores`.
    """
    has_partial = _has_partial([*ours, *theirs])
    first, second = (_shares(side, pass_ks, num_samples, has_partial) for side in (ours, theirs))
    found = {}
    for name in first:
        if (is_known := first[name].is_known & second[name].is_known).any():
            found[name] = _paired_shares(first[name].of(is_known), second[name].of(is_known))
    both = [pair for pair in zip(ours, theirs, strict=True) if all(len(s.lengths) for s in pair)]
    one, other = (_lengths([pair[side] for pair in both], seed=seed) for side in (0, 1))
    return found | {name: _paired_lengths(one[name], other[name]) for name in one}


def _paired_shares(ours: "_Shares", theirs: "_Shares") -> Pair:
    first, second = ours.score, theirs.score
    low, high = intervals.difference(ours.values, theirs.values, first.ends, second.ends)
    less = replace(first, value=first.value - second.value, low=low, high=high)
    return Pair(ours=first, theirs=second, difference=less)


def _paired_lengths(ours: Estimate, theirs: Estimate) -> Pair:
    """Both are resampled together."""
    less = Estimate(
        value=ours.value - theirs.value,
        resampled=ours.resampled - theirs.resampled,
        num_problems=ours.num_problems,
    )
    return Pair(ours=ours.score, theirs=theirs.score, difference=less.score)


def mean_over_benchmarks(benchmarks: Sequence[dict[str, Score]]) -> dict[str, Score]:
    """Plain mean over benchmarks of each statistic that all have; their problems are others."""
    means = {}
    for name in benchmarks[0]:
        if all(name in found for found in benchmarks):
            parts = [found[name] for found in benchmarks]
            values = [part.value for part in parts]
            low, high = intervals.mean(values, [part.ends for part in parts])
            means[name] = Score(
                value=sum(values) / len(values),
                low=low,
                high=high,
                num_problems=sum(part.num_problems for part in parts),
            )
    return means


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, up to `limit`."""
    return tuple(2**power for power in range(limit.bit_length()))


def _has_partial(problems: Sequence[Samples]) -> bool:
    """Whether the mean reward is something else than pass@1."""
    return any(problem.reward is not None for problem in problems)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shares:
    """A statistic that is a mean over problems of what lies between 0 and 1."""

    values: Float[np.ndarray, " problems"]
    """NaN: not defined."""
    num_draws: Int[np.ndarray, " problems"]
    """Answers, or sets of answers without overlap, that each is of."""

    @property
    def is_known(self) -> Bool[np.ndarray, " problems"]:
        return ~np.isnan(self.values)

    @property
    def is_any(self) -> bool:
        return bool(self.is_known.any())

    def of(self, chosen: Bool[np.ndarray, " problems"]) -> "_Shares":
        return _Shares(values=self.values[chosen], num_draws=self.num_draws[chosen])

    @property
    def score(self) -> Score:
        """The mean with its interval; all values are known."""
        low, high = intervals.share(self.values, int(self.num_draws.sum()))
        return Score(
            value=float(self.values.mean()), low=low, high=high, num_problems=len(self.values)
        )


def _shares(
    problems: Sequence[Samples], pass_ks: Sequence[int], num_samples: int, has_partial: bool
) -> dict[str, _Shares]:
    """What each statistic that is a share is for each problem, by its name."""
    graded = np.array([int((~np.isnan(each.is_correct)).sum()) for each in problems])
    sampled = np.array([len(each.lengths) for each in problems])
    one_each = np.ones(len(problems), int)
    found = {
        **({"reward": ([each.mean_reward for each in problems], graded)} if has_partial else {}),
        "pass@1": ([each.pass_at_1 for each in problems], graded),
        **{
            f"pass@{k}": ([pass_at(each, k) for each in problems], graded // k)
            for k in pass_ks
            if k > 1
        },
        f"maj@{num_samples}": ([majority(each) for each in problems], one_each),
        "cut_off": ([each.cut_off_share for each in problems], sampled),
    }
    return {
        name: _Shares(values=np.array(values, float), num_draws=draws)
        for name, (values, draws) in found.items()
    }


def _lengths(problems: Sequence[Samples], *, seed: int) -> dict[str, Estimate]:
    """Statistics in tokens by their name, of the problems that have a sample; else none."""
    if not (sampled := [problem for problem in problems if len(problem.lengths)]):
        return {}
    means = np.array([problem.mean_length for problem in sampled])
    return {
        "length": mean_length(means, seed=seed),
        "median_length": median_length(sampled, seed=seed),
    }


def mean_length(means: Float[np.ndarray, " problems"], *, seed: int) -> Estimate:
    """Mean over problems of their mean lengths.

    Which ones are drawn follows from their number and the seed alone, so that two means of the
    same problems are resampled together.
    """
    rng, number = np.random.default_rng(seed), len(means)
    share, size = np.full(number, 1 / number), RESAMPLED_AT_ONCE // number + 1
    resampled = [
        rng.multinomial(number, share, min(size, NUM_RESAMPLES - start)) @ means / number
        for start in range(0, NUM_RESAMPLES, size)
    ]
    return Estimate(
        value=float(means.mean()), resampled=np.concatenate(resampled), num_problems=number
    )


def median_length(problems: Sequence[Samples], *, seed: int) -> Estimate:
    """Median of the lengths of all samples; problems are resampled with all of theirs.

    Which ones are drawn follows from their number and the seed alone, so that two medians of the
    same problems are resampled together. Each must have a sample.
    """
    lengths = np.concatenate([problem.lengths for problem in problems])
    owner = np.repeat(np.arange(len(problems)), [len(problem.lengths) for problem in problems])
    order = np.argsort(lengths, kind="stable")
    lengths, owner = lengths[order], owner[order]
    rng = np.random.default_rng(seed)
    share, size = np.full(len(problems), 1 / len(problems)), RESAMPLED_AT_ONCE // len(lengths) + 1
    medians: list[np.ndarray] = []
    for start in range(0, NUM_RESAMPLES, size):
        times = rng.multinomial(len(problems), share, min(size, NUM_RESAMPLES - start))
        medians.append(weighted_medians(lengths, times[:, owner]))
    return Estimate(
        value=float(np.median(lengths)),
        resampled=np.concatenate(medians),
        num_problems=len(problems),
    )


def weighted_medians(
    ascending: Int[np.ndarray, " samples"], times: Int[np.ndarray, "resamples samples"]
) -> Float[np.ndarray, " resamples"]:
    """Median of `ascending` with each value repeated `times`: the mean of the middle two."""
    below = times.cumsum(1)
    total = below[:, -1:]
    lower = (below < (total + 1) // 2).sum(1)
    upper = (below < total // 2 + 1).sum(1)
    return (ascending[lower] + ascending[upper]) / 2
