import numpy as np
import pytest
from hypothesis import given

from tests.support.learning.trees import full_tree, make_step, make_tree, trees
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree

PARENTS = [-1, -1, 0, 0, 3]
"""prompt -> 0, 1;  0 -> 2, 3;  3 -> 4"""


def test_children_leaves_depths_and_paths_of_a_tree_by_hand() -> None:
    tree = make_tree(PARENTS, lengths=[1, 2, 1, 2, 1], prompt_length=2)
    assert tree.children == {ROOT: (0, 1), 0: (2, 3), 3: (4,)}
    assert tree.leaves == (1, 2, 4)
    assert tree.depths == (1, 1, 2, 2, 3)
    assert tree.path(4) == (0, 3, 4)
    assert tree.path(ROOT) == ()
    assert tree.path_token_ids(4) == [2, 6, 7, 8]
    assert tree.num_sampled_tokens == 7


def test_the_paper_tree_has_584_steps_and_512_leaves() -> None:
    tree = full_tree(branching=8, depth=3, step_length=1)
    assert (len(tree.steps), len(tree.leaves), len(tree.children)) == (584, 512, 73)


def test_versions_of_a_tree_span_those_of_its_tokens() -> None:
    ids = np.zeros(2, np.int32)
    logprobs = np.zeros(2, np.float32)
    steps = tuple(
        Step(
            parent=ROOT,
            token_ids=ids,
            logprobs=logprobs,
            versions=np.array(versions, np.int32),
            stop=StopReason.END_OF_TEXT,
        )
        for versions in ([3, 4], [2, 2])
    )
    tree = Tree.from_steps(ids, steps)
    assert (tree.min_version, tree.max_version) == (2, 4)


@pytest.mark.parametrize("parents", [[0], [-2], [-1, 2, 0], [-1, 1]])
def test_a_parent_that_does_not_come_first_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="parents come first"):
        make_tree(parents)


def test_a_step_whose_streams_differ_in_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2, 1 and 2"):
        Step(
            parent=ROOT,
            token_ids=np.zeros(2, np.int32),
            logprobs=np.zeros(1, np.float32),
            versions=np.zeros(2, np.int32),
            stop=StopReason.BOUNDARY,
        )


def test_a_tree_without_steps_has_no_leaves_and_no_tokens() -> None:
    tree = make_tree([])
    assert (tree.leaves, tree.children, tree.num_sampled_tokens) == ((), {}, 0)


def test_make_step_gives_logprobs_that_follow_from_the_tokens() -> None:
    step = make_step(ROOT, np.array([0, 512], np.int32))
    assert step.logprobs.tolist() == [0.0, -0.5]


@given(tree=trees())
def test_a_path_climbs_by_parents_and_is_as_long_as_the_step_is_deep(tree: Tree) -> None:
    for index, depth in enumerate(tree.depths):
        path = tree.path(index)
        assert len(path) == depth
        assert path[-1] == index
        assert [tree.steps[i].parent for i in path] == [ROOT, *path[:-1]]


@given(tree=trees())
def test_every_step_is_the_child_of_one_parent_and_leaves_are_those_without_any(tree: Tree) -> None:
    children = [child for group in tree.children.values() for child in group]
    assert sorted(children) == list(range(len(tree.steps)))
    assert set(tree.leaves).isdisjoint(tree.children)
    assert len(tree.leaves) + len(tree.children) - 1 == len(tree.steps)
