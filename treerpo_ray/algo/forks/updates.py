"""Updates: tokens that trees need so that the signal stands out of an update's noise as much.

An update adds up G, the gradient of a tree as the run trains it: with its credit, its pruning and
what its loss lets a step weigh. Of n trees the sum has the signal |n E G|^2 and the noise n V, with
V = E |G|^2 - |E G|^2, the trace of the covariance. For a given ratio of the two, trees of T tokens
each need tokens in proportion to

    T V / |E G|^2

and their share is this over that of single answers.

Where E G is what single answers have, that is the fork rule (`rule`), of V alone. It is not where
steps weigh the same in the loss: the N continuations of a fork then weigh N times their prefix. If
what is learned behind the fork is what would be learned before it, too, trees have more signal than
the rule knows of. That has a price: |E G|^2 is small beside V, and is told from 0 by hundreds of
trees of one policy, not by those of a learner step.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.tree import ROOT, Tree


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeUpdates:
    """What independent trees of one policy give to an update, each one a row.

    Attributes:
        means: G of each; of single answers the mean over those that a tree holds, any of which
            might have been drawn.
        squares: |G|^2; of single answers the mean over them.
        tokens: T; of single answers the mean over them.
    """

    means: Float64[np.ndarray, "trees gradient"]
    squares: Float64[np.ndarray, " trees"]
    tokens: Float64[np.ndarray, " trees"]

    def __len__(self) -> int:
        """Number of trees."""
        return len(self.squares)

    @property
    def cost(self) -> float:
        """T V / |E G|^2; infinite where the estimate of |E G|^2 is not above 0."""
        own = (self.means**2).sum()
        total = (self.means.sum(0) ** 2).sum()
        return float(_cost(len(self), self.squares.sum(), total - own, self.tokens.sum()))

    @property
    def costs_without(self) -> Float64[np.ndarray, " trees"]:
        """The same of all trees but one, for each."""
        own = (self.means**2).sum(1)
        total = self.means.sum(0)
        rest = ((total - self.means) ** 2).sum(1) - (own.sum() - own)
        squares, tokens = self.squares.sum() - self.squares, self.tokens.sum() - self.tokens
        return _cost(len(self) - 1, squares, rest, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShare:
    """Tokens over those of single answers, for gradients that are as good."""

    value: float
    error: float
    """Standard error, by leaving out each tree in turn (the jackknife)."""


def update_share(trees: TreeUpdates, singles: TreeUpdates) -> TokenShare | None:
    """Tokens that trees need, over those of the single answers that the same trees hold.

    Args:
        trees: As they are trained.
        singles: Those that they hold, row by row.

    Returns:
        None where they are fewer than three, or tell no signal or no noise, all of them or all
        but one.

    Example: means (2), (1), (3) with their squares and 20 tokens have |E G|^2 = (2 + 6 + 3) / 3 and
    V = 14 / 3 - 11 / 3 = 1, so a cost of 60 / 11; means (1), (2), (4) of 10 tokens have |E G|^2 =
    (2 + 4 + 8) / 3 and V = 21 / 3 - 14 / 3, so 5: the share is 12 / 11.
    """
    if (count := len(trees)) < 3:
        return None
    ours, theirs = (np.append(each.cost, each.costs_without) for each in (trees, singles))
    if not (np.isfinite([ours, theirs]).all() and min(ours.min(), theirs.min()) > 0):
        return None
    value, *without = ours / theirs
    error = np.sqrt((count - 1) / count * ((without - np.mean(without)) ** 2).sum())
    return TokenShare(value=float(value), error=float(error))


def first_children(tree: Tree, num_children: Sequence[int]) -> list[int]:
    """Steps of the tree that would have been grown with fewer children: of each step, and of the
    prompt, the first ones, as many as its depth has. None is drawn by what came of it."""
    kept: list[int] = []
    grown, places = {ROOT}, Counter[int]()
    for step, parent in enumerate(tree.parents.tolist()):
        if parent in grown and places[parent] < num_children[tree.depths[step] - 1]:
            kept.append(step)
            grown.add(step)
        places[parent] += 1
    return kept


def part_of(tree: Tree, kept: Sequence[int]) -> Tree:
    """The tree of these steps alone, ascending, each with its parent."""
    places = {ROOT: ROOT} | {step: place for place, step in enumerate(kept)}
    steps = [tree.steps[step] for step in kept]
    return Tree.from_steps(
        tree.prompt_ids,
        [replace(step, parent=places[step.parent]) for step in steps],
    )


def _cost(
    count: int,
    squares: Float64[np.ndarray, "*trees"] | float,
    products: Float64[np.ndarray, "*trees"] | float,
    tokens: Float64[np.ndarray, "*trees"] | float,
) -> Float64[np.ndarray, "*trees"]:
    """T V / |E G|^2 of sums over trees: `products` is over the ordered pairs of different ones."""
    signal = np.asarray(products) / (count * (count - 1))
    noise = np.asarray(squares) / count - signal
    is_told = signal > 0
    return np.where(
        is_told, np.asarray(tokens) / count * noise / np.where(is_told, signal, 1.0), np.inf
    )
