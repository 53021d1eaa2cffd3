"""The term of length by hand, that over all trees it is a gradient, and what comes of it."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.tiny_policies import (
    POLICIES,
    Policy,
    Prefix,
    Steps,
    grown,
    grown_by,
)
from tests.support.learning.trees import by_range, make_tree, on_leaves, rewards, trees
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import AdvantageForm, step_advantages
from treerpo_ray.algo.advantages.length import length_advantages, length_errors, token_price
from treerpo_ray.algo.backup import mean_backup, right_lengths
from treerpo_ray.algo.groups import GroupState, PruneRule, Pruning, step_groups
from treerpo_ray.algo.tree import Tree

PAPER = replace(by_range(0.1), keeps_lengths=True)
FLAT = make_tree([-1] * 4, [4, 6, 11, 20])
DEEP = make_tree([-1, -1, -1, 0, 0, 1, 1, 3, 3], [2, 3, 12, 5, 4, 1, 2, 6, 10])
"""Leaves 2, 4, 5, 6, 7 and 8: 2 ended early, 7 and 8 lie below 3, which lies below 0."""
DEEP_REWARDS = [1.0, 1.0, 0.5, 0.0, 1.0, 1.0]
"""Of those leaves: of the second step none is right, one in part."""


def terms(tree: Tree, leaf_rewards: list[float], price: float = 1.0) -> np.ndarray:
    values = mean_backup(tree, on_leaves(tree, leaf_rewards))
    return length_advantages(len(tree), step_groups(tree, values), price)


# By hand -----------------------------------------------------------------------------------------


def test_right_answers_are_compared_with_the_other_right_ones_by_hand() -> None:
    """Three right ones of 4, 6 and 11 tokens; the wrong one of 20 counts for nothing."""
    price = token_price(0.5, [12, 13])
    assert price == 0.02
    found = terms(FLAT, [1, 1, 1, 0], price)
    np.testing.assert_allclose(found, [0.02 * 4.5, 0.02 * 1.5, -0.02 * 6, 0])
    assert terms(FLAT, [1, 1, 0, 0]).tolist() == [2, -2, 0, 0]
    assert terms(FLAT, [1, 0.99, 0, 0]).tolist() == [0] * 4, "no other has the whole reward"
    assert terms(FLAT, [0, 0, 0, 0]).tolist() == [0] * 4


def test_a_step_has_the_mean_of_the_right_answers_below_it_by_hand() -> None:
    """Below step 3: 6 and 10, so 5 + 8 from it on. Below step 0: 13 and 4, so 2 + 8.5."""
    values = mean_backup(DEEP, on_leaves(DEEP, DEEP_REWARDS))
    expected = [10.5, np.nan, 12, 13, 4, np.nan, np.nan, 6, 10]
    np.testing.assert_array_equal(right_lengths(DEEP, values), expected)
    assert terms(DEEP, DEEP_REWARDS).tolist() == [1.5, 0, -1.5, -9, 9, 0, 0, 4, -4]


def test_errored_answers_are_out_and_their_groups_are_not_trained() -> None:
    """Leaf 8 has no reward: step 3 has one right answer of 5 + 6 tokens, step 0 of 2 + 7.5."""
    leaf_rewards = [*DEEP_REWARDS[:5], np.nan]
    values = mean_backup(DEEP, on_leaves(DEEP, leaf_rewards))
    found = right_lengths(DEEP, values)[[0, 3, 8]]
    np.testing.assert_array_equal(found, [9.5, 11, np.nan])
    form = AdvantageForm.DIFFERENCE
    advantages = step_advantages(DEEP, values, form=form, pruning=PAPER, token_price=1.0)
    assert np.flatnonzero(~np.isnan(advantages)).tolist() == [5, 6], "the group below step 1"


def test_a_group_of_right_answers_is_kept_for_their_lengths_alone() -> None:
    values = mean_backup(FLAT, np.ones(4))
    [group] = step_groups(FLAT, values)
    assert group.states(by_range(0.1)) == [GroupState.PRUNED]
    assert group.states(PAPER) == [GroupState.KEPT]
    for form in (AdvantageForm.BERNOULLI, AdvantageForm.REWARD, AdvantageForm.TREEPO):
        found = step_advantages(FLAT, values, form=form, pruning=PAPER, token_price=1.0)
        np.testing.assert_allclose(found, terms(FLAT, [1, 1, 1, 1]))
        assert np.isfinite(
            advantage_errors(FLAT, values, form=form, pruning=PAPER, token_price=1.0)
        ).all()
    alike = make_tree([-1] * 3, [5, 5, 5])
    for leaf_rewards in ([1.0] * 3, [1.0, 0.95, 0.95]):
        [group] = step_groups(alike, mean_backup(alike, np.array(leaf_rewards)))
        assert group.states(PAPER) == [GroupState.PRUNED], "nothing tells them apart"


def test_values_that_the_rule_would_prune_count_for_nothing_beside_lengths() -> None:
    values = mean_backup(FLAT, np.array([1, 1, 0.95, 0.95]))
    found = step_advantages(
        FLAT, values, form=AdvantageForm.DIFFERENCE, pruning=PAPER, token_price=0.1
    )
    np.testing.assert_allclose(found, [0.2, -0.2, 0, 0], atol=1e-12)
    kept = replace(PAPER, threshold=0.01)
    found = step_advantages(
        FLAT, values, form=AdvantageForm.DIFFERENCE, pruning=kept, token_price=0.1
    )
    np.testing.assert_allclose(found, [0.225, -0.175, -0.025, -0.025])


def test_a_weight_of_the_values_of_a_group_is_none_of_its_lengths() -> None:
    values = mean_backup(DEEP, on_leaves(DEEP, DEEP_REWARDS))
    pruning = Pruning(rule=PruneRule.SHRINKAGE, threshold=-1.0, keeps_lengths=True)
    weight = step_groups(DEEP, values)[0].reliability
    assert 0 < weight < 1
    found = step_advantages(
        DEEP, values, form=AdvantageForm.DIFFERENCE, pruning=pruning, token_price=1.0
    )
    first = values.steps[:3] - values.steps[:3].mean()
    np.testing.assert_allclose(found[:3], weight * first + [1.5, 0, -1.5])


def test_the_error_of_the_term_by_hand() -> None:
    """Between siblings lengths vary by 9/8, 81/2 and 8 at the three depths.

    Step 0 is compared with one sibling and has two children with right answers, step 3 too; what
    is below the others is complete.
    """
    values = mean_backup(DEEP, on_leaves(DEEP, DEEP_REWARDS))
    groups = step_groups(DEEP, values)
    variances = [9 / 8 + 81 / 4, 0, 9 / 8, 81 / 2 + 8 / 2, 81 / 2, 0, 0, 8, 8]
    np.testing.assert_allclose(length_errors(9, groups, 0.1) ** 2, 0.01 * np.array(variances))
    shared = {"form": AdvantageForm.DIFFERENCE, "pruning": by_range(-1.0), "groups": groups}
    plain = advantage_errors(DEEP, values, **shared)
    found = advantage_errors(DEEP, values, **shared, token_price=0.1)
    np.testing.assert_allclose(found, np.hypot(plain, 0.1 * np.sqrt(variances)))
    three = step_groups(FLAT, mean_backup(FLAT, np.array([1.0, 1.0, 1.0, 0.0])))
    np.testing.assert_allclose(length_errors(4, three, 1.0) ** 2, [13 / 2] * 3 + [0])


def test_over_simulated_trees_the_squared_error_is_the_mean_squared_deviation() -> None:
    """Of 4 x 4 answers with first steps whose answers differ in length, half of them right."""
    rng, parents = np.random.default_rng(0), [-1] * 4 + [step for step in range(4) for _ in "1234"]
    squares: list[list[tuple[float, float]]] = [[], []]
    for _ in range(800):
        means, lengths = rng.uniform(20, 50, 4), rng.integers(1, 10, 20)
        lengths[4:] = rng.normal(np.repeat(means, 4), 5).round()
        tree = make_tree(parents, lengths.tolist())
        leaf_rewards = (rng.random(16) < 0.5).astype(float).tolist()
        groups = step_groups(tree, mean_backup(tree, on_leaves(tree, leaf_rewards)))
        found, errors = (each(20, groups, 1.0) for each in (length_advantages, length_errors))
        expected = -(lengths - np.append(np.full(4, 40) - means, np.repeat(means, 4)))
        for step in np.flatnonzero(found):
            deviation = found[step] - expected[step]
            if not np.isnan(errors[step]):
                squares[int(step >= 4)].append((deviation**2, errors[step] ** 2))
    for own in squares:
        actual, told = np.mean(own, axis=0)
        assert told == pytest.approx(actual, rel=0.1)


# A gradient --------------------------------------------------------------------------------------


def right_length(policy: Policy, prefix: Prefix, steps: Steps) -> float | None:
    """Mean length of the right answers below a prefix, level by level; None without any."""
    if prefix in policy.rewards:
        return 0.0 if policy.rewards[prefix] == 1 else None
    found = []
    for token, below in steps:
        to_go = right_length(policy, child := (*prefix, token), below)
        if to_go is not None:
            found.append(policy.lengths.get(child, 1) + to_go)
    return sum(found) / len(found) if found else None


def expected_update(policy: Policy, prefix: Prefix, shape: tuple[int, ...]) -> np.ndarray:
    """What the module says, by the logits of the tokens after a prefix, of one of its N steps."""
    chances, depth = np.array(policy.chances[prefix]), len(prefix)
    some, total = np.zeros((2, len(chances)))  # chance of a right answer; that times the mean of L
    for token in range(len(chances)):
        child = (*prefix, token)
        for chance, steps in policy.trees(shape[depth + 1 :], child):
            if (to_go := right_length(policy, child, steps)) is not None:
                some[token] += chance
                total[token] += chance * (policy.lengths.get(child, 1) + to_go)
    q = chances @ some
    mean = chances @ total / q
    gradient = chances * ((total - chances @ total) - mean * (some - q)) / q
    return -q * (1 - (1 - q) ** (shape[depth] - 1)) * gradient


def mean_update(
    policy: Policy, shape: tuple[int, ...], form: AdvantageForm, price: float
) -> dict[Prefix, np.ndarray]:
    """Mean over all trees of the sum of A grad log p."""
    mean = {prefix: np.zeros(len(chances)) for prefix, chances in policy.chances.items()}
    pruning = replace(by_range(0.0), keeps_lengths=price > 0)
    for chance, tree, values, prefixes in grown_by(policy, shape):
        found = step_advantages(tree, values, form=form, pruning=pruning, token_price=price)
        for advantage, prefix in zip(np.nan_to_num(found), prefixes, strict=True):
            scores = -np.array(policy.chances[prefix[:-1]])
            scores[prefix[-1]] += 1
            mean[prefix[:-1]] += chance * advantage * scores
    return mean


SHAPES = [
    *(("lengths", (1,)), ("lengths", (2,)), ("lengths", (4,))),
    *(("lengths below", (2, 2)), ("lengths below", (1, 3)), ("lengths below", (3, 1))),
]


@pytest.mark.parametrize("form", [AdvantageForm.LEAVE_ONE_OUT, AdvantageForm.REWARD])
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_over_all_trees_the_mean_of_the_term_is_the_gradient_of_the_length_of_right_answers(
    name: str, shape: tuple[int, ...], form: AdvantageForm
) -> None:
    policy = POLICIES[name]
    assert sum(chance for chance, *_ in grown(name, shape)) == pytest.approx(1)
    plain, found = (mean_update(policy, shape, form, price) for price in (0.0, 0.1))
    largest = 0.0
    for prefix in policy.chances:
        number = prod(shape[: len(prefix) + 1]) * policy.reached(prefix)
        expected = 0.1 * number * expected_update(policy, prefix, shape)
        np.testing.assert_allclose(found[prefix] - plain[prefix], expected, atol=1e-12)
        largest = max(largest, np.abs(expected).max())
    assert (largest > 1e-3) == (max(shape) > 1)


EVEN = {
    (4,): Policy(
        chances={(): (0.25, 0.25, 0.5)},
        rewards={(0,): 1.0, (1,): 1.0, (2,): 0.0},
        lengths={(0,): 2, (1,): 8, (2,): 1},
    ),
    (2, 2): Policy(
        chances={(): (0.5, 0.5), (0,): (0.25, 0.25, 0.5), (1,): (0.25, 0.25, 0.5)},
        rewards={(a, b): float(b < 2) for a in range(2) for b in range(3)},
        lengths={(0,): 2, (1,): 6, (0, 0): 3, (0, 1): 7, (1, 0): 3, (1, 1): 7},
    ),
}
"""Short and long right answers are equally likely; wrong ones are the shortest."""


@pytest.mark.parametrize("shape", EVEN)
def test_right_answers_get_shorter_with_the_term_and_not_without_and_no_fewer(
    shape: tuple[int, ...],
) -> None:
    """Thirty mean updates of a softmax policy."""
    found = {}
    for price in (0.0, 0.1):
        policy = EVEN[shape]
        logits = {prefix: np.log(chances) for prefix, chances in policy.chances.items()}
        for _ in range(30):
            update = mean_update(policy, shape, AdvantageForm.LEAVE_ONE_OUT, price)
            for prefix in logits:
                logits[prefix] = logits[prefix] + 0.5 * update[prefix]
            chances = {k: tuple(np.exp(x) / np.exp(x).sum()) for k, x in logits.items()}
            policy = replace(policy, chances=chances)
        right = [answer for answer, reward in policy.rewards.items() if reward == 1]
        weights = [policy.reached(answer) for answer in right]
        lengths = [
            sum(policy.lengths[answer[:n]] for n in range(1, len(answer) + 1)) for answer in right
        ]
        found[price] = np.average(lengths, weights=weights), sum(weights)
    start, shortest = {(4,): (5.0, 2.0), (2, 2): (9.0, 5.0)}[shape]
    assert found[0.0][0] == pytest.approx(start)
    assert shortest < found[0.1][0] < shortest + 0.25 * (start - shortest)
    assert found[0.1][1] > found[0.0][1] - 0.01 > 0.9


# Properties --------------------------------------------------------------------------------------


@given(tree=trees(), data=st.data(), more=st.integers(0, 50))
def test_what_all_siblings_have_more_changes_nothing_among_them(
    tree: Tree, data: st.DataObject, more: int
) -> None:
    leaf_rewards = data.draw(rewards(tree, with_errors=True))
    group = tree.children[data.draw(st.sampled_from(sorted(tree.children)))]
    lengths = tree.lengths.copy()
    lengths[list(group)] += more
    longer = make_tree(tree.parents.tolist(), lengths.tolist())
    found = []
    for each in (tree, longer):
        groups = step_groups(each, mean_backup(each, leaf_rewards))
        found.append(length_advantages(len(each), groups, 1.0)[list(group)])
    np.testing.assert_allclose(*found, atol=1e-9)


@given(tree=trees(), data=st.data(), form=st.sampled_from(AdvantageForm))
def test_the_term_is_added_to_what_the_form_gives_in_groups_that_the_rule_keeps(
    tree: Tree, data: st.DataObject, form: AdvantageForm
) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    groups = step_groups(tree, values)
    plain = step_advantages(tree, values, form=form, pruning=by_range(0.1))
    found = step_advantages(tree, values, form=form, pruning=PAPER, token_price=0.1)
    term = length_advantages(len(tree), groups, 0.1)
    np.testing.assert_allclose(found[~np.isnan(plain)], (plain + term)[~np.isnan(plain)])
    is_alone = np.isnan(plain) & ~np.isnan(found)
    np.testing.assert_array_equal(found[is_alone], term[is_alone])
    for group in groups:
        np.testing.assert_allclose(term[group.children].sum(-1), 0, atol=1e-9)
