"""Fork samples: what the gradients of a learner step's trees tell of each place to fork at.

The gradient of an answer is g = (R - baseline) s, R its reward and s the sum over its tokens of
the gradients of their log-probabilities. The baseline is a constant that the answer does not
depend on. What is known of a tree are the sums of s over each of its steps.

Children of a prefix are independent given it. A child's mean gradient, over the leaves below it, is
so an estimate of the mean given the prefix that is independent of its siblings', and their product
one of tau^2 + |E g|^2 without bias. Trees of one learner step are independent of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from treerpo_ray.algo.forks.rule import CutSamples
from treerpo_ray.algo.tree import ROOT, Tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeGradients:
    """What one tree tells by itself.

    Attributes:
        mean: Mean of g over its answers, with the weights that they have in the root's value.
        columns: `square`, `product`, `before`, `after` and `num_prefixes` of `CutSamples`, for the
            cut behind each depth from 1 on; NaN where a prefix has a single continuation.
    """

    mean: Float64[np.ndarray, " gradient"]
    columns: Float64[np.ndarray, "cuts 5"]


def tree_gradients(
    tree: Tree,
    scores: Float[np.ndarray, "steps gradient"],
    *,
    rewards: Float[np.ndarray, " steps"],
    baseline: float,
    num_cuts: int,
) -> TreeGradients | None:
    """What one tree tells; None if a leaf has no reward.

    Args:
        tree: The tree.
        scores: Of each step the sum of its tokens' gradients of log p.
        rewards: Of each leaf, NaN for one that errored and for inner steps.
        baseline: Is subtracted from rewards.
        num_cuts: Places between the levels of the run's trees.
    """
    leaves = list(tree.leaves)
    if not leaves or np.isnan(rewards[leaves]).any():
        return None
    mean = np.zeros((len(tree) + 1, scores.shape[1]))  # ROOT = -1 is the last
    for siblings in tree.siblings:
        own = siblings.children
        mean[own] = mean[siblings.parents][:, None] + scores[own]
    square, length = np.zeros(len(tree) + 1), np.zeros(len(tree) + 1)
    mean[leaves] *= (rewards[leaves] - baseline)[:, None]
    square[leaves] = (mean[leaves] ** 2).sum(-1)
    length[leaves] = tree.path_lengths[leaves]
    product, num_children = square.copy(), np.zeros(len(tree) + 1)
    for siblings in reversed(tree.siblings):  # the deepest first
        own, parents, count = siblings.children, siblings.parents, siblings.children.shape[1]
        below = mean[own]
        mean[parents] = below.mean(1)
        square[parents], length[parents] = square[own].mean(1), length[own].mean(1)
        pairs = (below.sum(1) ** 2).sum(-1) - (below**2).sum((1, 2))
        product[parents] = pairs / (count * (count - 1)) if count > 1 else np.nan
        num_children[parents] = count
    columns = []
    for depth in range(1, num_cuts + 1):
        is_prefix = np.append((tree.depth_array == depth) & (num_children[:ROOT] > 0), False)
        before = np.append(tree.path_lengths, 0).astype(np.float64)
        own = _up_to_root(tree, depth, np.stack([product, before], axis=1))
        columns.append([square[ROOT], *own, length[ROOT] - own[1], is_prefix.sum()])
    return TreeGradients(mean=mean[ROOT], columns=np.array(columns).reshape(num_cuts, 5))


def _up_to_root(
    tree: Tree, depth: int, values: Float64[np.ndarray, "steps_and_root numbers"]
) -> Float64[np.ndarray, " numbers"]:
    """Mean of the steps of a depth and of leaves before it, with their weights in the root."""
    found = values.copy()
    for siblings in reversed(tree.siblings):
        if siblings.depth <= depth:
            found[siblings.parents] = found[siblings.children].mean(1)
    return found[ROOT]


def step_samples(trees: Sequence[TreeGradients], depth: int) -> CutSamples:
    """What the trees of one learner step, those of all workers, tell of the cut behind a depth.

    Those are left out in which a prefix has a single continuation.
    """
    told = [tree for tree in trees if not np.isnan(tree.columns[depth - 1]).any()]
    if not told:
        return CutSamples.none()
    means = np.stack([tree.mean for tree in told])
    square, product, before, after, num_prefixes = np.stack(
        [tree.columns[depth - 1] for tree in told], axis=1
    )
    return CutSamples(
        square=square,
        product=product,
        others=(means * (means.sum(0) - means)).sum(1),
        num_others=np.full(len(told), len(told) - 1.0),
        before=before,
        after=after,
        num_prefixes=num_prefixes,
    )
