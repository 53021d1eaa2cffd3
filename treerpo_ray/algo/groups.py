"""Step groups: the siblings below one parent, and which of them carry a signal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import assert_never

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from treerpo_ray.algo.backup import Values, right_lengths
from treerpo_ray.algo.standard_errors import ROUNDING, standard_error_of_mean
from treerpo_ray.algo.tree import StopReason, Tree


class GroupState(StrEnum):
    """What becomes of a step group."""

    KEPT = "kept"
    """The children differ enough in value or, where that counts, in length: the group is trained
    on."""
    PRUNED = "pruned"
    """The children's values tell (nearly) nothing apart."""
    ERRORED = "errored"
    """A leaf below errored or timed out, so a child has no value."""


class PruneRule(StrEnum):
    """What of a step group must be above the threshold for the group to be kept."""

    RANGE = "range"
    """max - min of its values (arXiv 2506.05183, eq. 1-2)."""
    TREE_RANGE = "tree_range"
    """max - min of the rewards of all leaves of its tree: the groups of a tree are kept or pruned
    together, as DAPO (arXiv 2503.14476, section 3.2) filters questions."""
    SIGNIFICANCE = "significance"
    """`StepGroups.significance`. Leaves have no standard error: of their groups, those that differ
    are kept."""
    SHRINKAGE = "shrinkage"
    """`StepGroups.reliability`, which also scales the advantages of the group; 1 for leaves that
    differ, whose rewards count as they are, rightly given or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRule:
    """A rule that is not of this package.

    Attributes:
        name: How messages call it.
        function: Of groups in which each child has a value, the number of each group that must be
            above the threshold.
    """

    name: str
    function: "Callable[[StepGroups], Float64[np.ndarray, ' groups']]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """Which step groups are kept. A negative threshold keeps all: GRPO without a filter.

    Attributes:
        rule, threshold: What of the values must be above which number.
        keeps_lengths: Whether a group is kept, too, in which right answers differ in length. Where
            the rule would not keep it, its values count for nothing: lengths alone are trained.
    """

    rule: PruneRule | OwnRule
    threshold: float
    keeps_lengths: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class StepGroups:
    """Sibling sets of a tree with their values; those of like shape are stacked as in `Siblings`.

    Attributes:
        standard_errors: Standard error of each child's value, given the child.
        right_lengths: Mean tokens of the right answers below each child, its own with them; NaN
            without any.
        leaf_range: max - min of the rewards of the whole tree, over leaves that have one.

    What follows from these is computed once.
    """

    depth: int
    parents: Int64[np.ndarray, " groups"]
    children: Int64[np.ndarray, "groups children"]
    values: Float64[np.ndarray, "groups children"]
    standard_errors: Float64[np.ndarray, "groups children"]
    right_lengths: Float64[np.ndarray, "groups children"]
    leaf_range: float

    def states(self, pruning: Pruning) -> Shaped[np.ndarray, " groups"]:
        """`GroupState` of each group."""
        alive = np.where(self.is_kept(pruning), GroupState.KEPT, GroupState.PRUNED)
        return np.where(self.is_errored, GroupState.ERRORED, alive)

    def is_kept(self, pruning: Pruning) -> Bool[np.ndarray, " groups"]:
        """Whether each group is trained on."""
        is_kept = self._is_above(pruning)
        if pruning.keeps_lengths:
            is_kept |= self.length_ranges > ROUNDING
        return is_kept & ~self.is_errored

    def weights(self, pruning: Pruning) -> Float64[np.ndarray, " groups"]:
        """Factor of what the form gives each group that is kept; 0 if its lengths alone keep it."""
        is_scaled = pruning.rule is PruneRule.SHRINKAGE
        weights = self.reliability if is_scaled else np.ones(len(self.parents))
        return np.where(self._is_above(pruning), weights, 0.0) if pruning.keeps_lengths else weights

    def _is_above(self, pruning: Pruning) -> Bool[np.ndarray, " groups"]:
        return self._signal(pruning.rule) > pruning.threshold

    @cached_property
    def is_errored(self) -> Bool[np.ndarray, " groups"]:
        """Whether a child of the group has no value."""
        return np.isnan(self.values).any(-1)

    @cached_property
    def ranges(self) -> Float64[np.ndarray, " groups"]:
        """max - min of the values of each group."""
        return self.values.max(-1) - self.values.min(-1)

    @cached_property
    def length_ranges(self) -> Float64[np.ndarray, " groups"]:
        """max - min of `right_lengths`; 0 with less than two children that have any."""
        is_right = ~np.isnan(self.right_lengths)
        longest = np.where(is_right, self.right_lengths, -np.inf).max(-1)
        shortest = np.where(is_right, self.right_lengths, np.inf).min(-1)
        return np.where(is_right.any(-1), longest - shortest, 0.0)

    @cached_property
    def significance(self) -> Float64[np.ndarray, " groups"]:
        """Standard deviation of the values in units of their standard errors (root mean square).

        It is about 1 if the children are equally good and only chance tells them apart: its
        square times N - 1 is Cochran's Q, then a chi-square of N - 1 degrees of freedom. It is
        infinite where the children are leaves and differ.
        """
        if self.values.shape[-1] == 1:
            return np.zeros(len(self.parents))
        noise = np.sqrt((self.standard_errors**2).mean(-1))
        spread = self.values.std(-1, ddof=1)
        ratio = np.divide(spread, noise, out=np.full_like(spread, np.inf), where=noise != 0)
        return np.where(self.ranges < ROUNDING, 0.0, ratio)

    @cached_property
    def reliability(self) -> Float64[np.ndarray, " groups"]:
        """Share of the values' variance that is not noise: 1 - significance^-2, 0 at least.

        The best linear estimate of a child's true value moves its value towards the group's mean
        by this factor (the empirical Bayes estimate of James and Stein, 1961).
        """
        return 1 - self.significance.clip(min=1) ** -2

    @cached_property
    def mean_errors(self) -> Float64[np.ndarray, " groups"]:
        """Standard error of the mean of each group's values."""
        return standard_error_of_mean(self.values)

    @cached_property
    def difference_errors(self) -> Float64[np.ndarray, "groups children"]:
        """Standard error of each value minus the group's mean, given the child.

        The mean holds the child's own value with weight 1/N. So the difference estimates (N - 1)/N
        of the true one, with the child's own noise, (N - 1)/N e_i, and that of its siblings, each
        s / N: the variance is f (f e_i^2 + S^2) with f = (N - 1)/N and S the error of the mean.
        """
        free = 1 - 1 / self.values.shape[-1]
        mean_error = self.mean_errors[:, None]
        return np.sqrt(free * (free * self.standard_errors**2 + mean_error**2))

    def _signal(self, rule: PruneRule | OwnRule) -> Float64[np.ndarray, " groups"]:
        match rule:
            case OwnRule():
                return self._own_signal(rule)
            case PruneRule.RANGE:
                return self.ranges
            case PruneRule.TREE_RANGE:
                return np.full(len(self.parents), self.leaf_range)
            case PruneRule.SIGNIFICANCE:
                return self.significance
            case PruneRule.SHRINKAGE:
                return self.reliability
        assert_never(rule)

    def _own_signal(self, rule: OwnRule) -> Float64[np.ndarray, " groups"]:
        """What a rule that is not of this package says; NaN of errored groups.

        Raises:
            ValueError: it is not one number a group.
        """
        signal, is_whole = np.full(len(self.parents), np.nan), ~self.is_errored
        if is_whole.any():
            found = rule.function(self.those(is_whole))
            if found.shape != (is_whole.sum(),) or np.isnan(found).any():
                raise ValueError(
                    f"the rule {rule.name} must return one number for each of {is_whole.sum()} "
                    f"groups, not {found.tolist()}"
                )
            signal[is_whole] = found
        return signal

    def those(self, chosen: Bool[np.ndarray, " groups"]) -> "StepGroups":
        """Some of these groups."""
        return replace(
            self,
            parents=self.parents[chosen],
            children=self.children[chosen],
            values=self.values[chosen],
            standard_errors=self.standard_errors[chosen],
            right_lengths=self.right_lengths[chosen],
        )


def step_groups(tree: Tree, values: Values) -> list[StepGroups]:
    """All step groups of a tree, one for each expanded step; shallow ones come first."""
    rewards = values.steps[list(tree.leaves)]
    rewards = rewards[~np.isnan(rewards)]
    leaf_range = float(rewards.max() - rewards.min()) if len(rewards) else 0.0
    lengths = right_lengths(tree, values)
    return [
        StepGroups(
            depth=siblings.depth,
            parents=siblings.parents,
            children=siblings.children,
            values=values.steps[siblings.children],
            standard_errors=values.step_errors[siblings.children],
            right_lengths=lengths[siblings.children],
            leaf_range=leaf_range,
        )
        for siblings in tree.siblings
    ]


def of_kept(
    found: Float64[np.ndarray, " steps"], groups: Sequence[StepGroups], pruning: Pruning
) -> Float64[np.ndarray, " steps"]:
    """What a form gives the steps of kept groups, by the weight of the group; NaN elsewhere."""
    kept = np.full(len(found), np.nan)
    for group in groups:
        is_kept = group.is_kept(pruning)
        children, weights = group.children[is_kept], group.weights(pruning)[is_kept, None]
        kept[children] = np.where(weights == 0, 0.0, found[children] * weights)
    return kept


_MIX = 6364136223846793005
"""Spreads numbers over 64 bits (Knuth's multiplier of MMIX)."""


def count_duplicates(tree: Tree) -> tuple[int, int]:
    """Steps that have the very tokens of an earlier sibling, and steps that have an earlier one.

    All but one of those that are alike are tokens spent twice. A step that a sampler turned down is
    nobody's sibling here.
    """
    sampled = np.flatnonzero([stop is not StopReason.ERROR for stop in tree.stops])
    parents = tree.parents[sampled].tolist()
    alike = _may_be_alike(tree, sampled)
    spans = zip(tree.starts[alike].tolist(), tree.lengths[alike].tolist(), strict=True)
    tokens = (tree.token_ids[start : start + length].tobytes() for start, length in spans)
    different = set(zip(tree.parents[alike].tolist(), tokens, strict=True))
    return len(alike) - len(different), len(parents) - len(set(parents))


def _may_be_alike(tree: Tree, steps: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " alike"]:
    """All steps that have the parent, length, first and last token of another one, and perhaps
    some that have not: those that are to be compared token by token."""
    has_tokens = tree.lengths[steps] > 0
    some, empty = steps[has_tokens], steps[~has_tokens]
    first, length = tree.starts[some], tree.lengths[some]
    key = tree.parents[some].astype(np.int64)
    for more in (length, tree.token_ids[first], tree.token_ids[first + length - 1]):
        key = key * _MIX + more  # wraps around: others may come to the same, the same always do
    order = key.argsort()
    is_same = key[order[1:]] == key[order[:-1]]
    found = np.zeros(len(some), bool)
    found[order[1:][is_same]] = found[order[:-1][is_same]] = True
    return np.append(empty, some[found])
