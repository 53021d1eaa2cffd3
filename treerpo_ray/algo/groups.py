"""Step groups: the siblings below one parent, and which of them carry a signal."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.tree import Tree


class GroupState(StrEnum):
    """What becomes of a step group."""

    KEPT = "kept"
    """The children's values differ enough: the group is trained on."""
    PRUNED = "pruned"
    """The children's values tell (nearly) nothing apart."""
    ERRORED = "errored"
    """A leaf below errored or timed out, so a child has no value."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepGroup:
    """All children of one parent (a step or ROOT), in sampling order, with their values."""

    parent: int
    children: tuple[int, ...]
    values: Float64[np.ndarray, " children"]

    def state(self, threshold: float) -> GroupState:
        """Kept iff max - min of the values > `threshold` (arXiv 2506.05183, eq. 1-2).

        A negative threshold prunes nothing, which is GRPO without a filter.
        """
        if np.isnan(self.values).any():
            return GroupState.ERRORED
        is_kept = self.values.max() - self.values.min() > threshold
        return GroupState.KEPT if is_kept else GroupState.PRUNED


def step_groups(tree: Tree, values: Values) -> list[StepGroup]:
    """One group for each expanded step, in the order of the parents, the prompt's first."""
    return [
        StepGroup(parent=parent, children=children, values=values.steps[list(children)])
        for parent, children in sorted(tree.children.items())
    ]
