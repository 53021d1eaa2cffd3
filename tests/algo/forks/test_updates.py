"""Shares of updates by hand, against the fork rule where that holds, and by simulation."""

import numpy as np
import pytest

from tests.support.learning.trees import make_tree
from treerpo_ray.algo.forks.rule import Fork
from treerpo_ray.algo.forks.updates import (
    TreeUpdates,
    first_children,
    part_of,
    update_share,
)
from treerpo_ray.algo.tree import ROOT


def of_gradients(gradients: np.ndarray, tokens: float) -> TreeUpdates:
    """Trees of equally many tokens."""
    return TreeUpdates(
        means=gradients,
        squares=(gradients**2).sum(-1),
        tokens=np.full(len(gradients), float(tokens)),
    )


def test_the_share_is_tokens_and_noise_over_signal_by_hand() -> None:
    """The example of `update_share`: products 2, 6 and 3 against 2, 4 and 8."""
    trees = of_gradients(np.array([[2.0], [1.0], [3.0]]), 20)
    singles = of_gradients(np.array([[1.0], [2.0], [4.0]]), 10)
    assert trees.cost == pytest.approx(20 * (14 / 3 - 11 / 3) / (11 / 3))
    assert singles.cost == pytest.approx(10 * (21 / 3 - 14 / 3) / (14 / 3))
    share = update_share(trees, singles)
    assert share is not None and share.value == pytest.approx(12 / 11)


def test_the_error_is_that_of_leaving_out_each_tree() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(1.0, 1.0, (2, 12, 3))
    tokens = rng.integers(10, 20, (2, 12)).astype(float)

    def updates(which: int, left: np.ndarray) -> TreeUpdates:
        own = gradients[which][left]
        return TreeUpdates(means=own, squares=(own**2).sum(-1) + 0.5, tokens=tokens[which][left])

    everything = np.arange(12)
    share = update_share(updates(0, everything), updates(1, everything))
    without = []
    for tree in range(12):
        left = everything[everything != tree]
        without.append(updates(0, left).cost / updates(1, left).cost)
    assert share is not None
    assert share.error == pytest.approx((11 / 12 * 12 * np.var(without)) ** 0.5)


def test_where_all_answers_are_as_useful_it_is_the_fork_rule() -> None:
    """Prefixes of variance 2, of which each answer adds variance 9, in trees of the mean over four:
    12 + 4 * 3 tokens against 12 + 3."""
    rng = np.random.default_rng(1)
    dimensions = 3
    prefixes = rng.normal(0.5, (2 / dimensions) ** 0.5, (20_000, 1, dimensions))
    answers = prefixes + rng.normal(0.0, (9 / dimensions) ** 0.5, (20_000, 4, dimensions))
    trees = of_gradients(answers.mean(1), 24)
    singles = TreeUpdates(
        means=answers.mean(1),
        squares=(answers**2).sum(-1).mean(1),
        tokens=np.full(len(answers), 15.0),
    )
    share = update_share(trees, singles)
    rule = Fork(within=9.0, between=2.0, before=12.0, after=3.0).token_share(4)
    assert share is not None
    assert share.value == pytest.approx(rule, abs=3 * share.error) and share.error < 0.01


@pytest.mark.parametrize(("alike", "share"), [(1.0, 0.8), (0.0, 10 / 17)])
def test_what_continuations_weigh_counts_as_noise_and_as_signal(alike: float, share: float) -> None:
    """A prefix and each of its four continuations have a mean gradient of length 1, in directions
    that are the same or at a right angle, and noise of variance 10, all independent. Single answers
    add up one of each, trees the prefix and all four, which are 10 + 4 * 5 tokens against 15.

    Alike: (30 * 50 / 25) / (15 * 20 / 4); at a right angle (30 * 50 / 17) / (15 * 20 / 2)."""
    rng = np.random.default_rng(2)
    count, noise = 4000, (10 / 2) ** 0.5
    ahead = np.array([1.0, 0.0])
    behind = np.array([alike, (1 - alike**2) ** 0.5])
    prefix = ahead + rng.normal(0, noise, (count, 2))
    continuations = behind + rng.normal(0, noise, (count, 4, 2))
    answers = prefix[:, None] + continuations
    singles = TreeUpdates(
        means=answers.mean(1),
        squares=(answers**2).sum(-1).mean(1),
        tokens=np.full(count, 15.0),
    )
    found = update_share(of_gradients(prefix + continuations.sum(1), 30), singles)
    assert found is not None
    assert found.value == pytest.approx(share, abs=3 * found.error) and found.error < 0.1


def test_without_a_signal_or_without_noise_nothing_is_said() -> None:
    against = of_gradients(np.array([[1.0], [-1.0], [1.0], [-1.0]]), 10)
    along = of_gradients(np.array([[1.0], [2.0], [1.0], [2.0]]), 10)
    assert against.cost == np.inf
    assert update_share(against, along) is None
    assert update_share(along, against) is None
    same = of_gradients(np.ones((4, 1)), 10)
    assert same.cost == 0 and update_share(same, along) is update_share(along, same) is None
    two = of_gradients(np.array([[1.0], [2.0]]), 10)
    assert update_share(two, two) is None


def test_of_a_tree_the_first_children_are_kept_and_what_is_below_them() -> None:
    """Two first steps with three children each, of which the second of the first one goes on."""
    tree = make_tree([ROOT, 0, 0, 0, 2, ROOT, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert first_children(tree, (2, 3, 1)) == list(range(9))
    assert first_children(tree, (2, 2, 1)) == [0, 1, 2, 4, 5, 6, 7]
    assert first_children(tree, (1, 1, 1)) == [0, 1]
    part = part_of(tree, [0, 1, 2, 4, 5, 6, 7])
    assert part.parents.tolist() == [ROOT, 0, 0, 2, ROOT, 4, 4]
    assert part.lengths.tolist() == [1, 2, 3, 5, 6, 7, 8]
    for place, step in enumerate([0, 1, 2, 4, 5, 6, 7]):
        np.testing.assert_array_equal(part.steps[place].token_ids, tree.steps[step].token_ids)
    whole = part_of(tree, list(range(9)))
    np.testing.assert_array_equal(whole.token_ids, tree.token_ids)
    assert whole.parents.tolist() == tree.parents.tolist()
