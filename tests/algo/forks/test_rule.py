"""The rule by closed forms, its estimators by enumeration, and both by simulation."""

from collections.abc import Iterable
from itertools import product
from math import prod

import numpy as np
import pytest

from tests.support.learning.simulated_forks import CONTEXTS, SURE, UNSURE, late_forks
from tests.support.learning.tiny_policies import POLICIES, Policy, grown
from tests.support.learning.trees import make_tree, on_leaves
from treerpo_ray.algo.forks.rule import (
    FEWEST_TREES,
    MAX_CHILDREN,
    CutSamples,
    Fork,
    ForkEstimate,
    fork_estimate,
)
from treerpo_ray.algo.forks.samples import TreeGradients, step_samples, tree_gradients

LATE = Fork(within=15.0, between=1.0, before=16.0, after=4.0)
"""16 sure tokens, then 4 that are all to be right, each at 1/2."""

# Closed forms ------------------------------------------------------------------------------------


def test_late_uncertainty_wants_about_eight_continuations() -> None:
    """N* = sqrt(4 * 15), G = 16 * 20 / (4 + sqrt(60))^2; at 8 the share is 46/16 * 48/320."""
    assert LATE.best_children == pytest.approx(60**0.5)
    assert LATE.gain == pytest.approx(320 / (4 + 60**0.5) ** 2) == pytest.approx(2.32, abs=0.01)
    assert LATE.children == 8
    assert LATE.token_share(8) == pytest.approx((1 + 15 / 8) / 16 * 48 / 20)
    assert LATE.token_share(1) == 1


@pytest.mark.parametrize("within", [0.1, 0.49, 0.5, 0.51, 2.0, 40.0])
@pytest.mark.parametrize("before", [3.0, 30.0])
def test_the_best_number_needs_the_fewest_tokens_and_more_than_one_pays_by_the_rule(
    within: float, before: float
) -> None:
    fork = Fork(within=within, between=0.1, before=before, after=6.0)
    shares = [fork.token_share(n) for n in np.linspace(1, 200, 19901)]
    pays = within / 0.1 > 6.0 / before
    assert (fork.best_children > 1) == pays
    assert 1 / fork.gain == pytest.approx(min(shares), rel=1e-5)
    whole = [fork.token_share(n) for n in range(2, MAX_CHILDREN + 1)]
    assert fork.children == 2 + int(np.argmin(whole))


def test_where_all_variance_lies_on_one_side_of_the_cut() -> None:
    above = Fork(within=0.0, between=2.0, before=9.0, after=1.0)
    assert (above.best_children, above.gain, above.children) == (0, 1, 2)
    assert above.token_share(4) == pytest.approx(13 / 10), "only the cost changes"
    below = Fork(within=2.0, between=0.0, before=9.0, after=1.0)
    assert (below.best_children, below.children) == (np.inf, MAX_CHILDREN)
    assert below.gain == pytest.approx((9 + 1) / 1), "no fork gains more than (a + b) / b"
    assert below.token_share(4) == pytest.approx(13 / 40)


def test_without_variance_or_tokens_before_the_cut_flat_answers_are_best() -> None:
    for fork in (
        Fork(within=0.0, between=0.0, before=9.0, after=1.0),
        Fork(within=5.0, between=0.1, before=0.0, after=1.0),
        Fork(within=5.0, between=0.0, before=0.0, after=1.0),
    ):
        assert (fork.best_children, fork.gain, fork.children) == (0, 1, 2)


@pytest.mark.parametrize("wrong", [{"within": -1.0}, {"between": -0.1}, {"after": 0.0}])
def test_what_no_fork_can_have_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        Fork(**({"within": 1.0, "between": 1.0, "before": 1.0, "after": 1.0} | wrong))


# Estimators --------------------------------------------------------------------------------------


def score(policy: Policy, prefix: tuple[int, ...]) -> np.ndarray:
    """Gradient of the log-chance of a prefix's last token by the logits of all contexts."""
    contexts = sorted(policy.chances)
    found = np.zeros((len(contexts), max(map(len, policy.chances.values()))))
    chances = policy.chances[prefix[:-1]]
    found[contexts.index(prefix[:-1]), : len(chances)] = np.eye(len(chances))[prefix[-1]] - chances
    return found.ravel()


def exact(policy: Policy, baseline: float, depth: int) -> tuple[float, float, float, float, float]:
    """sigma^2, tau^2, |E g|^2, a and b by all answers of a policy."""
    answers = []
    for answer, reward in policy.rewards.items():
        chance = prod(policy.chances[answer[:n]][token] for n, token in enumerate(answer))
        steps = [score(policy, answer[: n + 1]) for n in range(len(answer))]
        answers.append((answer, chance, (reward - baseline) * np.sum(steps, axis=0)))
    mean = sum(chance * g for _, chance, g in answers)
    square = sum(chance * g @ g for _, chance, g in answers)
    between = 0.0
    for prefix in {answer[:depth] for answer in policy.rewards}:
        own = [(chance, g) for answer, chance, g in answers if answer[:depth] == prefix]
        total = sum(chance for chance, _ in own)
        given = sum(chance * g for chance, g in own) / total
        between += total * given @ given
    before = sum(chance * min(depth, len(answer)) for answer, chance, _ in answers)
    after = sum(chance * max(len(answer) - depth, 0) for answer, chance, _ in answers)
    return square - between, between - mean @ mean, mean @ mean, before, after


def of_tree(name: str, tree, prefixes, baseline: float, num_cuts: int) -> TreeGradients:
    policy = POLICIES[name]
    found = tree_gradients(
        tree,
        np.array([score(policy, prefix) for prefix in prefixes]),
        rewards=on_leaves(tree, [policy.rewards[prefixes[leaf]] for leaf in tree.leaves]),
        baseline=baseline,
        num_cuts=num_cuts,
    )
    assert found is not None
    return found


POLICIES_DEEP = ("two deep", "ends early")


@pytest.mark.parametrize("name", POLICIES_DEEP)
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (2, 3)])
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_over_all_trees_the_samples_have_the_exact_variances_and_tokens(
    name: str, shape: tuple[int, ...], baseline: float
) -> None:
    within, between, of_mean, before, after = exact(POLICIES[name], baseline, 1)
    assert within > 0.001 and between > 0.001
    columns, mean = np.zeros(5), np.zeros(0)
    for chance, tree, _, prefixes in grown(name, shape):
        own = of_tree(name, tree, prefixes, baseline, 1)
        columns, mean = (
            columns + chance * own.columns[0],
            own.mean * chance + (mean if len(mean) else 0),
        )
    square, product_, a, b, _ = columns
    assert square - product_ == pytest.approx(within)
    assert product_ - mean @ mean == pytest.approx(between), "trees are independent"
    assert mean @ mean == pytest.approx(of_mean)
    assert (a, b) == pytest.approx((before, after))


@pytest.mark.parametrize("name", POLICIES_DEEP)
def test_two_trees_of_a_step_together_estimate_without_bias(name: str) -> None:
    """All pairs of trees [1, 2], each with its chance."""
    within, between, *_ = exact(POLICIES[name], 0.4, 1)
    forest = [
        (chance, of_tree(name, tree, prefixes, 0.4, 1))
        for chance, tree, _, prefixes in grown(name, (1, 2))
    ]
    found = np.zeros(2)
    for (p, one), (q, two) in product(forest, forest):
        estimate = ForkEstimate(depth=1, samples=step_samples([one, two], 1))
        found += p * q * np.array(estimate.variances)
    assert found == pytest.approx([within, between])


def test_a_level_between_counts_with_its_own_mean() -> None:
    """Root > 0, 1; 0 > 2, 3; 2 > 4, 5: three levels, cuts at depths 1 and 2, by hand."""
    tree = make_tree([-1, -1, 0, 0, 2, 2], [4, 3, 2, 2, 1, 1])
    scores = np.array([1.0, 2.0, 0.5, -0.5, 3.0, -1.0])[:, None]
    rewards = on_leaves(tree, [1.0, 0.0, 1.0, 0.0])  # of 1, 3, 4 and 5
    found = tree_gradients(tree, scores, rewards=rewards, baseline=0.5, num_cuts=3)
    assert found is not None
    # g: of 1 it is 1, of 3 -0.25, of 4 2.25, of 5 -0.25; so of 2 the mean is 1, of 0 0.375.
    assert found.mean == pytest.approx([(0.375 + 1) / 2])
    square = ((0.0625 + (2.25**2 + 0.0625) / 2) / 2 + 1) / 2
    ends = np.array([((6 + 7) / 2 + 3) / 2] * 3)
    before = np.array([3.5, (6 + 3) / 2, ends[0]])
    np.testing.assert_allclose(
        found.columns,
        [
            [square, (1 * -0.25 + 1) / 2, before[0], ends[0] - before[0], 1],
            [square, ((2.25 * -0.25 + 0.0625) / 2 + 1) / 2, before[1], ends[1] - before[1], 1],
            [square, square, before[2], 0, 0],
        ],
    )


def test_trees_that_cannot_tell_are_left_out() -> None:
    tree = make_tree([-1, -1, 0, 1, 1])
    scores = np.ones((5, 1))
    told = tree_gradients(
        tree, scores, rewards=on_leaves(tree, [1.0, 0.0, 1.0]), baseline=0.0, num_cuts=1
    )
    assert told is not None
    assert not len(step_samples([told, told], 1)), "step 0 has a single child"
    errored = on_leaves(tree, [1.0, np.nan, 1.0])
    assert tree_gradients(tree, scores, rewards=errored, baseline=0.0, num_cuts=1) is None
    empty = make_tree([])
    assert tree_gradients(empty, scores[:0], rewards=np.zeros(0), baseline=0, num_cuts=1) is None


# Chains in which all steps must be right ----------------------------------------------------------


def best_share(joint: float, *, is_whole: bool) -> float:
    """Least share of tokens of all cuts and N = 2..8 in a chain of 8 independent steps that is all
    right with the chance `joint`, in prompts without anything in common.

    Args:
        joint: Is the baseline too.
        is_whole: Whether the gradient has the steps before the cut.
    """
    n = 8
    p = joint ** (1 / n)
    right = np.array(list(product([0, 1], repeat=n)))
    chance = np.where(right, p, 1 - p).prod(1)
    whole = (right.min(1) - joint)[:, None] * np.where(right, 1 - p, -p)
    found = []
    for depth in range(1, n):
        g = whole if is_whole else whole * (np.arange(n) >= depth)
        square = chance @ (g * g).sum(1)
        prefix = right[:, :depth] @ 2 ** np.arange(depth)
        total = np.bincount(prefix, chance)
        given = np.stack([np.bincount(prefix, chance * column) for column in g.T], 1)
        between = ((given**2).sum(1) / total).sum()
        fork = Fork(
            within=max(square - between, 0.0), between=between, before=depth, after=n - depth
        )
        found += [fork.token_share(number) for number in range(2, 9)]
    return min(found)


@pytest.mark.parametrize(("joint", "share"), [(0.02, 0.84), (0.25, 1.04), (0.6, 1.06)])
def test_in_chains_of_independent_steps_a_tree_pays_where_hardly_any_is_right(
    joint: float, share: float
) -> None:
    assert best_share(joint, is_whole=True) == pytest.approx(share, abs=0.01)


def test_without_the_tokens_before_the_cut_the_rule_would_promise_what_no_tree_holds() -> None:
    assert best_share(0.6, is_whole=False) < 0.5 < 1 < best_share(0.6, is_whole=True)


# Simulation --------------------------------------------------------------------------------------


def told_by(steps: Iterable[CutSamples]) -> ForkEstimate:
    found = fork_estimate(1, steps)
    assert found is not None
    return found


def share_of(within: float, between: float, number: int) -> float:
    """`Fork.token_share` of these trees, whatever the signs are."""
    cost = (SURE + number * UNSURE) / (SURE + UNSURE)
    return (between + within / number) / (between + within) * cost


def test_a_simulation_recovers_the_best_number_and_the_gain() -> None:
    """sigma^2 / tau^2 is 15 where prompts have nothing in common, and 16 of 16 prompts."""
    rng = np.random.default_rng(0)
    found = told_by(step_samples(late_forks(rng, 300, 4), 1) for _ in range(5))
    assert found.num_prefixes == 1500
    assert (found.fork.before, found.fork.after) == (SURE, UNSURE)
    assert found.fork.best_children == pytest.approx(64**0.5, rel=0.15)
    assert found.fork.gain == pytest.approx(2.36, rel=0.07)


def test_a_simulation_needs_the_tokens_that_are_foretold() -> None:
    """Variance times cost of the gradients themselves, over that of flat answers."""
    rng, num_trees, costs = np.random.default_rng(1), 20_000, {}
    for number in (1, 2, 8, 16):
        tokens = rng.integers(0, 2, (num_trees, number, UNSURE))
        means = np.zeros((num_trees, CONTEXTS, UNSURE))
        of_tree = (tokens.min(-1, keepdims=True) * (tokens - 0.5)).mean(1)
        means[np.arange(num_trees), rng.integers(CONTEXTS, size=num_trees)] = of_tree
        costs[number] = means.var(0).sum() * (SURE + number * UNSURE)
    fork = Fork(within=16.0, between=1.0, before=SURE, after=UNSURE)
    for number, cost in costs.items():
        assert fork.token_share(number) == pytest.approx(cost / costs[1], rel=0.06)
    assert costs[1] / costs[8] == pytest.approx(2.25, rel=0.07)


def test_the_standard_error_is_how_far_estimates_lie_apart() -> None:
    """200 runs of 5 learner steps of 12 trees, drawn from 1000."""
    rng = np.random.default_rng(2)
    pool, shares, errors = late_forks(rng, 1000, 4, chance=0.8), [], []
    for _ in range(200):
        drawn = [[pool[place] for place in rng.integers(1000, size=12)] for _ in range(5)]
        run = told_by(step_samples(trees, 1) for trees in drawn)
        shares.append(share_of(*run.variances, 4))
        errors.append(run.token_share_error(4))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(shares), rel=0.2)
    assert np.mean(shares) == pytest.approx(
        share_of(*told_by([step_samples(pool, 1)]).variances, 4), abs=0.2 * float(np.std(shares))
    )


# Sums over workers and steps ---------------------------------------------------------------------


def test_what_workers_and_steps_tell_adds_up_in_any_order() -> None:
    rng = np.random.default_rng(2)
    steps = [step_samples(late_forks(rng, 6, 3, chance=0.8), 1) for _ in range(3)]
    one = steps[0] + steps[1] + steps[2]
    again = CutSamples.from_columns(one.columns)
    assert len(again) == 18
    for found in (fork_estimate(1, [again]), fork_estimate(1, reversed(steps))):
        assert found is not None
        assert found.variances == pytest.approx(told_by(steps).variances)
        error = told_by(steps).token_share_error(2)
        assert found.token_share_error(2) == pytest.approx(error)


def test_the_error_by_leaving_out_trees_is_that_of_estimates_without_each() -> None:
    """Of one learner step, with the jackknife's formula."""
    trees = late_forks(np.random.default_rng(3), 7, 3, chance=0.8)
    left = [told_by([step_samples(trees[:i] + trees[i + 1 :], 1)]) for i in range(7)]
    shares = np.array([share_of(*each.variances, 2) for each in left])
    expected = (6 / 7 * ((shares - shares.mean()) ** 2).sum()) ** 0.5
    assert told_by([step_samples(trees, 1)]).token_share_error(2) == pytest.approx(expected)


def test_too_little_says_nothing() -> None:
    rng = np.random.default_rng(4)
    trees = late_forks(rng, FEWEST_TREES, 3)
    assert fork_estimate(1, []) is None
    assert fork_estimate(1, [step_samples(trees[1:], 1)]) is None
    alone = [step_samples([tree], 1) for tree in trees]
    assert fork_estimate(1, alone) is None, "trees of other steps have another mean gradient"
    flat = [step_samples(late_forks(rng, 9, 3), 1)]
    dead = [
        CutSamples.from_columns(each.columns * [[0], [0], [0], [1], [1], [1], [1]]) for each in flat
    ]
    nothing = told_by(dead)
    assert not nothing.has_gradients
    for fork in (nothing.fork, nothing.cautious_fork):
        assert (fork.within, fork.between) == (0, 0)
    assert nothing.fork.token_share(2) > 1, "nothing to save, and more to pay"
    early = [
        CutSamples.from_columns(each.columns * [[1], [1], [1], [1], [1], [0], [0]]) for each in flat
    ]
    assert fork_estimate(1, early) is None, "all answers end before the cut"


def test_what_was_not_seen_counts_as_one_more_tree_that_the_prefix_decides() -> None:
    """Of 39 trees three have all squares: sum q^2 / sum q is 2, all of it of tau^2."""
    square = np.zeros(39)
    square[:3] = 2.0
    nothing, ones = np.zeros(39), np.ones(39)
    samples = CutSamples(
        square=square,
        product=nothing,
        others=nothing,
        num_others=38 * ones,
        before=16 * ones,
        after=4 * ones,
        num_prefixes=ones,
    )
    found = told_by([samples])
    assert (found.fork.within, found.fork.between) == pytest.approx((6 / 39, 0))
    cautious = found.cautious_fork
    assert (cautious.within, cautious.between) == pytest.approx((6 / 40, 2 / 40))
    assert (found.fork.children, found.cautious_children) == (16, 3)
    # Whichever tree is left out, tau^2 stays 0: the error of 0 is what the added tree is for.
    assert found.token_share_error(3) == pytest.approx(0, abs=1e-12)
    assert found.cautious_share == pytest.approx((2 + 6 / 3) / 8 * (16 + 3 * 4) / 20)
    assert (cautious.before, cautious.after) == (16, 4)


def test_of_many_trees_what_was_not_seen_counts_for_little() -> None:
    trees = late_forks(np.random.default_rng(0), 1000, 4, chance=0.8)
    found = told_by([step_samples(trees, 1)])
    assert found.cautious_fork.between == pytest.approx(found.fork.between, rel=0.02)
    assert found.cautious_fork.within == pytest.approx(found.fork.within, rel=0.002)


def test_gradients_that_are_all_alike_have_no_variance_to_save() -> None:
    ones = np.ones(6)
    alike = CutSamples(
        square=ones,
        product=ones,
        others=5 * ones,
        num_others=5 * ones,
        before=ones,
        after=ones,
        num_prefixes=ones,
    )
    found = told_by([alike])
    assert found.variances == (0, 0)
    assert found.fork.token_share(3) == 2
    assert found.token_share_error(3) == 0
