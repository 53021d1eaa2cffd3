"""Step groups: the siblings below one parent, and which of them carry a signal."""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.standard_errors import ROUNDING, standard_error_of_mean
from treerpo_ray.algo.tree import Tree


class GroupState(StrEnum):
    """What becomes of a step group."""

    KEPT = "kept"
    """The children's values differ enough: the group is trained on."""
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
    """`StepGroup.significance`. Leaves have no standard error: of their groups, those that differ
    are kept."""
    SHRINKAGE = "shrinkage"
    """`StepGroup.reliability`, which also scales the advantages of the group; 1 for leaves that
    differ, whose rewards count as they are, rightly given or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """Which step groups are kept. A negative threshold keeps all: GRPO without a filter."""

    rule: PruneRule
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepGroup:
    """All children of one parent (a step or ROOT), in sampling order, with their values.

    Attributes:
        standard_errors: Standard error of each child's value, given the child.
        leaf_range: max - min of the rewards of the whole tree, over leaves that have one.
    """

    parent: int
    children: tuple[int, ...]
    values: Float64[np.ndarray, " children"]
    standard_errors: Float64[np.ndarray, " children"]
    leaf_range: float

    def state(self, pruning: Pruning) -> GroupState:
        """Kept iff what the rule looks at is above the threshold."""
        if np.isnan(self.values).any():
            return GroupState.ERRORED
        is_kept = self._signal(pruning.rule) > pruning.threshold
        return GroupState.KEPT if is_kept else GroupState.PRUNED

    def weight(self, pruning: Pruning) -> float:
        """Factor of the group's advantages."""
        return self.reliability if pruning.rule is PruneRule.SHRINKAGE else 1.0

    @property
    def significance(self) -> float:
        """Standard deviation of the values in units of their standard errors (root mean square).

        It is about 1 if the children are equally good and only chance tells them apart: its
        square times N - 1 is Cochran's Q, then a chi-square of N - 1 degrees of freedom. It is
        infinite where the children are leaves and differ.
        """
        if self.values.max() - self.values.min() < ROUNDING:
            return 0.0
        noise = float((self.standard_errors**2).mean())
        return float(self.values.std(ddof=1)) / noise**0.5 if noise else float("inf")

    @property
    def reliability(self) -> float:
        """Share of the values' variance that is not noise: 1 - significance^-2, 0 at least.

        The best linear estimate of a child's true value moves its value towards the group's mean
        by this factor (the empirical Bayes estimate of James and Stein, 1961).
        """
        return 1 - self.significance**-2 if self.significance > 1 else 0.0

    @property
    def difference_errors(self) -> Float64[np.ndarray, " children"]:
        """Standard error of each value minus the group's mean, given the child.

        The mean holds the child's own value with weight 1/N. So the difference estimates (N - 1)/N
        of the true one, with the child's own noise, (N - 1)/N e_i, and that of its siblings, each
        s / N: the variance is f (f e_i^2 + S^2) with f = (N - 1)/N and S the error of the mean.
        """
        free = 1 - 1 / len(self.values)
        mean_error = standard_error_of_mean(self.values)
        return np.sqrt(free * (free * self.standard_errors**2 + mean_error**2))

    def _signal(self, rule: PruneRule) -> float:
        match rule:
            case PruneRule.RANGE:
                return float(self.values.max() - self.values.min())
            case PruneRule.TREE_RANGE:
                return self.leaf_range
            case PruneRule.SIGNIFICANCE:
                return self.significance
            case PruneRule.SHRINKAGE:
                return self.reliability
        assert_never(rule)


def step_groups(tree: Tree, values: Values) -> list[StepGroup]:
    """One group for each expanded step, in the order of the parents, the prompt's first."""
    rewards = values.steps[list(tree.leaves)]
    rewards = rewards[~np.isnan(rewards)]
    leaf_range = float(rewards.max() - rewards.min()) if len(rewards) else 0.0
    return [
        StepGroup(
            parent=parent,
            children=children,
            values=values.steps[list(children)],
            standard_errors=values.step_errors[list(children)],
            leaf_range=leaf_range,
        )
        for parent, children in sorted(tree.children.items())
    ]
