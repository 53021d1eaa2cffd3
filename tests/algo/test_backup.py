import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.trees import full_tree, make_tree, on_leaves, rewards, shuffled, trees
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.tree import ROOT, Tree

NAN = float("nan")


def test_values_of_a_tree_by_hand() -> None:
    tree = make_tree([-1, -1, 0, 0, 2, 2, 2, 2])
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    assert values.steps.tolist() == [0.125, 1.0, 0.25, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert values.root == 0.5625


def test_an_early_leaf_counts_as_much_as_a_sibling_with_many_leaves() -> None:
    tree = make_tree([-1, -1, 0, 0, 0, 0])
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0, 0.0, 0.0, 0.0]))
    assert values.root == 0.5  # the mean over leaves would be 0.2


def test_a_chain_hands_its_only_reward_up_to_the_root() -> None:
    tree = make_tree([-1, 0, 1, 2])
    values = mean_backup(tree, on_leaves(tree, [0.25]))
    assert values.steps.tolist() == [0.25] * 4
    assert values.root == 0.25


def test_an_errored_leaf_makes_its_ancestors_nan_and_no_other_step() -> None:
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    values = mean_backup(tree, on_leaves(tree, [NAN, 1.0, 1.0, 0.0]))
    assert np.isnan(values.steps).tolist() == [True, False, True, False, False, False]
    assert values.steps[1] == 0.5
    assert math.isnan(values.root)


def test_a_prompt_without_steps_has_no_value() -> None:
    values = mean_backup(make_tree([]), np.empty(0))
    assert len(values.steps) == 0
    assert math.isnan(values.root)


def test_rewards_are_left_as_they_were() -> None:
    tree = make_tree([-1, 0, 0])
    given_rewards = on_leaves(tree, [0.0, 1.0])
    mean_backup(tree, given_rewards)
    assert np.isnan(given_rewards).tolist() == [True, False, False]


def test_a_reward_for_an_inner_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps \[0\] have children"):
        mean_backup(make_tree([-1, 0]), np.array([1.0, 1.0]))


def test_rewards_for_another_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rewards given for a tree of 2 steps"):
        mean_backup(make_tree([-1, -1]), np.zeros(3))


@given(st.data())
def test_the_root_of_a_full_tree_is_the_mean_over_leaves(data: st.DataObject) -> None:
    tree = full_tree(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), step_length=1)
    leaf_rewards = data.draw(rewards(tree))
    expected = leaf_rewards[list(tree.leaves)].mean()
    assert mean_backup(tree, leaf_rewards).root == pytest.approx(expected)


@given(tree=trees(), data=st.data())
def test_a_value_is_the_sum_over_leaves_of_reward_times_chance_of_reaching_them(
    tree: Tree, data: st.DataObject
) -> None:
    leaf_rewards = data.draw(rewards(tree))
    expected = 0.0
    for leaf in tree.leaves:
        chance = 1.0
        for index in tree.path(leaf):
            chance /= len(tree.children[tree.steps[index].parent])
        expected += chance * leaf_rewards[leaf]
    assert mean_backup(tree, leaf_rewards).root == pytest.approx(expected)


@given(tree=trees(), data=st.data())
def test_a_value_is_nan_iff_an_errored_leaf_lies_below(tree: Tree, data: st.DataObject) -> None:
    leaf_rewards = data.draw(rewards(tree, with_errors=True))
    above_error = {ROOT} if np.isnan(leaf_rewards[list(tree.leaves)]).any() else set()
    for leaf in tree.leaves:
        if np.isnan(leaf_rewards[leaf]):
            above_error |= set(tree.path(leaf))
    values = mean_backup(tree, leaf_rewards)
    assert set(np.flatnonzero(np.isnan(values.steps))) == above_error - {ROOT}
    assert math.isnan(values.root) == (ROOT in above_error)


@given(tree=trees(), data=st.data())
def test_shuffled_siblings_have_shuffled_values(tree: Tree, data: st.DataObject) -> None:
    leaf_rewards = data.draw(rewards(tree, with_errors=True))
    ranks = data.draw(st.permutations(range(len(tree.steps))))
    other, order = shuffled(tree, ranks)
    values = mean_backup(tree, leaf_rewards)
    other_values = mean_backup(other, leaf_rewards[order])
    np.testing.assert_allclose(other_values.steps, values.steps[order], rtol=1e-12)
    np.testing.assert_allclose(other_values.root, values.root, rtol=1e-12)
