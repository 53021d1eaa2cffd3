from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.trees import by_range, make_tree, on_leaves, rewards, trees
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import (
    GroupState,
    PruneRule,
    Pruning,
    StepGroups,
    count_duplicates,
    step_groups,
)
from treerpo_ray.algo.standard_errors import standard_error_of_mean
from treerpo_ray.algo.tree import ROOT, StopReason, Tree, error_step


def group_of(*values: float, errors: Sequence[float] = (), leaf_range: float = 1.0) -> StepGroups:
    return StepGroups(
        depth=1,
        parents=np.array([ROOT]),
        children=np.arange(len(values))[None],
        values=np.array([values]),
        standard_errors=np.array([errors or [0.0] * len(values)]),
        right_lengths=np.full((1, len(values)), np.nan),
        leaf_range=leaf_range,
    )


def test_groups_of_a_tree_by_hand_come_by_depth_and_in_the_order_of_their_parents() -> None:
    tree = make_tree([-1, -1, 1, 1, 0, 0])  # step 1 was expanded before step 0
    groups = step_groups(tree, mean_backup(tree, on_leaves(tree, [1.0, 0.0, 1.0, 1.0])))
    assert [group.depth for group in groups] == [1, 2]
    assert [group.parents.tolist() for group in groups] == [[ROOT], [0, 1]]
    assert [group.children.tolist() for group in groups] == [[[0, 1]], [[4, 5], [2, 3]]]
    assert [g.values.tolist() for g in groups] == [[[1.0, 0.5]], [[1.0, 1.0], [1.0, 0.0]]]


def test_groups_of_one_depth_that_differ_in_size_stand_apart() -> None:
    tree = make_tree([-1, -1, -1, 0, 0, 1, 2, 2])
    groups = step_groups(tree, mean_backup(tree, on_leaves(tree, [1.0, 0.0, 1.0, 1.0, 0.0])))
    found = [(group.depth, group.parents.tolist(), group.children.tolist()) for group in groups]
    assert found == [(1, [ROOT], [[0, 1, 2]]), (2, [1], [[5]]), (2, [0, 2], [[3, 4], [6, 7]])]


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ([0.0, 0.0, 1.0, 1.0], GroupState.KEPT),
        ([0.5, 0.625], GroupState.KEPT),
        ([0.49, 0.49, 0.51, 0.51], GroupState.PRUNED),
        ([0.0, 0.1], GroupState.PRUNED),  # the range must be above the threshold
        ([1.0, 1.0, 1.0], GroupState.PRUNED),
        ([0.7], GroupState.PRUNED),
        ([float("nan"), 0.0, 1.0], GroupState.ERRORED),
        ([float("nan"), float("nan")], GroupState.ERRORED),
    ],
)
def test_state_of_a_group_at_the_papers_threshold(values: list[float], state: GroupState) -> None:
    assert group_of(*values).states(by_range(0.1)) == [state]


def test_a_threshold_of_zero_prunes_only_unanimous_groups() -> None:
    assert group_of(0.5, 0.5).states(by_range(0.0)) == [GroupState.PRUNED]
    assert group_of(0.5, 0.5 + 1e-9).states(by_range(0.0)) == [GroupState.KEPT]


def test_a_negative_threshold_prunes_nothing_and_still_leaves_errors_out() -> None:
    assert group_of(0.5, 0.5).states(by_range(-1.0)) == [GroupState.KEPT]
    assert group_of(0.5, float("nan")).states(by_range(-1.0)) == [GroupState.ERRORED]


@given(tree=trees(), data=st.data())
def test_every_step_is_in_one_group_with_its_own_value(tree: Tree, data: st.DataObject) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    groups = step_groups(tree, values)
    members = [child for group in groups for child in group.children.flat]
    assert sorted(members) == list(range(len(tree.steps)))
    for group in groups:
        for parent, children in zip(group.parents, group.children, strict=True):
            assert tuple(children) == tree.children[parent]
        assert {tree.depths[child] for child in group.children.flat} == {group.depth}
        np.testing.assert_array_equal(group.values, values.steps[group.children])


@given(tree=trees(), data=st.data())
def test_a_group_is_errored_iff_its_parent_has_no_value(tree: Tree, data: st.DataObject) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    parent_values = np.append(values.steps, values.root)
    for group in step_groups(tree, values):
        is_errored = group.states(by_range(0.1)) == GroupState.ERRORED
        np.testing.assert_array_equal(is_errored, np.isnan(parent_values[group.parents]))


def test_the_range_of_the_tree_keeps_or_prunes_all_its_groups() -> None:
    tree = make_tree([-1, -1, 0, 0, 1, 1, -1])
    pruning = Pruning(rule=PruneRule.TREE_RANGE, threshold=0.0)
    nan = float("nan")
    for leaf_rewards, states in [
        ([1.0, 1.0, 1.0, 1.0, 0.0], ["kept", "kept", "kept"]),
        ([1.0, 1.0, 1.0, 1.0, 1.0], ["pruned", "pruned", "pruned"]),
        ([nan, 0.0, 1.0, 1.0, 1.0], ["errored", "errored", "kept"]),
        ([nan, 1.0, 1.0, 1.0, 1.0], ["errored", "errored", "pruned"]),
        ([nan] * 5, ["errored", "errored", "errored"]),
    ]:
        groups = step_groups(tree, mean_backup(tree, on_leaves(tree, leaf_rewards)))
        assert [state for group in groups for state in group.states(pruning)] == states


@pytest.mark.parametrize(
    ("group", "significance", "reliability"),
    [
        (group_of(0.5, 0.5, errors=[0.1, 0.1]), 0.0, 0.0),
        (group_of(0.25, 0.75, errors=[0.25, 0.25]), 2**0.5, 0.5),  # s^2 = 1/8
        (group_of(0.25, 0.75, errors=[0.5, 0.0]), 1.0, 0.0),
        (group_of(0.25, 0.75, errors=[0.5, 0.5]), 0.5**0.5, 0.0),
        (group_of(0.0, 0.0, 1.0, 1.0, errors=[0.1, 0.1, 0.3, 0.3]), (1 / 0.15) ** 0.5, 0.85),
        (group_of(0.0, 1.0), float("inf"), 1.0),
        (group_of(0.7), 0.0, 0.0),
    ],
)
def test_significance_and_reliability_by_hand(
    group: StepGroups, significance: float, reliability: float
) -> None:
    assert group.significance == pytest.approx(significance)
    assert group.reliability == pytest.approx(reliability)
    for rule, signal in [("significance", significance), ("shrinkage", reliability)]:
        below = Pruning(rule=PruneRule(rule), threshold=signal - 1e-6)
        above = Pruning(rule=PruneRule(rule), threshold=signal + 1e-6)
        assert group.states(above) == [GroupState.PRUNED]
        assert group.states(below) == [GroupState.KEPT] or signal == float("inf")
    assert group.weights(Pruning(rule=PruneRule.SHRINKAGE, threshold=0)) == group.reliability
    assert group.weights(Pruning(rule=PruneRule.SIGNIFICANCE, threshold=0)) == [1]


@pytest.mark.parametrize("rule", PruneRule)
def test_every_rule_leaves_errors_out_and_prunes_nothing_below_zero(rule: PruneRule) -> None:
    pruning = Pruning(rule=rule, threshold=-1.0)
    assert group_of(0.5, 0.5, leaf_range=0.0).states(pruning) == [GroupState.KEPT]
    nan = float("nan")
    assert group_of(0.5, nan, errors=[0.0, nan]).states(pruning) == [GroupState.ERRORED]


def test_children_that_are_equally_good_have_a_significance_of_one() -> None:
    """Sixteen children, each the mean of eight leaves that are right with probability 1/2."""
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(400):
        leaves = rng.integers(0, 2, (16, 8)).astype(float)
        errors = standard_error_of_mean(leaves)
        squares.append(group_of(*leaves.mean(1), errors=errors.tolist()).significance[0] ** 2)
    assert np.mean(squares) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("num_children", [4, 8])
def test_a_difference_is_off_by_its_standard_error(num_children: int) -> None:
    """Children of a value around 0.4, each estimated by eight leaves of its own.

    Of fewer children more are equal by chance, and have an error on the safe side.
    """
    rng = np.random.default_rng(num_children)
    off, claimed = [], []
    for _ in range(1500):
        true = rng.beta(2, 3, num_children)
        leaves = (rng.random((num_children, 8)) < true[:, None]).astype(float)
        errors = standard_error_of_mean(leaves)
        group = group_of(*leaves.mean(1), errors=errors.tolist())
        found = group.values - group.values.mean()
        off.append((found - (1 - 1 / num_children) * (true - 0.4)) ** 2)
        claimed.append(group.difference_errors**2)
    assert np.sqrt(np.mean(claimed) / np.mean(off)) == pytest.approx(1.0, abs=0.04)


# Duplicates ------------------------------------------------------------------------------------


def tree_of_texts(parents: list[int], texts: list[str]) -> Tree:
    """A tree whose steps have the characters of these texts as tokens."""
    steps = make_tree(parents, lengths=[len(text) for text in texts]).steps
    own = [
        replace(step, token_ids=np.array([*map(ord, text)], np.int32))
        for step, text in zip(steps, texts, strict=True)
    ]
    return Tree.from_steps(np.array([1], np.int32), own)


def test_siblings_with_the_same_tokens_are_duplicates_but_for_the_first() -> None:
    assert count_duplicates(tree_of_texts([ROOT] * 4, ["a", "a", "b", "a"])) == (2, 3)
    assert count_duplicates(tree_of_texts([ROOT] * 3, ["a", "aa", "b"])) == (0, 2)
    assert count_duplicates(tree_of_texts([ROOT], ["a"])) == (0, 0)


@given(data=st.data())
def test_duplicates_are_what_a_set_of_all_texts_tells(data: st.DataObject) -> None:
    """Also of those that begin and end alike, and of those without tokens."""
    texts = st.lists(st.text("ab", max_size=4), min_size=1, max_size=8)
    own, below = data.draw(texts), data.draw(texts)
    parents = [ROOT] * len(own) + [data.draw(st.integers(0, len(own) - 1)) for _ in below]
    parents[len(own) :] = sorted(parents[len(own) :])
    both = [*zip(parents, own + below, strict=True)]
    expected = len(both) - len(set(both)), len(both) - len(set(parents))
    assert count_duplicates(tree_of_texts(parents, own + below)) == expected


def test_cousins_with_the_same_tokens_are_none() -> None:
    tree = tree_of_texts([ROOT, ROOT, 0, 0, 1, 1], ["a", "b", "c", "d", "c", "c"])
    assert count_duplicates(tree) == (1, 1 + 1 + 1)


def test_steps_that_a_sampler_turned_down_are_not_counted() -> None:
    steps = [*tree_of_texts([ROOT] * 2, ["a", "a"]).steps, error_step(), error_step()]
    tree = Tree.from_steps(np.array([1], np.int32), steps)
    assert tree.stops[2:] == (StopReason.ERROR,) * 2
    assert count_duplicates(tree) == (1, 1)
