"""Update result: what a learner step did, and what it made of its trees."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64

from treerpo_ray.algo.forks.adaptive_shape import ShapeChoice
from treerpo_ray.algo.packing import Forest, unpack
from treerpo_ray.algo.tree import Tree
from treerpo_ray.learner.stats import BatchStats
from treerpo_ray.records import Training


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedTrees:
    """What an update made of its trees.

    Args:
        order: Place of each tree among those that were given.
        trees: In the order in which they were trained.
        advantages: Of each tree, one a step.
        minibatches: Forests of each.
        logprobs: Of each minibatch, forest and edge: `LossInputs.old_logprobs`; none before they
            are trained.
    """

    order: Sequence[int]
    trees: Sequence[Tree]
    advantages: Sequence[Float64[np.ndarray, " _"]]
    minibatches: Sequence[Sequence[Forest]]
    logprobs: Sequence[Sequence[torch.Tensor]] = ()

    def training(self) -> tuple[Training, ...]:
        """What was made of each tree, in the order in which they were given; the log-probabilities
        are those before the first optimizer step of the update."""
        size = len(self.trees) // len(self.minibatches)
        by_token: list[np.ndarray] = []
        for number, (forests, own) in enumerate(zip(self.minibatches, self.logprobs, strict=True)):
            part = self.trees[number * size : (number + 1) * size]
            by_token += unpack(part, forests, [values.cpu().numpy() for values in own])
        found = {
            place: Training(advantages=own, logprobs=values)
            for place, own, values in zip(self.order, self.advantages, by_token, strict=True)
        }
        return tuple(found[place] for place in range(len(found)))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What a learner step did."""

    has_updated: bool
    """False if no step group of any worker was kept: nothing moved then."""
    stats: BatchStats
    metrics: dict[str, float]
    seconds: float = field(compare=False)
    """Wall time of the update."""
    trained: TrainedTrees
    """This worker's."""
    chosen: ShapeChoice | None = None
    """Where the shape of trees adapts, what the looks so far choose; None: this step added none."""
    chosen_before: ShapeChoice | None = None
    """What they chose without this step's, if there were any."""
