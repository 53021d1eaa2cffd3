"""What the learner measures of forks: exact gradients of the last layer, resumed, and when."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.learning.learner_runs import (
    CPU,
    FREE,
    make_config,
    make_learner,
    make_record,
    mixed,
)
from tests.support.learning.step_rows import plain_model
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.forks.adaptive_shape import choice_by, measures
from treerpo_ray.algo.forks.samples import tree_gradients
from treerpo_ray.algo.loss_config import LossConfig, Normalisation
from treerpo_ray.config import Config
from treerpo_ray.config.sections import TreeConfig
from treerpo_ray.learner.fork_probe import WIDTH, Projection, look_of, step_scores
from treerpo_ray.records import TreeRecord

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def by_autograd(path: str, record: TreeRecord) -> np.ndarray:
    """Gradient of log p of each step, by a layer M = 1 that stands before the head, from a plain
    forward of its whole path."""
    model, found = plain_model(path), []
    head = model.get_output_embeddings()
    for index, step in enumerate(record.tree.steps):
        tokens = [*record.tree.prompt_ids.tolist(), *record.tree.path_token_ids(index)]
        with torch.no_grad():
            ids = torch.tensor([tokens])
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        layer = nn.Parameter(torch.eye(hidden.shape[1]))
        logits = head((hidden @ layer.T)[-len(step.token_ids) - 1 : -1]) / TEMPERATURE
        own = torch.from_numpy(step.token_ids.astype(np.int64))
        logprob = logits.log_softmax(-1).gather(1, own[:, None]).sum()
        found.append(torch.autograd.grad(logprob, [layer])[0].flatten().numpy())
    return np.stack(found)


def test_scores_are_the_gradients_of_the_last_layer(path: str) -> None:
    """Of trees that are packed into several forests, some of them cut."""
    learner, records = make_learner(make_config(path, FREE)), mixed()
    before = [each.detach().clone() for each in learner.policy.trained]
    trees = [record.tree for record in records]
    by_token, by_step = (
        step_scores(learner.optimizer, trees, 0, learner.settings.token_budget, each)
        for each in (Normalisation.CONSTANT, Normalisation.SEQUENCE_MEAN)
    )
    for record, own, mean in zip(records, by_token, by_step, strict=True):
        expected = by_autograd(path, record)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(own, expected, atol=1e-4, rtol=1e-3)
        expected /= record.tree.lengths[:, None]
        np.testing.assert_allclose(mean, expected, atol=1e-4, rtol=1e-3)
    assert all(each.grad is None for each in learner.policy.trained)
    torch.testing.assert_close([each.detach() for each in learner.policy.trained], before)


OF_FORMS = {
    AdvantageForm.BERNOULLI: (Normalisation.TOKEN_MEAN, 1.0),
    AdvantageForm.PAST_BASELINE: (Normalisation.CONSTANT, 1.0),
    AdvantageForm.REWARD: (Normalisation.CONSTANT, 0.0),
    AdvantageForm.SHRUNK_BASELINE: (Normalisation.SEQUENCE_MEAN, 0.25),
}
"""By form a normalisation, and the part of the mean reward that a single answer's is held against,
with a share of 1/4 where the form has one."""


@pytest.mark.parametrize("form", OF_FORMS)
def test_a_learner_tells_what_full_gradients_tell_of_its_past_batches(
    path: str, tmp_path: Path, form: AdvantageForm
) -> None:
    """The first batch gives the baseline, the second one is measured, with the run's credit."""
    normalisation, part = OF_FORMS[form]
    settings = replace(FREE, advantage=form, prune_threshold=-1.0)
    if form is AdvantageForm.SHRUNK_BASELINE:
        settings = replace(settings, baseline_share=part)
    loss = LossConfig(normalisation=normalisation)
    learner = make_learner(make_config(path, settings, loss))
    first = learner.update(mixed())
    assert not [name for name in first.metrics if name.startswith("fork/")], "no baseline yet"
    learner.write(tmp_path)
    now = str(tmp_path / "model")
    records = mixed(first=4, version=1)
    root = learner.baseline.root
    assert 0 < root < 1
    second = learner.update(records)
    is_even = normalisation is Normalisation.SEQUENCE_MEAN
    trees = [
        tree_gradients(
            record.tree,
            by_autograd(now, record) / (record.tree.lengths[:, None] if is_even else 1),
            rewards=record.rewards,
            baseline=part * root,
            num_cuts=1,
        )
        for record in records
    ]
    [estimate] = learner.forks.estimates
    [samples] = look_of([tree for tree in trees if tree is not None], 1)
    np.testing.assert_allclose(estimate.samples.columns, samples.columns, rtol=1e-3, atol=1e-3)
    assert estimate.num_prefixes == 8, "two steps of each tree have children"
    fork = estimate.fork
    assert second.metrics["fork/token_share_depth_1"] == fork.token_share(fork.children)
    assert second.metrics["fork/num_prefixes_depth_1"] == 8


def test_looks_are_so_many_learner_steps_apart_and_are_kept_by_a_checkpoint(
    path: str, tmp_path: Path
) -> None:
    config = make_config(path, replace(FREE, fork_every=2), max_staleness=9)
    learner = make_learner(config)
    told = [
        "fork/gain_depth_1" in learner.update(mixed(first=4 * step, version=step)).metrics
        for step in range(4)
    ]
    assert told == [False, True, False, True]
    learner.write(tmp_path)
    resumed = make_learner(config, tmp_path)
    [one], [other] = learner.forks.estimates, resumed.forks.estimates
    np.testing.assert_array_equal(one.samples.columns, other.samples.columns)
    assert len(one.samples) == 8
    assert not resumed.forks.is_due(4) and resumed.forks.is_due(5)


ADAPTIVE = replace(
    FREE, advantage=AdvantageForm.SHRUNK_BASELINE, prune_threshold=-1.0, fork_every=2
)
SINGLE, FORKED = (-1, 0), (-1, 0, 0)
"""Parents of a single answer of two steps, and of a tree [1, 2]."""


def adaptive(path: str) -> Config:
    config = make_config(path, replace(ADAPTIVE, token_budget=999), max_staleness=9)
    tree = TreeConfig(num_children=(1, 2), step_tokens=(5, 5), temperature=0.7, adaptive=True)
    return replace(config, tree=tree, gate=replace(config.gate, trees_per_step=12))


def batch(step: int, count: int = 12) -> list[TreeRecord]:
    """Single answers; of a learner step that measures two trees of three are [1, 2]."""
    forked = [
        make_record(step * 12 + i, ("cw", "ww", "wc", "cc")[i % 4], parents=FORKED, version=step)
        for i in range(count)
    ]
    single = [
        make_record(step * 12 + i, "cw"[i % 2], parents=SINGLE, version=step) for i in range(count)
    ]
    is_forked = [step % 2 == 1 and measures(i, 12) for i in range(count)]
    return [forked[i] if is_forked[i] else single[i] for i in range(count)]


def test_where_the_shape_adapts_each_look_is_at_the_trees_that_were_grown_for_it(
    path: str, tmp_path: Path
) -> None:
    learner = make_learner(adaptive(path))
    results = [learner.update(batch(step)) for step in range(5)]
    assert [result.chosen is not None for result in results] == [False, True, False, True, False]
    [estimate] = learner.forks.estimates
    assert len(estimate.samples) == 16, "of two steps, without their single answers"
    assert results[3].chosen == learner.forks.choice == choice_by([estimate], 2)
    assert (results[1].chosen_before, results[3].chosen_before) == (None, results[1].chosen)
    chosen = results[3].chosen
    assert chosen is not None
    shown = [results[3].metrics[f"tree/next_children_depth_{depth}"] for depth in (0, 1)]
    assert tuple(shown) == chosen.num_children
    assert "tree/next_children_depth_1" not in results[4].metrics
    answers = [result.stats.metrics(0)["tree/answers"] for result in results]
    assert answers == pytest.approx([1, 5 / 3, 1, 5 / 3, 1])

    learner.write(tmp_path)
    resumed = make_learner(adaptive(path), tmp_path)
    assert (resumed.step, resumed.forks.choice) == (5, chosen)
    ours, theirs = (each.update(batch(5)) for each in (learner, resumed))
    assert ours.chosen == theirs.chosen is not None and ours.metrics == theirs.metrics


def test_steps_that_move_nothing_count_between_looks_and_a_look_that_fails_chooses_nothing(
    path: str, tmp_path: Path
) -> None:
    learner = make_learner(adaptive(path))
    learner.update(batch(0))
    errored = [make_record(12 + i, "ee", parents=FORKED, version=1) for i in range(12)]
    failed = learner.update(errored)
    assert (failed.has_updated, failed.chosen, learner.forks.estimates) == (False, None, ())
    assert (learner.version, learner.step) == (1, 2)
    learner.write(tmp_path)
    state = tmp_path / "learner.json"
    counts = json.loads(state.read_text())
    assert counts.pop("step") == 2
    state.write_text(json.dumps(counts))
    assert make_learner(adaptive(path), tmp_path).step == 1, "the updates, in older checkpoints"
    records = [replace(each, ticket=each.ticket + 24) for each in batch(1)]
    assert learner.update(records).chosen is None, "step 2 is none that measures"
    assert learner.update([replace(each, ticket=each.ticket + 24) for each in records]).chosen


def test_looks_without_any_gradient_choose_single_answers_and_have_no_metrics(path: str) -> None:
    """RAFT's gradients are 0 where nothing is right; with a fork that pays before, what is chosen
    has to follow."""
    config = adaptive(path)
    config = replace(config, learner=replace(config.learner, advantage=AdvantageForm.REWARD))
    learner = make_learner(config)
    wrong = [
        make_record(place, "ww", parents=FORKED, version=0) for place in range(12) if place % 3 < 2
    ]
    learner.update(batch(0))
    result = learner.update(wrong)
    [estimate] = learner.forks.estimates
    assert not estimate.has_gradients
    assert result.chosen is not None and result.chosen.num_children == (1, 1)
    assert not [name for name in result.metrics if name.startswith("fork/")]


def test_single_answers_and_trees_of_one_batch_have_the_advantages_that_each_has_alone(
    path: str,
) -> None:
    learner = make_learner(adaptive(path))
    for step in range(2):
        learner.update(batch(step))
    together = [*batch(4, count=2), *batch(5)[2:4]]
    trained, stats = learner.prepare(together)
    alone = [learner.prepare([record])[0].advantages[0] for record in together]
    for own, expected in zip(trained.advantages, alone, strict=True):
        np.testing.assert_array_equal(own, expected)
    root = learner.baseline.root
    assert 0 < root < 1
    for own, reward in zip(trained.advantages, (1.0, 0.0), strict=False):
        np.testing.assert_allclose(own, [reward - root] * 2)
    assert stats.num_leaves == 6


def test_what_cannot_be_measured_is_not(path: str) -> None:
    never = make_learner(make_config(path, replace(FREE, fork_every=0)))
    assert not never.forks.is_due(7)
    config = make_config(path, FREE)
    flat = make_learner(
        replace(config, tree=replace(config.tree, num_children=(4,), step_tokens=(10,)))
    )
    assert not flat.forks.is_due(7), "whole answers fork at the prompt alone"
    alone = make_learner(replace(config, tree=replace(config.tree, num_children=(4, 1))))
    assert not any(alone.forks.is_due(step) for step in range(9)), "no first step has forks"
    learner = make_learner(config)
    learner.update(mixed())
    errored = [make_record(4 + i, "ecwcw", version=1) for i in range(4)]
    assert "fork/gain_depth_1" not in learner.update(errored).metrics
    assert learner.forks.estimates == ()


@pytest.mark.parametrize("share", [slice(0, 40), slice(0, 20), slice(20, 40)])
def test_of_many_trees_a_quarter_of_the_learner_step_is_measured_by_whichever_worker_has_it(
    path: str, share: slice
) -> None:
    config = make_config(path, FREE)
    learner = make_learner(replace(config, gate=replace(config.gate, trees_per_step=40)))
    learner.update(mixed())
    records = [make_record(40 + i, "cwwcw", version=1) for i in range(40)]
    learner.update(records[share][::-1])
    [estimate] = learner.forks.estimates
    own = [record for record in records[share] if record.ticket % 4 == 0]
    tokens = [record.tree.path_lengths[[0, 1, 2]].mean() for record in own]
    np.testing.assert_allclose(estimate.samples.before, tokens)


def test_projections_leave_products_unbiased_and_are_the_same_for_all_workers() -> None:
    rng = np.random.default_rng(0)
    hidden = 3 * WIDTH
    pulls, states = (torch.from_numpy(rng.normal(size=(2, hidden))).float() for _ in range(2))
    pulls[1] += pulls[0]
    states[1] += states[0]
    products = []
    for seed in range(200):
        one, again = (Projection.of(hidden, seed, CPU) for _ in range(2))
        assert torch.equal(one.of_pull, again.of_pull)
        assert not torch.equal(one.of_pull, one.of_state)
        left, right = pulls @ one.of_pull, states @ one.of_state
        products.append(float((left[0] @ left[1]) * (right[0] @ right[1])))
    exact = float((pulls[0] @ pulls[1]) * (states[0] @ states[1]))
    error = np.std(products) / 200**0.5
    assert error < 0.05 * exact
    assert abs(np.mean(products) - exact) < 3 * error
