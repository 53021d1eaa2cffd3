"""Shares of updates on a model: the same as worked out step by step from plain gradients."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.learning.learner_runs import FREE, make_config, make_learner, make_record
from tests.support.learning.tiny_models import save_tiny_model
from tests.support.project import load_script
from tests.support.saved_runs.small_run import write_small_run
from treerpo_ray.algo.advantages.forms import AdvantageForm, single_baseline
from treerpo_ray.algo.forks.rule import ForkEstimate, fork_estimate
from treerpo_ray.algo.forks.samples import step_samples, tree_gradients
from treerpo_ray.algo.forks.updates import TreeUpdates, update_share
from treerpo_ray.algo.loss_config import LossConfig, Normalisation
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config import Config
from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.config.sections import TreeConfig
from treerpo_ray.learner.fork_probe import step_scores
from treerpo_ray.learner.learner import Learner
from treerpo_ray.records import TreeRecord
from treerpo_ray.study.step_gradients import step_gradients
from treerpo_ray.study.update_shares import shape_shares, smaller_shapes

BY_TOKEN = Normalisation.CONSTANT
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


def plain_scores(learner: Learner, tree: Tree, by_all_parameters: bool) -> np.ndarray:
    """Gradients of log p of the tree's steps."""
    scores = step_gradients if by_all_parameters else step_scores
    [found] = scores(learner.optimizer, [tree], seed=0, token_budget=999, normalisation=BY_TOKEN)
    return found.astype(np.float64)


def by_hand(
    config: Config, records: Sequence[TreeRecord], count: int, by_all_parameters: bool
) -> TreeUpdates:
    """The mean reward of the first `count` answers for their prefix, each one's own for itself."""
    learner, means, tokens = make_learner(config), [], []
    is_even = config.loss.normalisation is Normalisation.SEQUENCE_MEAN
    for record in records:
        scores = plain_scores(learner, record.tree, by_all_parameters)
        rewards = record.rewards[1 : 1 + count]
        own = np.array([rewards.mean(), *rewards])
        weights = own / record.tree.lengths[: 1 + count] if is_even else own
        means.append(weights @ scores[: 1 + count])
        tokens.append(record.tree.lengths[: 1 + count].sum())
    return TreeUpdates(
        means=np.array(means),
        squares=(np.array(means) ** 2).sum(-1),
        tokens=np.array(tokens, np.float64),
    )


def singles_by_hand(
    config: Config, records: Sequence[TreeRecord], by_all_parameters: bool
) -> TreeUpdates:
    """Any of the four answers, each with its reward for both of its steps."""
    learner, means, squares, tokens = make_learner(config), [], [], []
    is_even = config.loss.normalisation is Normalisation.SEQUENCE_MEAN
    for record in records:
        scores = plain_scores(learner, record.tree, by_all_parameters)
        if is_even:
            scores = scores / record.tree.lengths[:, None]
        own = [record.rewards[leaf] * (scores[0] + scores[leaf]) for leaf in (1, 2, 3, 4)]
        means.append(np.mean(own, 0))
        squares.append(np.mean([(each**2).sum() for each in own]))
        tokens.append(record.tree.lengths[0] + record.tree.lengths[1:].mean())
    return TreeUpdates(means=np.array(means), squares=np.array(squares), tokens=np.array(tokens))


@pytest.mark.parametrize("normalisation", [Normalisation.CONSTANT, Normalisation.SEQUENCE_MEAN])
@pytest.mark.parametrize("by_all_parameters", [False, True])
def test_shares_are_of_what_is_trained_in_trees_with_fewer_children_too(
    tmp_path: Path, normalisation: Normalisation, by_all_parameters: bool
) -> None:
    config = raft(save_tiny_model(tmp_path / "model", "qwen2"), normalisation)
    steps = trees()
    folder = checkpoint(config, tmp_path / "checkpoint")
    found = shape_shares(config, folder, steps, by_all_parameters=by_all_parameters)
    assert [each.num_children for each in found] == [(1, 4), (1, 2)]
    records = [*steps[0], *steps[1]]
    singles = singles_by_hand(config, records, by_all_parameters)
    for share, count in zip(found, (4, 2), strict=True):
        trained = by_hand(config, records, count, by_all_parameters)
        expected = update_share(trained, singles)
        assert share.as_trained is not None and expected is not None
        assert share.as_trained.value == pytest.approx(expected.value, rel=1e-4)
        assert share.as_trained.error == pytest.approx(expected.error, rel=1e-3)
        assert share.tokens == pytest.approx(trained.tokens.mean())
        assert share.by_rule is not None


def test_single_answers_are_held_against_what_the_form_takes_off_and_so_is_the_rule(
    tmp_path: Path,
) -> None:
    """Of an update before the checkpoint the mean reward is known; RAFT takes off nothing."""
    path = save_tiny_model(tmp_path / "model", "qwen2")
    config = raft(path)
    learner = make_learner(config)
    learner.update([make_record(900 + i, "cwcw", parents=FORKED) for i in range(4)])
    (tmp_path / "checkpoint").mkdir()
    learner.write(tmp_path / "checkpoint")
    assert learner.baseline.root == 0.5
    forms = {
        AdvantageForm.REWARD: 0.0,
        AdvantageForm.PAST_BASELINE: 0.5,
        AdvantageForm.SHRUNK_BASELINE: 0.25,  # a share of one half of it
        AdvantageForm.LEAVE_ONE_OUT: 0.5,  # REINFORCE's
    }
    for form, expected in forms.items():
        share = 0.5 if form is AdvantageForm.SHRUNK_BASELINE else 1.0
        settings = replace(config.learner, advantage=form, baseline_share=share)
        own = replace(config, learner=settings)
        assert single_baseline(form, replace(learner.baseline, share=share)) == expected
        found = shape_shares(own, tmp_path / "checkpoint", trees())
        [by_rule] = [each.by_rule for each in found if each.num_children == (1, 4)]
        estimate = estimated(own, tmp_path / "checkpoint", expected)
        assert by_rule is not None
        assert by_rule.value == pytest.approx(estimate.fork.token_share(4), rel=1e-4)
        assert by_rule.error == pytest.approx(estimate.token_share_error(4), rel=1e-3)


def estimated(config: Config, checkpoint: Path, baseline: float) -> ForkEstimate:
    """What `trees` tell, with rewards held against a baseline."""
    looks = []
    for step in trees():
        scores = step_scores(
            make_learner(config, checkpoint).optimizer,
            [each.tree for each in step],
            0,
            999,
            config.loss.normalisation,
        )
        told = [
            tree_gradients(each.tree, own, rewards=each.rewards, baseline=baseline, num_cuts=1)
            for each, own in zip(step, scores, strict=True)
        ]
        looks.append(step_samples([each for each in told if each is not None], 1))
    found = fork_estimate(1, looks)
    assert found is not None
    return found


def test_an_answer_that_ended_before_the_fork_is_a_tree_of_every_shape(tmp_path: Path) -> None:
    """It is its own single answer, with all of its tokens, whatever the shape is."""
    config = raft(save_tiny_model(tmp_path / "model", "qwen2"))
    short = [make_record(first, "c", parents=(-1,)) for first in range(20)]
    [four, two] = shape_shares(config, checkpoint(config, tmp_path / "checkpoint"), [short])
    assert four.as_trained is not None and two.as_trained is not None
    assert four.as_trained.value == two.as_trained.value == pytest.approx(1.0)
    assert four.tokens == two.tokens == np.mean([each.tree.lengths.sum() for each in short])


def test_runs_with_adapters_or_parts_of_a_model_tell_what_the_whole_one_does(
    tmp_path: Path,
) -> None:
    """Adapters that have learned tell what the model tells that they are merged into; the
    checkpoint of a run whose workers have parts is measured by one learner that has all."""
    path = save_tiny_model(tmp_path / "model", "qwen2")
    fast = replace(raft(path).learner, learning_rate=0.05)
    adapted = replace(raft(path), learner=fast, lora=LoraConfig(rank=4, alpha=8))
    learner = make_learner(adapted)
    for first in (900, 904):
        learner.update([make_record(first + i, "cwcw", parents=FORKED) for i in range(4)])
    (tmp_path / "checkpoint").mkdir()
    learner.write(tmp_path / "checkpoint")
    learner.policy.save_pretrained(tmp_path / "merged_model")
    plain = raft(str(tmp_path / "merged_model"))
    of_adapters = shape_shares(adapted, tmp_path / "checkpoint", trees())
    of_merged = shape_shares(plain, checkpoint(plain, tmp_path / "merged"), trees())
    of_start = shape_shares(raft(path), checkpoint(raft(path), tmp_path / "start"), trees())
    for own, merged, start in zip(of_adapters, of_merged, of_start, strict=True):
        assert own.as_trained is not None and merged.as_trained is not None
        assert own.as_trained.value == pytest.approx(merged.as_trained.value, rel=1e-3)
        assert own.as_trained.error == pytest.approx(merged.as_trained.error, rel=1e-2)
        assert start.as_trained is not None, "what the adapters learned is measured"
        assert own.as_trained.value != pytest.approx(start.as_trained.value, rel=1e-2)
    parts = replace(plain, learner=replace(plain.learner, shard=True, num_workers=2))
    assert shape_shares(parts, tmp_path / "merged", trees()) == of_merged


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


@pytest.mark.parametrize(
    ("section", "settings", "told"),
    [
        ("tree", {"adaptive": True}, "tree.adaptive=true grows several shapes: set it to false"),
        (
            "tree",
            {"num_children": (1, 1)},
            "tree.num_children=[1, 1] has no fork: set it to [1, 8]",
        ),
        ("gate", {"max_redraws": 2}, "gate.max_redraws picks trees by their rewards: set it to 0"),
        ("learner", {"length_weight": 0.5}, "learner.length_weight gives trees a term that single"),
    ],
)
def test_what_would_be_told_of_another_thing_than_shapes_is_refused(
    tmp_path: Path, section: str, settings: dict[str, object], told: str
) -> None:
    config = raft(save_tiny_model(tmp_path / "model", "qwen2"))
    other = replace(config, **{section: replace(getattr(config, section), **settings)})
    with pytest.raises(ValueError, match=re.escape(told)):
        shape_shares(other, tmp_path, trees())
    errored = [make_record(90, "cecc", parents=FORKED)]
    with pytest.raises(ValueError, match="no tree has rewards of all its answers"):
        shape_shares(config, tmp_path, [errored])


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


def test_the_command_says_what_a_run_lacks(tmp_path: Path) -> None:
    job = load_script("jobs/forks.py")
    folder = write_small_run(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint, whose weights are measured"):
        job.forks([folder])
    with pytest.raises(ValueError, match=r"is no run: it has no config\.yaml"):
        job.forks([str(tmp_path)])
    for steps in ("0", "-3", "many"):
        with pytest.raises(SystemExit):
            job.forks([folder, "--steps", steps])
