"""Duplicates: counted by hand."""

from dataclasses import replace

import numpy as np

from tests.support.learning.trees import make_tree
from treerpo_ray.algo.duplicates import count_duplicates
from treerpo_ray.algo.tree import ROOT, StopReason, Tree, error_step


def tree_of(parents: list[int], texts: list[str]) -> Tree:
    """A tree whose steps have the characters of these texts as tokens."""
    steps = make_tree(parents, lengths=[len(text) for text in texts]).steps
    own = [
        replace(step, token_ids=np.array([*map(ord, text)], np.int32))
        for step, text in zip(steps, texts, strict=True)
    ]
    return Tree.from_steps(np.array([1], np.int32), own)


def test_siblings_with_the_same_tokens_are_duplicates_but_for_the_first() -> None:
    assert count_duplicates(tree_of([ROOT] * 4, ["a", "a", "b", "a"])) == (2, 3)
    assert count_duplicates(tree_of([ROOT] * 3, ["a", "aa", "b"])) == (0, 2)
    assert count_duplicates(tree_of([ROOT], ["a"])) == (0, 0)


def test_cousins_with_the_same_tokens_are_none() -> None:
    tree = tree_of([ROOT, ROOT, 0, 0, 1, 1], ["a", "b", "c", "d", "c", "c"])
    assert count_duplicates(tree) == (1, 1 + 1 + 1)


def test_steps_that_a_sampler_turned_down_are_not_counted() -> None:
    steps = [*tree_of([ROOT] * 2, ["a", "a"]).steps, error_step(), error_step()]
    tree = Tree.from_steps(np.array([1], np.int32), steps)
    assert tree.stops[2:] == (StopReason.ERROR,) * 2
    assert count_duplicates(tree) == (1, 1)
