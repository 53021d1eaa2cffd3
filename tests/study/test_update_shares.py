"""Shares of updates on a model: the same as worked out step by step from plain gradients."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.learning.learner_runs import FREE, make_config, make_learner, make_record
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.forks.updates import TreeUpdates, update_share
from treerpo_ray.algo.loss_config import LossConfig, Normalisation
from treerpo_ray.config import Config
from treerpo_ray.config.sections import TreeConfig
from treerpo_ray.learner.fork_probe import step_scores
from treerpo_ray.records import TreeRecord
from treerpo_ray.study.update_shares import shape_shares, smaller_shapes

FORKED = (-1, 0, 0, 0, 0)
"""Parents of a tree [1, 4]."""


def raft(path: str, normalisation: Normalisation = Normalisation.CONSTANT) -> Config:
    """Trees [1, 4] of which only what is right is trained."""
    settings = replace(FREE, advantage=AdvantageForm.REWARD, prune_threshold=-1.0)
    config = make_config(path, settings, LossConfig(normalisation=normalisation))
    tree = TreeConfig(num_children=(1, 4), step_tokens=(5, 5), temperature=0.7)
    return replace(config, tree=tree)


def trees() -> list[list[TreeRecord]]:
    """Two learner steps of 30, each tree with one to four right answers: they have a signal."""
    verdicts = ("cwww", "wccc", "cccc", "cwcw", "ccwc")
    return [
        [make_record(first + i, verdicts[i % 5], parents=FORKED) for i in range(30)]
        for first in (0, 30)
    ]


def checkpoint(config: Config, folder: Path) -> Path:
    make_learner(config).write(folder)
    return folder


def by_hand(config: Config, records: Sequence[TreeRecord], count: int) -> TreeUpdates:
    """The mean reward of the first `count` answers for their prefix, each one's own for itself."""
    learner, means, tokens = make_learner(config), [], []
    is_even = config.loss.normalisation is Normalisation.SEQUENCE_MEAN
    for record in records:
        [scores] = step_scores(learner.optimizer, [record.tree], 0, 999)
        rewards = record.rewards[1 : 1 + count]
        own = np.array([rewards.mean(), *rewards])
        weights = own / record.tree.lengths[: 1 + count] if is_even else own
        means.append(weights @ scores[: 1 + count].astype(np.float64))
        tokens.append(record.tree.lengths[: 1 + count].sum())
    return TreeUpdates(
        means=np.array(means),
        squares=(np.array(means) ** 2).sum(-1),
        tokens=np.array(tokens, np.float64),
    )


def singles_by_hand(config: Config, records: Sequence[TreeRecord]) -> TreeUpdates:
    """Any of the four answers, each with its reward for both of its steps."""
    learner, means, squares, tokens = make_learner(config), [], [], []
    is_even = config.loss.normalisation is Normalisation.SEQUENCE_MEAN
    for record in records:
        [scores] = step_scores(learner.optimizer, [record.tree], 0, 999)
        scores = scores.astype(np.float64)
        if is_even:
            scores = scores / record.tree.lengths[:, None]
        own = [record.rewards[leaf] * (scores[0] + scores[leaf]) for leaf in (1, 2, 3, 4)]
        means.append(np.mean(own, 0))
        squares.append(np.mean([(each**2).sum() for each in own]))
        tokens.append(record.tree.lengths[0] + record.tree.lengths[1:].mean())
    return TreeUpdates(means=np.array(means), squares=np.array(squares), tokens=np.array(tokens))


@pytest.mark.parametrize("normalisation", [Normalisation.CONSTANT, Normalisation.SEQUENCE_MEAN])
def test_shares_are_of_what_is_trained_in_trees_with_fewer_children_too(
    tmp_path: Path, normalisation: Normalisation
) -> None:
    config = raft(save_tiny_model(tmp_path / "model", "qwen2"), normalisation)
    steps = trees()
    found = shape_shares(config, checkpoint(config, tmp_path / "checkpoint"), steps)
    assert [each.num_children for each in found] == [(1, 4), (1, 2)]
    records = [*steps[0], *steps[1]]
    singles = singles_by_hand(config, records)
    for share, count in zip(found, (4, 2), strict=True):
        trained = by_hand(config, records, count)
        expected = update_share(trained, singles)
        assert share.as_trained is not None and expected is not None
        assert share.as_trained.value == pytest.approx(expected.value, rel=1e-4)
        assert share.as_trained.error == pytest.approx(expected.error, rel=1e-3)
        assert share.tokens == pytest.approx(trained.tokens.mean())
        assert share.by_rule is not None


def test_trees_that_lack_a_reward_are_left_out_and_few_tell_nothing(tmp_path: Path) -> None:
    config = raft(save_tiny_model(tmp_path / "model", "qwen2"))
    folder = checkpoint(config, tmp_path / "checkpoint")
    errored = make_record(90, "cecc", parents=FORKED)
    [first, second], [with_it, _] = (
        shape_shares(config, folder, steps) for steps in ([trees()[0]], [[errored, *trees()[0]]])
    )
    assert with_it == first and second.as_trained is not None
    few = shape_shares(config, folder, [trees()[0][:2]])
    assert [each.as_trained for each in few] == [None, None]


def test_trees_of_several_shapes_or_picked_by_their_rewards_are_not_measured(
    tmp_path: Path,
) -> None:
    config = raft(save_tiny_model(tmp_path / "model", "qwen2"))
    adaptive = replace(config, tree=replace(config.tree, adaptive=True))
    with pytest.raises(
        ValueError, match=r"tree\.adaptive=true grows several shapes: set it to fal"
    ):
        shape_shares(adaptive, tmp_path, [])
    refilled = replace(config, gate=replace(config.gate, max_redraws=2))
    with pytest.raises(ValueError, match=r"gate\.max_redraws picks trees by their rewards: set it"):
        shape_shares(refilled, tmp_path, [])


@pytest.mark.parametrize(
    ("shape", "smaller"),
    [
        ((1, 8), [(1, 8), (1, 4), (1, 2)]),
        ((4, 4), [(4, 4), (4, 2), (4, 1)]),
        ((6,), [(6,), (3,)]),
        ((1, 1), []),
    ],
)
def test_smaller_shapes_halve_the_last_fork(shape, smaller) -> None:
    assert list(smaller_shapes(shape)) == smaller
