import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.algo.trees import make_tree, on_leaves, rewards, trees
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import GroupState, StepGroup, step_groups
from treerpo_ray.algo.tree import ROOT, Tree


def group_of(*values: float) -> StepGroup:
    children = tuple(range(len(values)))
    return StepGroup(parent=ROOT, children=children, values=np.array(values))


def test_groups_of_a_tree_by_hand_come_in_the_order_of_their_parents() -> None:
    tree = make_tree([-1, -1, 1, 1, 0, 0])  # step 1 was expanded before step 0
    groups = step_groups(tree, mean_backup(tree, on_leaves(tree, [1.0, 0.0, 1.0, 1.0])))
    assert [group.parent for group in groups] == [ROOT, 0, 1]
    assert [group.children for group in groups] == [(0, 1), (4, 5), (2, 3)]
    assert [group.values.tolist() for group in groups] == [[1.0, 0.5], [1.0, 1.0], [1.0, 0.0]]


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
    assert group_of(*values).state(threshold=0.1) is state


def test_a_threshold_of_zero_prunes_only_unanimous_groups() -> None:
    assert group_of(0.5, 0.5).state(0.0) is GroupState.PRUNED
    assert group_of(0.5, 0.5 + 1e-9).state(0.0) is GroupState.KEPT


def test_a_negative_threshold_prunes_nothing_and_still_leaves_errors_out() -> None:
    assert group_of(0.5, 0.5).state(-1.0) is GroupState.KEPT
    assert group_of(0.5, float("nan")).state(-1.0) is GroupState.ERRORED


@given(tree=trees(), data=st.data())
def test_every_step_is_in_one_group_with_its_own_value(tree: Tree, data: st.DataObject) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    groups = step_groups(tree, values)
    members = [child for group in groups for child in group.children]
    assert sorted(members) == list(range(len(tree.steps)))
    for group in groups:
        assert {tree.steps[child].parent for child in group.children} == {group.parent}
        np.testing.assert_array_equal(group.values, values.steps[list(group.children)])


@given(tree=trees(), data=st.data())
def test_a_group_is_errored_iff_its_parent_has_no_value(tree: Tree, data: st.DataObject) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    parent_values = np.append(values.steps, values.root)
    for group in step_groups(tree, values):
        is_errored = group.state(0.1) is GroupState.ERRORED
        assert is_errored == np.isnan(parent_values[group.parent])
