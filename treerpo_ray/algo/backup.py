"""Backup: rewards of leaves become a value for every step, and lengths of right answers a mean."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from treerpo_ray.algo.standard_errors import standard_error_of_mean
from treerpo_ray.algo.tree import ROOT, Tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Values:
    """Backed-up values of one tree; NaN where an errored or timed-out leaf lies below.

    Attributes:
        steps: Value of each step, in the tree's order; a leaf's value is its reward.
        root: Value of the prompt; NaN too if the prompt has no steps.
        step_errors: Standard error of each step's value, given the step. A leaf's is 0: its
            answer is complete, and nothing that could still be sampled would change its reward.
            (A judge that draws its rewards has noise of its own, which is not in here.)
        root_error: Standard error of the prompt's value.
    """

    steps: Float64[np.ndarray, " steps"]
    root: float
    step_errors: Float64[np.ndarray, " steps"]
    root_error: float


def mean_backup(tree: Tree, rewards: Float[np.ndarray, " steps"]) -> Values:
    """Value of a step := plain mean of its children's values (arXiv 2506.05183, section 3.1).

    Each level averages its own children, so an early leaf weighs as much as a sibling with many
    leaves below it: this is not the mean over all leaves.

    Args:
        tree: The tree.
        rewards: Reward of each leaf; NaN for a leaf that errored or timed out, and for every
            step that is not a leaf. A NaN leaf makes all its ancestors NaN: error is not wrong.

    Raises:
        ValueError: If `rewards` has another length than the tree, or rewards an inner step.
    """
    if len(rewards) != len(tree):
        raise ValueError(f"{len(rewards)} rewards given for a tree of {len(tree)} steps")
    is_inner = ~np.isnan(rewards)
    is_inner[list(tree.leaves)] = False
    if is_inner.any():
        inner = np.flatnonzero(is_inner).tolist()
        raise ValueError(f"steps {inner} have children: rewards are given to leaves only")
    values = np.append(rewards.astype(np.float64), np.nan)  # ROOT = -1 is the appended last
    errors = np.where(np.isnan(values), np.nan, 0.0)
    for siblings in reversed(tree.siblings):  # the deepest first
        below = values[siblings.children]
        values[siblings.parents] = below.mean(-1)
        errors[siblings.parents] = standard_error_of_mean(below)
    return Values(
        steps=values[:ROOT],
        root=float(values[ROOT]),
        step_errors=errors[:ROOT],
        root_error=float(errors[ROOT]),
    )


def right_lengths(tree: Tree, values: Values) -> Float64[np.ndarray, " steps"]:
    """Mean length of the right answers below each step, in tokens from the step's first one on.

    Right is a leaf with the whole reward, which is 1: partial credit is not, nor an errored leaf.
    As in `mean_backup` each level averages its own children, those with a right leaf below. NaN
    where there is none.
    """
    below, leaves = np.full(len(tree) + 1, np.nan), list(tree.leaves)
    below[leaves] = np.where(values.steps[leaves] == 1, 0.0, np.nan)
    for siblings in reversed(tree.siblings):  # the deepest first
        own = below[siblings.children] + tree.lengths[siblings.children]
        is_right = ~np.isnan(own)
        total, count = np.where(is_right, own, 0.0).sum(-1), is_right.sum(-1)
        below[siblings.parents] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return below[:ROOT] + tree.lengths
