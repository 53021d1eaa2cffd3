"""Credit: advantages and the states of step groups, as the learner made them or as they follow.

Where a run's advantages are made or pruned by Python of its user, what the learner saved is told;
what it did not save stays untold, for that code is not run here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.groups import GroupState, Pruning, StepGroups, step_groups
from treerpo_ray.algo.tree import Tree
from treerpo_ray.records import TreeRecord
from treerpo_ray.study.analysis import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What is known of the credit of each step of a tree."""

    advantage: Float64[np.ndarray, " steps"]
    """NaN where the step is not trained on, or it is not known."""
    advantage_se: Float64[np.ndarray, " steps"]
    state: tuple[str | None, ...]
    """`GroupState` of the group that the step is in."""
    groups: dict[str, int]
    """Number of step groups by `GroupState`."""


def credit_of(run: Run, record: TreeRecord, values: Values) -> Credit:
    """The credit of a tree."""
    tree, unknown = record.tree, np.full(len(record.tree), np.nan)
    is_known = record.training is not None or not run.own_code
    saved = None if record.training is None else record.training.advantages
    pruning = None if run.own_code else run.pruning
    states: list[str | None] = [None] * len(tree)
    counts = dict.fromkeys((state.value for state in GroupState), 0)
    for children, state in group_states(tree, values, saved, pruning):
        counts[state] += 1
        for child in children.tolist():
            states[child] = state
    return Credit(
        advantage=run.advantages(record) if is_known else unknown,
        advantage_se=unknown if run.own_code else run.advantage_errors(record),
        state=tuple(states),
        groups=counts,
    )


def group_states(
    tree: Tree,
    values: Values,
    advantages: Float64[np.ndarray, " steps"] | None,
    pruning: Pruning | None,
) -> Iterator[tuple[Int64[np.ndarray, " children"], str]]:
    """The steps of each group with its `GroupState`: by the learner's advantages or, without, by
    the rule; nothing without both."""
    for group in step_groups(tree, values):
        if advantages is not None:
            states = _by_advantages(group, advantages)
        elif pruning is not None:
            states = group.states(pruning)
        else:
            return
        yield from zip(group.children, map(str, states), strict=True)


def _by_advantages(group: StepGroups, advantages: Float64[np.ndarray, " steps"]) -> np.ndarray:
    is_kept = ~np.isnan(advantages[group.children]).all(-1)
    otherwise = np.where(group.is_errored, GroupState.ERRORED.value, GroupState.PRUNED.value)
    return np.where(is_kept, GroupState.KEPT.value, otherwise)
