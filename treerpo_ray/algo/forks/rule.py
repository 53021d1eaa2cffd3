"""Fork rule: whether a tree needs fewer sampled tokens than flat answers, by measured variances.

A fork [1, N] samples a tokens, a prefix, and behind it N continuations of b tokens each. Its
gradient is the mean over its N answers of

    g = (R - baseline) grad log p(answer)

whose expectation is that of one flat answer whatever N is, and whose variance (the trace of the
covariance) is tau^2 + sigma^2 / N: tau^2 is the variance between prefixes of the mean gradient
given the prefix, sigma^2 the variance given the prefix. Tokens for a given variance go by

    (tau^2 + sigma^2 / N) (a + N b)

so that over a flat answer, N = 1, a fork needs the share `token_share(N)` of the tokens, least at

    N* = sqrt((a / b) (sigma^2 / tau^2)),   1 / G = (tau sqrt(a) + sigma sqrt(b))^2
                                                     / ((tau^2 + sigma^2) (a + b))

N > 1 pays if and only if sigma^2 / tau^2 > b / a. Prompts, dead prefixes and answers that end
before the cut are all in tau^2, for a flat batch has one answer a question.

g has the tokens before the cut too. Without them the rule would be that of parameters which act
behind the cut alone, and a tree would seem to pay where the early tokens, of which it samples
fewer, are the ones to learn.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import numpy as np
from jaxtyping import Float64

MAX_CHILDREN = 16
"""Most continuations that are recommended: where hardly any variance lies between prefixes, N* is
as good as unbounded, and far from anything that was measured."""
FEWEST_TREES = 4
"""Trees below which nothing is said: the error of less is as uncertain as the number itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Variances and tokens of one cut.

    Attributes:
        within: sigma^2, 0 or more.
        between: tau^2, 0 or more.
        before: a, tokens from the prompt to the cut.
        after: b, tokens from the cut to the end of an answer; above 0.

    Raises:
        ValueError: one is out of its range.
    """

    within: float
    between: float
    before: float
    after: float

    def __post_init__(self) -> None:
        if not (min(self.within, self.between, self.before) >= 0 and self.after > 0):
            raise ValueError(f"variances and tokens cannot be negative, nor b be 0: {self}")

    def token_share(self, num_children: float) -> float:
        """Tokens that a fork [1, num_children] needs over those that flat answers need, for the
        same variance. Without any variance they need none, and cost alone is compared."""
        cost = (self.before + num_children * self.after) / (self.before + self.after)
        total = self.within + self.between
        if not total:
            return cost
        return (self.between + self.within / num_children) / total * cost

    @property
    def best_children(self) -> float:
        """N*: below 1 where flat answers are best, 0 without variance within prefixes, infinite
        where there is none between them."""
        if not self.within * self.before:
            return 0.0
        if not self.between:
            return float("inf")
        return ((self.before / self.after) * (self.within / self.between)) ** 0.5

    @property
    def gain(self) -> float:
        """G: by how much fewer tokens are needed at N*, which is at most (a + b) / b; 1 where flat
        answers are best."""
        if self.best_children <= 1:
            return 1.0
        root = (self.between * self.before) ** 0.5 + (self.within * self.after) ** 0.5
        return (self.within + self.between) * (self.before + self.after) / root**2

    @property
    def children(self) -> int:
        """Whole number of continuations, from 2 to MAX_CHILDREN, that needs the fewest tokens; it
        pays if its `token_share` is below 1."""
        below = int(min(max(self.best_children, 2.0), MAX_CHILDREN))
        near = range(below, min(below + 1, MAX_CHILDREN) + 1)  # the share is convex in N
        return min(near, key=self.token_share)


# What trees tell ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class CutSamples:
    """What trees, one an entry, tell of one cut; `+` joins those of workers and of learner steps.

    Each is the mean over a tree's prefixes, with the weight that they have in its root's value.
    """

    square: Float64[np.ndarray, " trees"]
    """|g|^2 of one answer: estimates sigma^2 + tau^2 + |E g|^2."""
    product: Float64[np.ndarray, " trees"]
    """g_i . g_j of two answers from one prefix: estimates tau^2 + |E g|^2."""
    others: Float64[np.ndarray, " trees"]
    """Sum of g_i . g_j with answers of other trees of the same learner step: each estimates
    |E g|^2."""
    num_others: Float64[np.ndarray, " trees"]
    """How many trees those are of."""
    before: Float64[np.ndarray, " trees"]
    """Tokens before the cut."""
    after: Float64[np.ndarray, " trees"]
    """Tokens behind it, of one answer."""
    num_prefixes: Float64[np.ndarray, " trees"]
    """Prefixes with continuations."""

    @classmethod
    def none(cls) -> Self:
        """Of no trees, to start adding from."""
        return cls.from_columns(np.zeros((len(fields(cls)), 0)))

    @classmethod
    def from_columns(cls, columns: Float64[np.ndarray, "fields trees"]) -> Self:
        """The inverse of `columns`."""
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, np.asarray(columns, np.float64), strict=True)))

    @property
    def columns(self) -> Float64[np.ndarray, "fields trees"]:
        """All fields in order."""
        return np.stack([getattr(self, field.name) for field in fields(self)])

    def __len__(self) -> int:
        """Number of trees."""
        return len(self.square)

    def __add__(self, other: Self) -> Self:
        return self.from_columns(np.concatenate([self.columns, other.columns], axis=1))


@dataclass(frozen=True, kw_only=True, eq=False)
class ForkEstimate:
    """What past learner steps tell of one cut.

    Attributes:
        depth: Depth of the steps before the cut.
        samples: FEWEST_TREES or more, of learner steps of two trees or more.
    """

    depth: int
    samples: CutSamples

    @cached_property
    def variances(self) -> tuple[float, float]:
        """Unbiased sigma^2 and tau^2, either of which noise may carry below 0."""
        within, between = _variances(_sums(self.samples))
        return float(within), float(between)

    @cached_property
    def fork(self) -> Fork:
        """The rule at these variances, a negative one taken as 0."""
        within, between = self.variances
        return Fork(
            within=max(within, 0.0),
            between=max(between, 0.0),
            before=float(self.samples.before.mean()),
            after=float(self.samples.after.mean()),
        )

    @cached_property
    def cautious_fork(self) -> Fork:
        """The rule as if one more tree had been seen, whose prefix decides all.

        Where nearly all answers are right, few trees have nearly all of the gradients' squares, and
        perhaps none of these a prefix that went wrong. Then tau^2 seems to be 0 without an error,
        and no number of continuations too large. The tree that is added has a square of
        sum q^2 / sum q, q those of the trees: of the tree that a part of all squares is of, in the
        mean.

        Example: of 39 trees three have q = 2, and no product; then tau^2 is 2 / 40, sigma^2 6 / 40.
        """
        sums, own = _sums(self.samples), self.samples.square
        sums[:2] += (own**2).sum() / own.sum() if self.has_gradients else 0.0
        sums[-1] += 1
        within, between = (float(each) for each in _variances(sums))
        return replace(self.fork, within=max(within, 0.0), between=max(between, 0.0))

    @property
    def cautious_children(self) -> int:
        """Whole number of continuations that needs the fewest tokens by the cautious rule."""
        return self.cautious_fork.children

    @cached_property
    def cautious_share(self) -> float:
        """Tokens that so many need, by the cautious rule and a standard error above it: choices go
        by it.

        Where the mean gradient is large beside the variance, as RAFT's is where nearly all answers
        are right, no bound on what was not seen replaces the error: tau^2 is the small difference
        of two large products.
        """
        number = self.cautious_children
        return self.cautious_fork.token_share(number) + self.token_share_error(number)

    @property
    def has_gradients(self) -> bool:
        """Whether any answer had one: else nothing tells trees from single answers but cost."""
        return bool(self.samples.square.any())

    def token_share_error(self, num_children: float) -> float:
        """Standard error of `Fork.token_share`, by leaving out each tree in turn (the jackknife).

        Trees are independent, and all that was sampled in one is left out with it. Variances are
        taken as they are, negative ones too, so that an error is no smaller where they are cut off.
        It is too small where a few trees have nearly all squares: what none of them was is not in
        it, but in `cautious_fork`.
        """
        count = len(self.samples)
        own = np.append(self.samples.columns[:6], np.ones((1, count)), axis=0)
        own[2:4] *= 2  # a pair of trees is counted with both of them
        shares = _token_share(_sums(self.samples)[:, None] - own, num_children)
        return float(np.sqrt((count - 1) / count * ((shares - shares.mean()) ** 2).sum()))

    @property
    def num_prefixes(self) -> int:
        """Prefixes with continuations behind it all."""
        return int(self.samples.num_prefixes.sum())


def fork_estimate(depth: int, samples: Iterable[CutSamples]) -> ForkEstimate | None:
    """What learner steps tell of the cut behind the steps of a depth; None if it is too little.

    That is: fewer than FEWEST_TREES in learner steps of two trees or more, or no prefix with
    continuations.
    """
    told = sum((each for each in samples if len(each) > 1), start=CutSamples.none())
    if len(told) < FEWEST_TREES or not told.num_prefixes.any():
        return None
    return ForkEstimate(depth=depth, samples=told)


def _sums(samples: CutSamples) -> Float64[np.ndarray, " 7"]:
    """Sums over trees of all fields but the last, and the number of trees."""
    return np.append(samples.columns[:6].sum(1), len(samples))


def _variances(
    sums: Float64[np.ndarray, "7 ..."],
) -> tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]:
    """sigma^2 and tau^2 of sums over trees."""
    square, product, others, num_others, _, _, num_trees = sums
    return (square - product) / num_trees, product / num_trees - others / num_others


def _token_share(
    sums: Float64[np.ndarray, "7 ..."], num_children: float
) -> Float64[np.ndarray, "..."]:
    """`Fork.token_share`, whatever the signs of the variances are."""
    within, between = _variances(sums)
    *_, before, after, _ = sums
    cost = (before + num_children * after) / (before + after)
    total = within + between
    is_told = total > 0
    safe = np.where(is_told, total, 1.0)
    return cost * np.where(is_told, (between + within / num_children) / safe, 1.0)
