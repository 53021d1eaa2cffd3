"""Batch statistics: counts by hand, and workers' parts that add up to the whole batch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.learning.trees import by_range, make_tree, trees
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import AdvantageForm, step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import step_groups
from treerpo_ray.algo.tree import ROOT, StopReason, Tree
from treerpo_ray.learner.stats import BatchStats, Sums, count
from treerpo_ray.metrics.rows import BY_SET
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Grade, Verdict

C, W, E = Verdict.CORRECT, Verdict.WRONG, Verdict.ERRORED
PARENTS = [ROOT, ROOT, 0, 0, 1, 1]
"""Two children of the prompt, two below each: step groups (0, 1), (2, 3) and (4, 5)."""


def record(
    tree: Tree,
    *verdicts: Verdict,
    version: int = 0,
    attempt: int = 0,
    finished_at_s: float = 0.0,
    scored_at_s: float = 0.0,
) -> TreeRecord:
    steps = tuple(
        replace(step, versions=np.full(len(step.token_ids), version, np.int32))
        for step in tree.steps
    )
    return TreeRecord(
        ticket=0,
        attempt=attempt,
        prompt_id="0",
        question="",
        answers=(),
        seed=0,
        engine=0,
        grow_s=0.0,
        finished_at_s=finished_at_s,
        scored_at_s=scored_at_s,
        tree=Tree.from_steps(tree.prompt_ids, steps),
        leaf_texts=("",) * len(tree.leaves),
        verdicts=verdicts,
    )


def stats_of(records: list[TreeRecord]) -> tuple[list[np.ndarray], BatchStats]:
    """Advantages of the trees, and the sum of their statistics."""
    advantages, total = [], BatchStats()
    for each in records:
        values = mean_backup(each.tree, each.rewards)
        rules = {"form": AdvantageForm.DIFFERENCE, "pruning": by_range(0.1)}
        advantages.append(step_advantages(each.tree, values, **rules))
        total += count(
            each,
            values,
            step_groups(each.tree, values),
            errors=advantage_errors(each.tree, values, **rules),
            pruning=rules["pruning"],
        )
    return advantages, total


def test_partial_credit_is_counted_by_hand() -> None:
    """Rewards 1/2 and 0 below the one step, 1 and 1/4 below the other: 1/4 and 5/8, mean 7/16."""
    grades = [
        Grade(Verdict.PARTIAL, 0.5),
        Grade(W, 0.0),
        Grade(C, 1.0),
        Grade(Verdict.PARTIAL, 0.25),
    ]
    _, stats = stats_of([record(make_tree(PARENTS), C, C, C, C).graded(grades)])
    assert (stats.value_sum, stats.num_with_correct) == (7 / 16, 1)
    metrics = stats.metrics(0)
    assert (metrics["verdict/partial"], metrics["verdict/correct"]) == (2, 1)
    # Of leaves that differ it is sqrt(N) whatever their rewards.
    assert metrics["groups/signal_to_noise_depth_2"] == pytest.approx(2**0.5)


def test_the_mean_reward_by_data_set_is_over_its_trees_that_have_one() -> None:
    """Of `a` values 3/4 and 1/4, of `a/b` 1; one of `b` has no verdict, and `c` has no tree."""
    ids = {"a/1": (C, C, C, W), "a/2": (C, W, W, W), "a/b/1": (C, C, C, C), "b/1": (C, E, C, C)}
    total = BatchStats()
    for name, verdicts in ids.items():
        each = replace(record(make_tree([ROOT] * 4), *verdicts), prompt_id=name)
        values = mean_backup(each.tree, each.rewards)
        rules = {"errors": np.full(len(each.tree), np.nan), "pruning": by_range(0.1)}
        groups = step_groups(each.tree, values)
        assert not count(each, values, groups, **rules).valued  # not told where there is one set
        total += count(each, values, groups, **rules, sets=("a", "a/b", "b", "c"))
    shown = {name: value for name, value in total.metrics(0).items() if name.startswith(BY_SET)}
    assert shown == {f"{BY_SET}a": 1 / 2, f"{BY_SET}a/b": 1.0}
    assert total.metrics(0)["reward/mean"] == pytest.approx(2 / 3)


def turned_down() -> TreeRecord:
    """A tree of which the engine turned every request down."""
    tree = make_tree([ROOT, ROOT], lengths=[0, 0])
    steps = tuple(replace(step, stop=StopReason.ERROR) for step in tree.steps)
    return record(Tree.from_steps(tree.prompt_ids, steps), E, E)


def test_the_statistics_of_a_tree_by_hand() -> None:
    tree = make_tree(PARENTS, lengths=[3, 2, 5, 1, 4, 4])
    graded = record(tree, C, W, W, W, version=4, attempt=2, finished_at_s=9, scored_at_s=10)
    graded = replace(graded, ticket=7)
    advantages, stats = stats_of([graded])
    np.testing.assert_allclose(advantages[0], [0.25, -0.25, 0.5, -0.5, np.nan, np.nan])
    # The children of step 0 have S^2 = 1/4, step 1's, of equal values, 5/36; the prompt's, of
    # values 1/2 and 0, have S^2 = 1/16. A child has the variance (e^2 / 2 + S^2) / 2.
    assert stats.group_sums == pytest.approx(
        {
            "value_se": 1 / 2 + 5**0.5 / 6 + 1 / 4,
            "signal_depth_1": 1 / 8,
            "noise_depth_1": (1 / 8 + 1 / 16) / 2 + (5 / 72 + 1 / 16) / 2,
            "signal_depth_2": 1 / 2,
            "noise_depth_2": 2 * 1 / 8 + 2 * 5 / 72,
            "advantage_se": (3 / 32) ** 0.5 + (19 / 288) ** 0.5 + 2 * (1 / 8) ** 0.5,
            "num_advantage_se": 4,
        }
    )
    # Each child is foretold by its sibling: the values 1/2 and 0, the rewards 1 and 0, and 0 and 0.
    assert stats.calibration == {
        **{"count_0": 4, "predicted_0": 0, "came_0": 3 / 2},
        **{"count_5": 1, "predicted_5": 1 / 2, "came_5": 0},
        **{"count_9": 1, "predicted_9": 1, "came_9": 0},
    }
    assert replace(stats, group_sums=Sums(), calibration=Sums()) == BatchStats(
        num_trees=1,
        num_valued=1,
        value_sum=0.25,
        num_with_correct=1,
        groups=Counter(
            {"kept": 2, "pruned": 1, "kept_depth_1": 1, "kept_depth_2": 1, "pruned_depth_2": 1}
        ),
        verdicts=Counter({C: 1, W: 3}),
        num_sampled_tokens=19,
        answer_tokens=8 + 4 + 6 + 6,
        right_tokens=8,
        num_leaves=4,
        num_versioned=1,
        min_version=4,
        max_version=4,
        version_sum=4,
        last_finished_s=9,
        last_scored_s=10,
        num_moved=2,
        num_later_siblings=3,
    )


def test_an_errored_leaf_leaves_out_its_groups_up_to_the_prompt_and_no_others() -> None:
    advantages, stats = stats_of([record(make_tree(PARENTS), C, W, E, W)])
    nan = np.nan
    np.testing.assert_allclose(advantages[0], [nan, nan, 0.5, -0.5, nan, nan])
    assert dict(stats.groups) == {
        "kept": 1,
        "kept_depth_2": 1,
        "errored": 2,
        "errored_depth_1": 1,
        "errored_depth_2": 1,
    }
    assert (stats.num_valued, stats.value_sum, stats.num_with_correct) == (0, 0.0, 1)


def test_the_metrics_of_a_batch_by_hand() -> None:
    batch = [
        record(make_tree(PARENTS, lengths=[3, 2, 5, 1, 4, 4]), C, W, W, W, version=4, attempt=2),
        record(make_tree([ROOT, ROOT]), C, C, version=6, attempt=1),
        record(make_tree([ROOT, ROOT]), Verdict.CUT_OFF, E, version=5),
        record(make_tree([ROOT, ROOT]), W, Verdict.TIMED_OUT, version=6),
    ]
    _, stats = stats_of(batch)
    metrics = stats.metrics(version=6)
    expected = {
        "reward/mean": (0.25 + 1.0) / 2,
        "reward/any": 2 / 4,
        "groups/kept": 2,
        "groups/pruned": 2,
        "groups/errored": 2,
        "groups/kept_share": 2 / 6,
        "groups/kept_depth_1": 1,
        "groups/kept_depth_2": 1,
        "groups/pruned_depth_1": 1,
        "groups/pruned_depth_2": 1,
        "groups/errored_depth_1": 2,
        "groups/errored_depth_2": 0,
        "groups/value_se": (1 / 2 + 5**0.5 / 6 + 1 / 4 + 5**0.5 / 6) / 4,
        "groups/advantage_se": ((3 / 32) ** 0.5 + (19 / 288) ** 0.5 + 2 * (1 / 8) ** 0.5) / 4,
        "groups/signal_to_noise_depth_1": (
            (1 / 8) / ((1 / 8 + 1 / 16) / 2 + (5 / 72 + 1 / 16) / 2 + 2 * 5 / 72)
        )
        ** 0.5,
        "groups/signal_to_noise_depth_2": ((1 / 2) / (2 * 1 / 8 + 2 * 5 / 72)) ** 0.5,
        "verdict/correct": 3,
        "verdict/partial": 0,
        "verdict/wrong": 4,
        "verdict/unanswered": 0,
        "verdict/cut_off": 1,
        "verdict/timed_out": 1,
        "verdict/errored": 1,
        "verdict/error_share": 2 / 10,
        # The first tree is foretold as above, the second has a 1 for each 1.
        "values/calibration_error": (3 / 2 + 1 / 2 + 1) / 8,
        "values/num_predictions": 8,
        "groups/duplicate_share": 0,
        "tree/answers": 10 / 4,
        "tokens/sampled": 19 + 12,
        "length/mean": (24 + 12) / 10,
        "length/right_mean": (8 + 2 + 2) / 3,
        "length/cut_off_share": 1 / 10,
        "staleness/max": 2,
        "staleness/mean": (2 + 0 + 1 + 0) / 4,
        "gate/redraws": 0,
        "engine/moved_trees": 3,
    }
    assert metrics == pytest.approx(expected)


def test_duplicates_are_a_share_of_the_steps_that_have_an_earlier_sibling() -> None:
    plain = record(make_tree([ROOT] * 3), C, W, W)
    first, second, third = plain.tree.steps
    alike = Tree.from_steps(plain.tree.prompt_ids, [first, second, replace(first)])
    _, stats = stats_of([plain, replace(plain, tree=alike)])
    assert not np.array_equal(first.token_ids, third.token_ids)
    assert stats.metrics(0)["groups/duplicate_share"] == 1 / 4


def test_a_batch_in_which_nothing_is_foretold_has_no_calibration() -> None:
    _, stats = stats_of([record(make_tree([ROOT]), C), turned_down()])
    assert not any(name.startswith("values/") for name in stats.metrics(0))


def test_a_batch_without_an_advantage_has_no_standard_error_of_one() -> None:
    _, stats = stats_of([record(make_tree(PARENTS), W, W, W, W)])
    assert "groups/advantage_se" not in stats.metrics(version=0)
    assert "length/right_mean" not in stats.metrics(version=0), "nor has it a right answer"


def test_a_tree_without_any_token_has_no_version_and_counts_as_neither_old_nor_valued() -> None:
    _, stats = stats_of([turned_down(), record(make_tree([ROOT]), C, version=7)])
    metrics = stats.metrics(version=8)
    assert (metrics["staleness/max"], metrics["staleness/mean"]) == (1, 1)
    assert (stats.num_trees, stats.num_valued, stats.num_versioned) == (2, 1, 1)
    _, alone = stats_of([turned_down()])
    assert alone.max_version < 0 and alone.min_version > 8
    assert (alone.metrics(8)["staleness/max"], alone.metrics(8)["staleness/mean"]) == (0, 0)


def test_a_batch_with_a_tree_newer_than_the_learner_shows_it() -> None:
    trees = [record(make_tree([ROOT]), C, version=version) for version in (5, 7)]
    _, stats = stats_of(trees)
    assert (stats.min_version, stats.max_version) == (5, 7)
    assert stats.metrics(version=4)["staleness/max"] == -1


@st.composite
def scored(draw: st.DrawFn) -> TreeRecord:
    tree = draw(trees(max_groups=3))
    size = len(tree.leaves)
    zero_one = [verdict for verdict in Verdict if verdict is not Verdict.PARTIAL]
    verdicts = draw(st.lists(st.sampled_from(zero_one), min_size=size, max_size=size))
    return record(
        tree,
        *verdicts,
        version=draw(st.integers(0, 9)),
        attempt=draw(st.integers(0, 2)),
        finished_at_s=draw(st.integers(0, 9)),
        scored_at_s=draw(st.integers(0, 9)),
    )


@settings(max_examples=30)
@given(batch=st.lists(scored(), max_size=5), cut=st.integers(0, 5))
def test_the_parts_of_a_batch_add_up_to_its_statistics_and_share_its_advantages(
    batch: list[TreeRecord], cut: int
) -> None:
    advantages, whole = stats_of(batch)
    first, second = stats_of(batch[:cut]), stats_of(batch[cut:])
    for part, expected in zip(first[0] + second[0], advantages, strict=True):
        np.testing.assert_array_equal(part, expected)
    summed = first[1] + second[1]
    assert summed.value_sum == pytest.approx(whole.value_sum)
    assert summed.group_sums == pytest.approx(whole.group_sums)
    assert summed.calibration == pytest.approx(whole.calibration)
    rounded = {"value_sum": 0.0, "group_sums": Sums(), "calibration": Sums()}
    assert replace(summed, **rounded) == replace(whole, **rounded)
    assert summed.metrics(9) == pytest.approx(whole.metrics(9))


def test_adding_nothing_changes_nothing() -> None:
    _, stats = stats_of([record(make_tree(PARENTS), C, W, W, W, version=3, finished_at_s=5)])
    assert stats + BatchStats() == BatchStats() + stats == stats
