"""Fork rule: whether a tree pays, measured on the gradients of continuations of one prefix.

A fork [1, N] at a cut samples one prefix of a tokens, and N continuations of b tokens each. Of the
gradient of what is decided after the cut, let sigma^2 be the variance between continuations of one
prefix and tau^2 that between prefixes of their mean, summed over parameters. The mean gradient of a
fork has the variance tau^2 + sigma^2 / N and costs a + N b tokens; of independent forks, variance
times tokens is what a gradient of a given error costs. Against one answer a question, N = 1, a fork
needs the share

    (tau^2 + sigma^2 / N) (a + N b) / ((tau^2 + sigma^2) (a + b))

of the tokens. It is least at N* = sqrt(a sigma^2 / (b tau^2)), where it is 1 / G with the gain

    G = (tau^2 + sigma^2) (a + b) / (tau sqrt(a) + sigma sqrt(b))^2,

and N = 2 can pay at all only where a sigma^2 > b tau^2. This is the allocation between primary and
secondary units of sampling in two stages (Cochran, Sampling Techniques, 3rd ed., section 10.6).

A prefix is one of a question, and both are drawn anew for each tree: tau^2 has what questions
differ in. Any linear map of the gradients that keeps inner products on average will do for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float64, Int64

MOST_CHILDREN = 32
"""Of forks that are considered."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForkSample:
    """What one tree tells of a cut. Trees are independent; its prefixes need not be.

    Attributes:
        within: Mean over prefixes of the sample variance of their continuations' gradients.
        product: Mean over prefixes of the inner product of two continuations' gradients.
        mean: Mean over prefixes of the mean gradient of their continuations.
        before: Mean tokens before the cut.
        after: Mean tokens of a continuation.
        num_prefixes: How many have two continuations or more, which alone tell something.
    """

    within: float
    product: float
    mean: Float64[np.ndarray, " dims"]
    before: float
    after: float
    num_prefixes: int

    @classmethod
    def of(
        cls,
        gradients: Float64[np.ndarray, "prefixes continuations dims"],
        *,
        before: Float64[np.ndarray, " prefixes"] | Int64[np.ndarray, " prefixes"],
        after: Float64[np.ndarray, "prefixes continuations"]
        | Int64[np.ndarray, "prefixes continuations"],
    ) -> Self:
        """Of the gradients of independent continuations, and the tokens before and of them.

        Raises:
            ValueError: there is no prefix with two continuations.
        """
        num_prefixes, count, _ = gradients.shape
        if not num_prefixes or count < 2:
            raise ValueError(
                f"{num_prefixes} prefixes with {count} continuations tell nothing of a cut: each "
                "needs two or more"
            )
        means = gradients.mean(1)
        within = ((gradients - means[:, None]) ** 2).sum((1, 2)) / (count - 1)
        product = (means**2).sum(-1) - within / count
        return cls(
            within=float(within.mean()),
            product=float(product.mean()),
            mean=means.mean(0),
            before=float(before.mean()),
            after=float(after.mean()),
            num_prefixes=num_prefixes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Variances and tokens of a cut; see the module.

    Attributes:
        between: tau^2, not less than 0.
        within: sigma^2.
        before: a, tokens.
        after: b, tokens, more than 0.
    """

    between: float
    within: float
    before: float
    after: float

    @property
    def best(self) -> float:
        """N*, which need not be a whole number; inf where prefixes do not differ, and 0 where
        continuations do not (or there is nothing before the cut)."""
        gained, paid = self.before * self.within, self.after * self.between
        if not gained:
            return 0.0
        return float(np.sqrt(gained / paid)) if paid else np.inf

    @property
    def gain(self) -> float:
        """G: how many times fewer tokens the best fork needs than one answer a question; of forks
        of any N, whole or not, and 1 where one answer is best.

        16 sure steps and 4 that decide, sigma^2 = 15 tau^2: N* = 7.7 and G = 2.3.
        """
        return 1 / self.token_share(max(1.0, self.best))

    def token_share(self, num_children: float) -> float:
        """Tokens that a fork [1, `num_children`] needs, one answer a question needing 1.

        With inf children it is what the share goes to.

        Raises:
            ValueError: all gradients are 0, so that nothing is known of any shape.
        """
        total = (self.between + self.within) * (self.before + self.after)
        if not total:
            raise ValueError("there is no gradient at this cut, whatever is sampled")
        if np.isinf(num_children):
            return np.inf if self.between else self.within * self.after / total
        variance = self.between + self.within / num_children
        return variance * (self.before + num_children * self.after) / total

    def best_whole(self, most: int = MOST_CHILDREN) -> int:
        """The number of children from 1 to `most` with the least share of tokens; of two that have
        the same the smaller one."""
        below = int(np.clip(self.best, 1, most))  # the share has one minimum
        return min(range(below, min(below + 1, most) + 1), key=self.token_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a fork at a cut would cost, as measured.

    Attributes:
        num_children: N of the fork [1, N] that needs the fewest tokens; 1 is no fork.
        token_share: Tokens that it needs for a gradient of the same error, one answer a question
            needing 1.
        standard_error: Of `token_share` for this N, by the jackknife over trees. That N was chosen
            by the same trees is not in it.
        fork: What it was worked out from.
        num_trees: How many trees it was measured on.
        num_prefixes: How many prefixes these have.
    """

    num_children: int
    token_share: float
    standard_error: float
    fork: Fork
    num_trees: int
    num_prefixes: int


def forecast(samples: Sequence[ForkSample], most: int = MOST_CHILDREN) -> Forecast | None:
    """The forecast of a cut from trees that were sampled independently; None if they are fewer
    than three, or none has a gradient.

    The squared norm of the mean gradient is estimated by products of different trees, so that
    sigma^2 and tau^2 are unbiased (but for tau^2 being cut off at 0).
    """
    count = len(samples)
    if count < 3:  # of two, the jackknife would leave one
        return None
    rows = np.array([[s.within, s.product, s.before, s.after] for s in samples])
    means = np.stack([sample.mean for sample in samples])
    total, square = means.sum(0), (means**2).sum(-1)
    fork = _fork(rows.sum(0), float(total @ total), float(square.sum()), count)
    if not fork.between + fork.within:
        return None
    num_children = fork.best_whole(most)
    others = rows.sum(0) - rows
    products = total @ total - 2 * (means @ total) + square  # of the sum of all other means
    without = [
        _fork(sums, float(product), float(squares), count - 1)
        for sums, product, squares in zip(others, products, square.sum() - square, strict=True)
    ]
    shares = [each.token_share(num_children) for each in without if each.between + each.within]
    spread = np.var(shares) * (count - 1) if len(shares) == count else np.inf
    return Forecast(
        num_children=num_children,
        token_share=fork.token_share(num_children),
        standard_error=float(np.sqrt(spread)),
        fork=fork,
        num_trees=count,
        num_prefixes=sum(sample.num_prefixes for sample in samples),
    )


def _fork(
    sums: Float64[np.ndarray, "4"], product_of_sum: float, sum_of_squares: float, count: int
) -> Fork:
    """From sums over `count` trees of within, product, before and after; and of their mean
    gradients the squared norm of the sum, and the sum of the squared norms."""
    within, product, before, after = (sums / count).tolist()
    square_of_mean = (product_of_sum - sum_of_squares) / (count * (count - 1))
    return Fork(
        between=max(0.0, product - square_of_mean), within=within, before=before, after=after
    )
