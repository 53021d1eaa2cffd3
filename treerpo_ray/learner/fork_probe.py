"""Fork probe: measures what the fork rule asks for, on some trees of a learner step now and then.

The gradient is that of a linear layer M between the last hidden state h and the head, at M = 1:
of the log-probability of a token it is the outer product of delta, the gradient by h, and h. It
needs a forward pass and, of the backward pass, the head's part alone, is small where the head's
own gradient has a row for each token of the vocabulary, and takes in whatever scales or caps the
logits. What layers below get is linear in delta, too. Wide models are projected on both sides by
random signs, drawn anew each time, which leaves squares and products unbiased.

Pruned groups count as well: whether a group is kept depends on the rewards. All trees are taken to
be of the policy that is measured, which those that are some updates behind are nearly; with
`gate.max_redraws`, which leaves out trees by their rewards, it is measured on those that stay.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from treerpo_ray.algo.forks.adaptive_shape import (
    ShapeChoice,
    choice_by,
    is_measured,
    measured_cuts,
    measures,
)
from treerpo_ray.algo.forks.rule import MAX_CHILDREN, CutSamples, ForkEstimate, fork_estimate
from treerpo_ray.algo.forks.samples import TreeGradients, step_samples, tree_gradients
from treerpo_ray.algo.loss_config import LossConfig, Normalisation
from treerpo_ray.algo.packing import pack
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config.sections import TreeConfig
from treerpo_ray.learner.optimizer import PolicyOptimizer, gathered
from treerpo_ray.metrics.fork_lines import fork_row
from treerpo_ray.metrics.rows import Row
from treerpo_ray.records import TreeRecord

WIDTH = 64
"""Of each side of a gradient: wider ones are projected."""
PAST_LOOKS = 5
"""Looks that estimates are made of: of fewer, there are too few prefixes; of more, the policy has
become another one."""
Look = tuple[CutSamples, ...]
"""What the trees of one learner step tell of each cut, the shallow one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How both sides of a gradient are made small."""

    of_pull: Float32[Tensor, "hidden width"]
    of_state: Float32[Tensor, "hidden width"]

    @classmethod
    def of(cls, hidden: int, seed: int, device: torch.device, width: int = WIDTH) -> "Projection":
        """The same for all workers: signs, or nothing for what is as narrow as it is to be."""
        if hidden <= width:
            one = torch.eye(hidden, device=device)
            return cls(of_pull=one, of_state=one)
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (2, hidden, width)) / width**0.5
        left, right = torch.from_numpy(signs.astype(np.float32)).to(device)
        return cls(of_pull=left, of_state=right)


class ForkProbe:
    """What the newest looks tell.

    Args:
        every: Learner steps between two looks; 0: there are none.
        tree: Shape of the run's trees. A look is at those of its learner step that `measures`
            says; where shapes adapt these were grown for it.
        size: Trees of a learner step, of all workers.
        loss: Says what a step weighs.
    """

    def __init__(self, *, every: int, tree: TreeConfig, size: int, loss: LossConfig) -> None:
        self.every, self.is_adaptive, self.size = every, tree.adaptive, size
        self.normalisation = loss.normalisation
        self.has_forks = bool(measured_cuts(tree.num_children))
        self.num_cuts = len(tree.num_children) - 1
        """Places between the levels of the run's trees."""
        self._looks: deque[Look] = deque(maxlen=PAST_LOOKS)

    def is_due(self, step: int) -> bool:
        """Whether the trees of a learner step, counted from 0, are to be measured; those without a
        fork behind a first step have nothing to be measured by."""
        return self.has_forks and is_measured(step, self.every)

    def look(
        self,
        optimizer: PolicyOptimizer,
        records: Sequence[TreeRecord],
        *,
        baseline: float,
        version: int,
        token_budget: int,
    ) -> Row | None:
        """Measure a worker's trees; every worker must call it. Returns metrics, of those cuts that
        gradients tell of; None if no tree of any worker has all that is measured.

        Args:
            optimizer: Whose policy it is.
            records: The worker's trees.
            baseline: What the run holds a single answer's reward against.
            version: Of the policy.
            token_budget: Most tokens of one forward pass.
        """
        chosen = self._measurable(records)
        scores = step_scores(
            optimizer, [each.tree for each in chosen], version, token_budget, self.normalisation
        )
        own = [
            tree_gradients(
                record.tree,
                score,
                rewards=record.rewards,
                baseline=baseline,
                num_cuts=self.num_cuts,
            )
            for record, score in zip(chosen, scores, strict=True)
        ]
        told = [tree for part in gathered(own) for tree in part if tree is not None]
        if not told:
            return None
        self._looks.append(look_of(told, self.num_cuts))
        rows = (fork_row(one, MAX_CHILDREN) for one in self.estimates if one.has_gradients)
        return {name: value for row in rows for name, value in row.items()}

    @property
    def estimates(self) -> tuple[ForkEstimate, ...]:
        """What the looks so far tell of each cut, of those that they tell enough of."""
        found = (
            fork_estimate(place + 1, (look[place] for look in self._looks))
            for place in range(self.num_cuts)
        )
        return tuple(each for each in found if each is not None)

    @property
    def choice(self) -> ShapeChoice | None:
        """The shape that the looks so far choose for trees to come; None: they tell too little, or
        have nothing to choose."""
        return choice_by(self.estimates, self.num_cuts + 1) if self.is_adaptive else None

    def state(self) -> dict[str, object]:
        """For `restore`, as JSON holds it."""
        looks = [[cut.columns.tolist() for cut in look] for look in self._looks]
        return {"fork_looks": looks}

    def restore(self, looks: Iterable[Sequence[Sequence[Sequence[float]]]]) -> None:
        """Take over what `state` gave; of trees of another depth nothing."""
        for look in looks:
            if len(look) == self.num_cuts:
                columns = (np.array(cut, np.float64) for cut in look)
                self._looks.append(tuple(CutSamples.from_columns(each) for each in columns))

    def _measurable(self, records: Sequence[TreeRecord]) -> list[TreeRecord]:
        """Of a worker's trees those that measure, without those that lack a reward.

        Which those are must not depend on what was sampled: an answer that ended before the cut is
        part of what is measured, and looks like a single one.
        """
        own = sorted(records, key=lambda record: record.ticket)
        measured = (each for each in own if measures(each.ticket % self.size, self.size))
        return [record for record in measured if is_whole(record)]


def is_whole(record: TreeRecord) -> bool:
    """Whether all answers of a tree have rewards, and all its steps tokens."""
    rewards = record.rewards[list(record.tree.leaves)]
    return bool(record.tree.lengths.all()) and not np.isnan(rewards).any()


def look_of(trees: Sequence[TreeGradients], num_cuts: int) -> Look:
    """What the trees of one learner step, those of all workers, tell."""
    return tuple(step_samples(trees, depth) for depth in range(1, num_cuts + 1))


def step_scores(
    optimizer: PolicyOptimizer,
    trees: Sequence[Tree],
    seed: int,
    token_budget: int,
    normalisation: Normalisation,
    width: int = WIDTH,
) -> list[Float32[np.ndarray, "steps gradient"]]:
    """Gradient of log p of each step of each tree, by M; every worker must call it.

    Args:
        optimizer: Whose policy it is.
        trees: A worker's.
        seed: Of the projection.
        token_budget: Most tokens of one forward pass.
        normalisation: Where steps weigh the same in the loss, each is over its tokens.
        width: Of each side of a gradient: wider ones are projected.
    """
    forests = pack(trees, [np.zeros(len(tree), np.float32) for tree in trees], token_budget)
    counts = [len(tree) for tree in trees]
    found = np.zeros((sum(counts), 0), np.float32)
    projection: Projection | None = None
    # Strict, so that the passes are gone through that others need.
    for forest, (pulls, states) in zip(forests, optimizer.pulls(forests), strict=True):
        projection = projection or Projection.of(pulls.shape[1], seed, pulls.device, width)
        left, right = pulls @ projection.of_pull, states @ projection.of_state
        lengths = np.bincount(forest.step, minlength=forest.num_steps).tolist()
        parts = zip(left.split(lengths), right.split(lengths), strict=True)
        own = torch.stack([(pull.T @ state).flatten() for pull, state in parts])
        if not found.shape[1]:
            found = np.zeros((len(found), own.shape[1]), np.float32)
        found[forest.origin] = own.cpu().numpy()
    if normalisation is Normalisation.SEQUENCE_MEAN and trees:
        found /= np.concatenate([tree.lengths for tree in trees])[:, None]
    return np.split(found, np.cumsum(counts)[:-1]) if trees else []
