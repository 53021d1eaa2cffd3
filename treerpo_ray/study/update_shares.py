"""Update shares: which shape of trees a model's updates need the fewest tokens with.

Measured on trees that a run has saved, by the weights of its newest checkpoint: as they were grown,
and as they would have been with fewer children. `treerpo_ray.algo.forks.updates` has the formula.
The gradient is that of the layer before the head, as while a run trains (`fork_probe`), or that of
all that is trained (`step_gradients`), which takes a backward pass for each step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from treerpo_ray.algo.advantages.forms import single_baseline
from treerpo_ray.algo.forks.adaptive_shape import Shape, measured_cuts
from treerpo_ray.algo.forks.rule import fork_estimate
from treerpo_ray.algo.forks.samples import TreeGradients, step_samples, tree_gradients
from treerpo_ray.algo.forks.updates import (
    TokenShare,
    TreeUpdates,
    first_children,
    part_of,
    update_share,
)
from treerpo_ray.algo.loss_config import Normalisation
from treerpo_ray.config import Config
from treerpo_ray.learner.fork_probe import is_whole, step_scores
from treerpo_ray.learner.learner import Learner
from treerpo_ray.records import TreeRecord
from treerpo_ray.study.step_gradients import step_gradients

WIDTH = 128
"""Of each side of a gradient: that of wider models is projected, which adds an error that is the
same for all shapes where they teach the same, and is not in the standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeShare:
    """What updates of trees of a shape need."""

    num_children: Shape
    tokens: float
    """Sampled tokens of a tree."""
    as_trained: TokenShare | None
    """Of updates with the run's credit; None: the trees are too few."""
    by_rule: TokenShare | None
    """By the fork rule, which takes every answer for as useful wherever it forked; None where a
    shape forks at the prompt or at two places, or the trees are too few."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scored:
    """A tree with the gradients of its steps."""

    record: TreeRecord
    scores: np.ndarray


def shape_shares(
    config: Config,
    checkpoint: Path,
    steps: Sequence[Sequence[TreeRecord]],
    *,
    by_all_parameters: bool = False,
) -> list[ShapeShare]:
    """The shares of the run's shape and of smaller ones, the largest first.

    Args:
        config: The run's.
        checkpoint: Local folder of the checkpoint whose weights are measured.
        steps: Trees of some learner steps, nearly of these weights. Those that lack a reward are
            left out.
        by_all_parameters: Whether the gradient is by all that is trained, not by the layer before
            the head.

    Raises:
        ValueError: the trees are of several shapes, of single answers or picked by their rewards,
            none has all of its rewards, or their credit is not of rewards alone.
    """
    _check(config)
    own = [[each for each in step if is_whole(each)] for step in steps]
    if not any(own):
        raise ValueError("no tree has rewards of all its answers")
    learner = _learner(config, checkpoint)
    scored = [_score(learner, step, config.loss.normalisation, by_all_parameters) for step in own]
    trees = [each for step in scored for each in step]
    baseline = single_baseline(learner.form, learner.baseline)
    singles = _singles(trees, baseline)
    num_cuts = len(config.tree.num_children) - 1
    looks = [_gradients(step, baseline, num_cuts) for step in scored]
    found = []
    for shape in smaller_shapes(config.tree.num_children):
        ours = _updates(learner, trees, shape)
        found.append(
            ShapeShare(
                num_children=shape,
                tokens=float(ours.tokens.mean()),
                as_trained=update_share(ours, singles),
                by_rule=_by_rule(looks, shape),
            )
        )
    return found


def smaller_shapes(num_children: Shape) -> Iterator[Shape]:
    """A shape, and those whose last fork is halved, down to the last one that forks at all.

    Example: (1, 8) gives (1, 8), (1, 4) and (1, 2), (4, 4) gives (4, 4), (4, 2) and (4, 1).
    """
    shape = list(num_children)
    forked = [level for level, children in enumerate(shape) if children > 1]
    while forked and max(shape) > 1:
        yield tuple(shape)
        if shape[forked[-1]] == 1:
            return
        shape[forked[-1]] //= 2


def _check(config: Config) -> None:
    """Refuse trees that tell of no shape, or of another one than they seem to."""
    if config.tree.adaptive:
        raise ValueError("tree.adaptive=true grows several shapes: set it to false")
    if max(config.tree.num_children) < 2:
        shape = list(config.tree.num_children)
        raise ValueError(f"tree.num_children={shape} has no fork: set it to [1, 8] for example")
    if config.gate.max_redraws:
        raise ValueError("gate.max_redraws picks trees by their rewards: set it to 0")
    if config.learner.length_weight:
        raise ValueError(
            "learner.length_weight gives trees a term that single answers lack: set it to 0"
        )


def _learner(config: Config, checkpoint: Path) -> Learner:
    """The run's policy and credit, on one device and for no update."""
    settings = replace(
        config.learner, minibatches=1, shard=False, offload=False, compile=False, fork_every=0
    )
    return Learner(
        model=config.model,
        learner=settings,
        loss=replace(config.loss, kl_coef=0.0),
        tree=config.tree,
        gate=config.gate,
        max_tokens=config.max_model_tokens,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        lora=config.lora,
        checkpoint=checkpoint,
    )


def _score(
    learner: Learner,
    records: Sequence[TreeRecord],
    normalisation: Normalisation,
    by_all_parameters: bool,
) -> list[_Scored]:
    """Gradients of log p of each step, as the loss weighs them."""
    scores = step_gradients if by_all_parameters else partial(step_scores, width=WIDTH)
    found = scores(
        learner.optimizer,
        [each.tree for each in records],
        seed=0,
        token_budget=learner.settings.token_budget,
        normalisation=normalisation,
    )
    pairs = zip(records, found, strict=True)
    return [_Scored(record=record, scores=own.astype(np.float64)) for record, own in pairs]


def _gradients(trees: Sequence[_Scored], baseline: float, num_cuts: int) -> list[TreeGradients]:
    """What each tree tells of its cuts, row by row: none lacks a reward."""
    told = (
        tree_gradients(
            each.record.tree,
            each.scores,
            rewards=each.record.rewards,
            baseline=baseline,
            num_cuts=num_cuts,
        )
        for each in trees
    )
    return [each for each in told if each is not None]


def _singles(trees: Sequence[_Scored], baseline: float) -> TreeUpdates:
    """Single answers: any one of each tree."""
    told = _gradients(trees, baseline, num_cuts=1)
    columns = np.array([each.columns[0] for each in told])
    return TreeUpdates(
        means=np.array([each.mean for each in told]),
        squares=columns[:, 0],
        tokens=columns[:, 2] + columns[:, 3],
    )


def _updates(learner: Learner, trees: Sequence[_Scored], shape: Shape) -> TreeUpdates:
    """What trees give to an update, as they would have been grown in a shape."""
    kept = [first_children(each.record.tree, shape) for each in trees]
    records = [
        _part(each.record, own, ticket)
        for ticket, (each, own) in enumerate(zip(trees, kept, strict=True))
    ]
    trained, _ = learner.prepare(records)
    means = np.array(
        [
            np.nan_to_num(advantages) @ each.scores[own]
            for each, own, advantages in zip(trees, kept, trained.advantages, strict=True)
        ]
    )
    tokens = [float(each.tree.lengths.sum()) for each in records]
    return TreeUpdates(means=means, squares=(means**2).sum(-1), tokens=np.array(tokens))


def _part(record: TreeRecord, kept: Sequence[int], ticket: int) -> TreeRecord:
    """A record of these steps alone."""
    places = {leaf: place for place, leaf in enumerate(record.tree.leaves)}
    leaves = [places[step] for step in kept if step in places]
    return replace(
        record,
        ticket=ticket,
        tree=part_of(record.tree, kept),
        leaf_texts=tuple(record.leaf_texts[place] for place in leaves),
        verdicts=tuple(record.verdicts[place] for place in leaves),
        leaf_rewards=tuple(record.leaf_rewards[place] for place in leaves if record.leaf_rewards),
        training=None,
    )


def _by_rule(looks: Sequence[Sequence[TreeGradients]], shape: Shape) -> TokenShare | None:
    """What the fork rule says of a shape that forks at one place, behind a first step."""
    forked = [depth for depth, children in enumerate(shape) if children > 1]
    if len(forked) != 1 or not measured_cuts(shape):
        return None
    [depth] = forked
    found = fork_estimate(depth, (step_samples(look, depth) for look in looks))
    if found is None or not found.has_gradients:
        return None
    number = shape[depth]
    return TokenShare(value=found.fork.token_share(number), error=found.token_share_error(number))
