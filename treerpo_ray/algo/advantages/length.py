"""Length: right answers are compared by length with other right ones, beside any form.

A step c of a parent p is credited with

    A_len(c) = -price (L_c - mean of L over the siblings of c that have a right answer below)

L_c being the mean length of the right answers below c, in tokens from p on, c's own with them
(`right_lengths`; of a leaf it is that of its step). Right is an answer with the whole reward.
Where c has no right answer below, or no sibling has, it is 0: wrong answers are not made longer
or shorter, and none is made right by it. Of whole answers, p is the prompt.

What c is compared with holds nothing of c or of what is below it, so that the mean over all trees
is a gradient. With N siblings, each of which has with chance q a right answer below, it is

    -price q (1 - (1 - q)^(N - 1)) grad E[L_c | a right answer below c]

at every parent: of leaves the gradient of the mean length of right answers, whatever its effect on
how many there are. (Of a reward less price times length it would be that of the length of all
answers, and of right ones against wrong ones.) Siblings count by their mean, not by their number
of right answers, for that to hold. Each step counts once, as in most forms, and no rule of pruning
leaves a difference of lengths out (`Pruning.keeps_lengths`), which would bias. All steps of a group
that is kept for its lengths alone count as trained, those without a right answer with 0.

The price is `learner.length_weight` over the most tokens of an answer, the sum of
`tree.step_tokens`, so that the weight has no unit: of two right answers one of which is longer by
the whole limit, the longer one has minus the weight. It is a constant of the run, as a divisor
that is itself measured on the siblings would bias.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from treerpo_ray.algo.advantages.baselines import means_of_others
from treerpo_ray.algo.groups import StepGroups


def token_price(weight: float, step_tokens: Sequence[int]) -> float:
    """What one token costs: see the module; `step_tokens` are those of the tree's shape."""
    return weight / sum(step_tokens)


def length_advantages(
    num_steps: int, groups: Sequence[StepGroups], price: float
) -> Float64[np.ndarray, " steps"]:
    """A_len of each step of a tree that has these groups."""
    found = np.zeros(num_steps)
    if price:
        for group in groups:
            others, _, is_compared = _others(group)
            found[group.children] = np.where(
                is_compared, price * (others - group.right_lengths), 0.0
            )
    return found


def length_errors(
    num_steps: int, groups: Sequence[StepGroups], price: float
) -> Float64[np.ndarray, " steps"]:
    """Standard error of each A_len, given the path to the step and which answers are right.

    The spread between siblings is that of all groups of their depth, whose right ones may be few:
    a mean of k of them has its variance over k. Where none of a depth has two right ones it is
    not known: NaN. Over simulated trees of 4 x 4 with normal lengths, half of them right, the
    square is that of the deviation on average, and 1.96 of the errors cover 90 %.
    """
    found = np.zeros(num_steps)
    if not price:
        return found
    variances = _variances(groups)
    below = np.zeros(num_steps + 1)  # of L given the step; ROOT = -1 is the last
    for group in groups:
        counts = (~np.isnan(group.right_lengths)).sum(-1)
        below[group.parents] = variances[group.depth] / np.maximum(counts, 1)
    for group in groups:
        _, counts, is_compared = _others(group)
        total = below[group.children] + variances[group.depth] / np.maximum(counts, 1)
        found[group.children] = np.where(is_compared, price * np.sqrt(total), 0.0)
    return found


def _others(
    group: StepGroups,
) -> tuple[
    Float64[np.ndarray, "groups children"],
    Int64[np.ndarray, "groups children"],
    Bool[np.ndarray, "groups children"],
]:
    """Of each child: the mean L of its right siblings, how many they are, and whether it is right
    and has one."""
    others, counts = means_of_others(group.right_lengths)
    return others, counts, ~np.isnan(group.right_lengths) & (counts > 0)


def _variances(groups: Sequence[StepGroups]) -> dict[int, float]:
    """Variance of L between siblings by depth, pooled over its groups; NaN if none tells it."""
    sums, free = dict[int, float](), dict[int, int]()
    for group in groups:
        is_right = ~np.isnan(group.right_lengths)
        counts = is_right.sum(-1, keepdims=True)
        own = np.where(is_right, group.right_lengths, 0.0)
        deviations = own - own.sum(-1, keepdims=True) / np.maximum(counts, 1)
        depth, squares = group.depth, float((deviations[is_right] ** 2).sum())
        sums[depth] = sums.get(depth, 0.0) + squares
        free[depth] = free.get(depth, 0) + int(np.maximum(counts - 1, 0).sum())
    return {depth: sums[depth] / n if n else np.nan for depth, n in free.items()}
