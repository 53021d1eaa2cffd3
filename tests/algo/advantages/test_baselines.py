"""Baselines by hand, that over all trees they leave the gradient unbiased, and how they shrink."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.tiny_policies import POLICIES, grown
from tests.support.learning.trees import by_range, full_tree, make_tree, on_leaves, rewards, trees
from treerpo_ray.algo.advantages.baselines import (
    NO_PAST,
    Baseline,
    PastStep,
    baseline_after,
    correlations,
    step_baseline_errors,
    step_baselines,
    variance_sums,
)
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import (
    AdvantageForm,
    Form,
    OwnForm,
    shrunk_baseline,
    step_advantages,
)
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.groups import step_groups
from treerpo_ray.algo.tree import ROOT, Tree

KEEP_ALL = by_range(-1.0)
UNEVEN = make_tree([-1, -1, 0, 0, 0, 2, 2])
"""Leaves 1, 3, 4, 5 and 6: step 1 ended early, step 0 has three children, step 2 has two."""


def kappas(*by_depth: float) -> dict[int, float]:
    """rho of the depths from the first on, by their kappa."""
    return {depth: 1 / (1 + kappa) for depth, kappa in enumerate(by_depth, 1)}


def found_of(tree: Tree, values: Values, baseline: Baseline) -> np.ndarray:
    return step_advantages(
        tree, values, form=AdvantageForm.SHRUNK_BASELINE, pruning=KEEP_ALL, baseline=baseline
    )


# By hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_whole_answers_against_the_others_and_the_past_by_hand(share: float) -> None:
    """kappa 2 towards 1/4, three others: (1/2 + 1) / 5 without a right answer, (1/2 + 2) / 5."""
    tree, right = make_tree([-1] * 4), np.array([1.0, 1.0, 0.0, 0.0])
    baseline = Baseline(root=0.25, correlations=kappas(2.0), share=share)
    taken_off = np.array([0.3, 0.3, 0.5, 0.5])
    found = found_of(tree, mean_backup(tree, right), baseline)
    np.testing.assert_allclose(found, right - share * taken_off)


def test_a_step_of_a_tree_is_shrunk_towards_its_parent_by_hand() -> None:
    """Values: step 2 is worth 1/2, step 0 (0 + 0 + 1/2) / 3 = 1/6; the past 1/2; kappa 1, 2, 1/2.

    b(0) = (1/2 + 1) / 2 = 3/4, b(1) = (1/2 + 1/6) / 2 = 1/3. Below step 0, whose b counts twice:
    b(2) = (3/2 + 0 + 0) / 4, b(3) = b(4) = (3/2 + 1/2 + 0) / 4. Below step 2, half of 3/8:
    b(5) = (3/16 + 0) / (3/2) and b(6) = (3/16 + 1) / (3/2).
    """
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    baseline = Baseline(root=0.5, correlations=kappas(1.0, 2.0, 0.5))
    expected = [3 / 4, 1 / 3, 3 / 8, 1 / 2, 1 / 2, 1 / 8, 19 / 24]
    np.testing.assert_allclose(step_baselines(UNEVEN, values, baseline), expected)
    found = found_of(UNEVEN, values, replace(baseline, share=0.3))
    np.testing.assert_allclose(found, values.steps - 0.3 * np.array(expected))


def test_in_an_even_tree_siblings_count_as_their_leaves_with_kappa_in_leaves() -> None:
    """(kappa b + sum of values) / (kappa + m) is (3 kappa b + sum of rewards) / (3 kappa + 3 m)."""
    tree = full_tree(3, 2, 1)
    leaf_rewards = on_leaves(tree, [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.25])
    values = mean_backup(tree, leaf_rewards)
    found = step_baselines(tree, values, Baseline(root=0.25, correlations=kappas(1.5)))
    for step in (0, 1, 2):
        others = [leaf_rewards[leaf] for leaf in tree.leaves if step not in tree.path(leaf)]
        assert found[step] == pytest.approx((4.5 * 0.25 + sum(others)) / (4.5 + len(others)))


def test_only_children_have_the_baseline_of_their_parent() -> None:
    """Below two siblings, and below the prompt itself; the siblings' kappa is 1."""
    tree = make_tree([-1, -1, 0, 1])
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0]))
    for below in ({}, kappas(1.0, 3.0)):
        baseline = Baseline(root=0.5, correlations=kappas(1.0) | below)
        assert step_baselines(tree, values, baseline).tolist() == [0.25, 0.75, 0.25, 0.75]
    chain = make_tree([-1, 0, 1])
    values = mean_backup(chain, on_leaves(chain, [1.0]))
    for correlations_ in ({}, kappas(0.0, 1.0)):
        found = step_baselines(chain, values, Baseline(root=0.4, correlations=correlations_))
        assert found.tolist() == [0.4] * 3


def test_siblings_with_an_errored_leaf_below_are_left_out_of_a_baseline() -> None:
    """Leaf 2 errored: step 0 has no value, so step 1 is compared with the past 1/2 alone."""
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    values = mean_backup(tree, on_leaves(tree, [float("nan"), 1.0, 1.0, 0.0]))
    baseline = Baseline(root=0.5, correlations=kappas(1.0, 1.0))
    # Step 0 is compared with step 1's 1/2; leaf 2 with leaf 3, leaf 3 with none.
    expected = [0.5, 0.5, 0.75, 0.5, 0.25, 0.75]
    np.testing.assert_allclose(step_baselines(tree, values, baseline), expected)
    found = found_of(tree, values, baseline)
    np.testing.assert_allclose(found, [np.nan] * 4 + [0.75, -0.75])
    nothing = mean_backup(tree, np.full(6, np.nan))
    np.testing.assert_array_equal(step_baselines(tree, nothing, baseline), [0.5] * 6)
    assert variance_sums(tree, nothing, step_groups(tree, nothing), baseline) == {}


def test_before_the_first_step_siblings_are_compared_with_each_other_alone() -> None:
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    alone, rloo = (
        step_advantages(UNEVEN, values, form=form, pruning=KEEP_ALL)
        for form in (AdvantageForm.SHRUNK_BASELINE, AdvantageForm.LEAVE_ONE_OUT)
    )
    np.testing.assert_allclose(alone, rloo, atol=1e-12)
    assert baseline_after([]) == NO_PAST
    assert baseline_after([], 0.3) == Baseline(share=0.3)


# Unbiased ----------------------------------------------------------------------------------------


SHAPES = [
    *(("flat", (1,)), ("flat", (2,)), ("flat", (4,))),
    *(("two deep", (2, 2)), ("two deep", (1, 3)), ("two deep", (3, 2))),
    *(("ends early", (3, 1)), ("ends early", (2, 2))),
]
"""Of which policy all trees are made, and how many children a step has by depth."""


def is_unbiased(name: str, shape: tuple[int, ...], form: Form, baseline: Baseline) -> bool:
    """Whether the mean over all trees of the sum of A grad log p is the gradient.

    At each depth times the number of steps that a full tree has there: each is trained once.
    """
    policy = POLICIES[name]
    mean = {prefix: np.zeros(len(chances)) for prefix, chances in policy.chances.items()}
    for chance, tree, values, prefixes in grown(name, shape):
        found = step_advantages(tree, values, form=form, pruning=KEEP_ALL, baseline=baseline)
        for advantage, prefix in zip(found, prefixes, strict=True):
            scores = -np.array(policy.chances[prefix[:-1]])
            scores[prefix[-1]] += 1
            mean[prefix[:-1]] += chance * advantage * scores
    number = {prefix: prod(shape[: len(prefix) + 1]) for prefix in mean}
    assert sum(chance for chance, *_ in grown(name, shape)) == pytest.approx(1)
    return all(np.allclose(mean[p], number[p] * policy.gradient(p)) for p in mean)


BASELINES = [
    NO_PAST,
    Baseline(root=0.4, correlations=kappas(1.0, 3.0)),
    Baseline(root=0.4, correlations={1: 0.0, 2: 0.0}),
    Baseline(root=-2.0, correlations=kappas(0.2, 0.5), share=0.3),
    Baseline(root=0.4, correlations=kappas(2.0), share=1.7),
    Baseline(root=0.4, correlations=kappas(1.0, 1.0), share=0.0),
]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_over_all_trees_the_mean_update_is_the_gradient_of_the_expected_reward(
    name: str, shape: tuple[int, ...], baseline: Baseline
) -> None:
    assert is_unbiased(name, shape, AdvantageForm.SHRUNK_BASELINE, baseline)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_baseline_that_holds_the_steps_own_part_is_biased(
    name: str, shape: tuple[int, ...]
) -> None:
    """The same shrinkage of the mean of the whole group, the step itself in it."""

    def with_own(tree: Tree, values: Values, root: float) -> np.ndarray:
        found = np.append(values.steps, root)
        for siblings in tree.siblings:
            means = values.steps[siblings.children].mean(-1)
            found[siblings.children] = ((found[siblings.parents] + means) / 2)[:, None]
        return values.steps - found[:ROOT]

    form = OwnForm(name="with_own", num_parameters=3, function=with_own, error=None)
    assert not is_unbiased(name, shape, form, Baseline(root=0.4))
    # And it is the step's own part that makes it so: b of the parent alone is unbiased.
    past = OwnForm(
        name="past", num_parameters=3, function=lambda tree, values, b: values.steps - b, error=None
    )
    assert is_unbiased(name, shape, past, Baseline(root=0.4))


# Properties --------------------------------------------------------------------------------------

rhos = st.dictionaries(st.integers(1, 6), st.floats(0, 1), max_size=6)


@given(tree=trees(), data=st.data(), root=st.floats(-1, 1))
def test_without_correlation_it_is_the_past_baseline(
    tree: Tree, data: st.DataObject, root: float
) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    baseline = Baseline(root=root, correlations=dict.fromkeys(range(1, 9), 0.0))
    past = step_advantages(
        tree, values, form=AdvantageForm.PAST_BASELINE, pruning=KEEP_ALL, baseline=baseline
    )
    np.testing.assert_allclose(found_of(tree, values, baseline), past, atol=1e-12)
    nearly = replace(baseline, correlations=kappas(*[1e9] * 8))
    np.testing.assert_allclose(found_of(tree, values, nearly), past, atol=1e-7)


@given(tree=trees(), data=st.data(), correlations_=rhos)
def test_with_a_share_of_zero_it_is_the_reward(
    tree: Tree, data: st.DataObject, correlations_: dict[int, float]
) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    baseline = Baseline(root=0.4, correlations=correlations_, share=0.0)
    found, right = found_of(tree, values, baseline), values.steps
    np.testing.assert_array_equal(found[~np.isnan(found)], right[~np.isnan(found)])
    errors = advantage_errors(
        tree,
        values,
        form=AdvantageForm.SHRUNK_BASELINE,
        pruning=KEEP_ALL,
        baseline=replace(baseline, share=1.0),
    )
    known = ~np.isnan(errors)
    assert (errors[known] >= values.step_errors[known]).all()


@given(tree=trees(), data=st.data(), correlations_=rhos, shift=st.floats(-5, 5))
def test_rewards_and_past_that_are_shifted_alike_leave_advantages_and_correlations(
    tree: Tree, data: st.DataObject, correlations_: dict[int, float], shift: float
) -> None:
    leaf_rewards = data.draw(rewards(tree, with_errors=True))
    sums = []
    found = []
    for by in (0.0, shift):
        values = mean_backup(tree, leaf_rewards + by)
        baseline = Baseline(root=0.4 + by, correlations=correlations_)
        found.append(found_of(tree, values, baseline))
        sums.append(variance_sums(tree, values, step_groups(tree, values), baseline))
    np.testing.assert_allclose(*found, atol=1e-9)
    assert sums[0] == pytest.approx(sums[1], abs=1e-9)


@given(tree=trees(), data=st.data(), correlations_=rhos)
def test_a_baseline_lies_between_the_values_that_it_is_made_of(
    tree: Tree, data: st.DataObject, correlations_: dict[int, float]
) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    found = step_baselines(tree, values, Baseline(root=0.4, correlations=correlations_))
    assert np.isfinite(found).all()
    assert found.min() >= -1e-12 and found.max() <= 1 + 1e-12


# How far to shrink -------------------------------------------------------------------------------


def test_variances_by_hand() -> None:
    """Two answers, 1 and 0: s^2 = 1/2, V = 1/2, the past 0: 1/4 - 1/4. Two of 1: V - b = 1."""
    tree = make_tree([-1, -1])
    found = []
    for right in ([1.0, 0.0], [1.0, 1.0]):
        values = mean_backup(tree, np.array(right))
        found.append(variance_sums(tree, values, step_groups(tree, values), NO_PAST))
    assert found[0] == {"within_depth_1": 0.5, "between_depth_1": 0.0}
    assert found[1] == {"within_depth_1": 0.0, "between_depth_1": 1.0}
    assert correlations(found) == {1: 1 / 1.5}
    assert correlations(found[:1]) == {1: 0.0}, "the past's alone: nothing differs from it"
    assert correlations(found[1:]) == {1: 1.0}, "the siblings alone: they say it all"
    assert correlations([{"within_depth_1": 0.0, "between_depth_1": 0.0}]) == {1: 0.0}
    assert correlations([]) == {}


def test_only_children_and_errored_groups_tell_no_variance() -> None:
    """The prompt's group has an error; below step 1 the values are 1 and 0, and V is 1/2."""
    tree = make_tree([-1, -1, 0, 1, 1, 3])
    values = mean_backup(tree, on_leaves(tree, [float("nan"), 0.0, 1.0]))
    baseline = Baseline(root=0.25, correlations=kappas(1.0, 1.0))
    found = variance_sums(tree, values, step_groups(tree, values), baseline)
    assert found == {"within_depth_2": 0.5, "between_depth_2": 1 / 16 - 1 / 4}


@pytest.mark.parametrize(
    ("name", "shape"), [("two deep", (2, 2)), ("flat", (4,)), ("ends early", (2, 2))]
)
def test_over_all_trees_the_variances_have_what_they_estimate_as_their_mean(
    name: str, shape: tuple[int, ...]
) -> None:
    """sigma^2 is the variance of a child's value, tau^2 the mean square of how far the parent's
    baseline is from what the parent is worth, over the parents with children."""
    policy, mean, expected = POLICIES[name], dict[str, float](), dict[str, float]()
    baseline = Baseline(root=0.4, correlations=kappas(1.0, 3.0))

    def variance(prefix: tuple[int, ...], depth: int) -> float:
        """Of the value of a child of a prefix."""
        own = policy.chances[prefix]
        mean_worth, total = policy.worth(prefix), 0.0
        for token, chance in enumerate(own):
            child = (*prefix, token)
            noise = variance(child, depth + 1) / shape[depth] if child in policy.chances else 0.0
            total += chance * ((policy.worth(child) - mean_worth) ** 2 + noise)
        return total

    for chance, tree, values, prefixes in grown(name, shape):
        groups = step_groups(tree, values)
        for key, value in variance_sums(tree, values, groups, baseline).items():
            mean[key] = mean.get(key, 0.0) + chance * value
        baselines = np.append(step_baselines(tree, values, baseline), baseline.root)
        for parent in tree.children:
            prefix = () if parent == ROOT else prefixes[parent]
            terms = {
                "within": variance(prefix, len(prefix) + 1),
                "between": (policy.worth(prefix) - baselines[parent]) ** 2,
            }
            for kind, term in terms.items():
                key = f"{kind}_depth_{len(prefix) + 1}"
                expected[key] = expected.get(key, 0.0) + chance * term
    assert len(mean) == 2 * len(shape)
    assert mean == pytest.approx(expected)


def test_measured_correlations_bring_baselines_closest_to_what_parents_are_worth() -> None:
    """1,500 trees of 3 x 3: prompts are right at Beta(2, 2), first steps drawn around that.

    Of Beta(2, 2) tau^2 is 1/20. A first step's chance has a tenth of the largest variance,
    E[p (1 - p)] / 10 = 1/50, its value of three leaves a third of E[q (1 - q)] = .18 more, so
    that kappa of the first depth is (.02 + .06) / .05 = 1.6.
    """
    rng, tree = np.random.default_rng(0), full_tree(3, 2, 1)
    prompts = rng.beta(2, 2, 1500)
    firsts = rng.beta(*(np.repeat(9 * p, 3).reshape(-1, 3) for p in (prompts, 1 - prompts)))
    drawn = []
    for first in firsts:
        right = (rng.random((3, 3)) < first[:, None]).astype(float)
        drawn.append(mean_backup(tree, on_leaves(tree, right.ravel().tolist())))
    baseline = Baseline(root=0.5)
    for _ in range(2):  # as of the depths above, the second one's is measured against what is used
        sums = [variance_sums(tree, v, step_groups(tree, v), baseline) for v in drawn]
        baseline = baseline_after([PastStep(0.5, each) for each in sums])
    assert 1 / baseline.correlations[1] - 1 == pytest.approx(1.6, rel=0.15)

    def off(other: Baseline) -> tuple[float, float]:
        """Mean squares of what prompts and first steps are worth less the b of those below."""
        found = np.array([step_baselines(tree, values, other) for values in drawn])
        above = found[:, :3] - prompts[:, None]
        below = found[:, 3:].reshape(-1, 3, 3) - firsts[:, :, None]
        return float((above**2).mean()), float((below**2).mean())

    best = off(baseline)
    for depth in (1, 2):
        for factor in (0.0, 0.5, 2.0, np.inf):  # of kappa
            rho = baseline.correlations[depth]
            other = 0.0 if factor == np.inf else rho / (rho + factor * (1 - rho))
            changed = baseline.correlations | {depth: other}
            assert off(replace(baseline, correlations=changed))[depth - 1] > best[depth - 1]


def test_a_baseline_has_its_metrics_and_metrics_have_their_baseline() -> None:
    baseline = Baseline(root=0.25, correlations={1: 0.5, 2: 0.0}, share=0.3)
    row = baseline.metrics()
    assert row == {
        "learner/baseline": 0.25,
        "learner/correlation_depth_1": 0.5,
        "learner/correlation_depth_2": 0.0,
    }
    assert Baseline.of_metrics({"step": 3, "reward/mean": 0.1} | row, 0.3) == baseline
    with pytest.raises(KeyError):
        Baseline.of_metrics({"step": 3}, 0.3)


def test_the_past_is_the_mean_of_its_steps_and_the_ratio_of_their_totals() -> None:
    past = [
        PastStep(0.5, {}),
        PastStep(0.25, {"within_depth_1": 1.0, "between_depth_1": 3.0}),
        PastStep(0.75, {"within_depth_1": 3.0, "between_depth_1": -1.0, "within_depth_2": 2.0}),
    ]
    found = baseline_after(past, 0.3)
    assert found == Baseline(root=0.5, correlations={1: 2 / 6, 2: 0.0}, share=0.3)


# Errors ------------------------------------------------------------------------------------------


def test_the_error_of_a_baseline_by_hand() -> None:
    """Step 0 is compared with step 1 by half: 1 and 1/6 have s^2 = (5/6)^2 / 2, of one sibling.

    Its children, 1/2, 0 and 0, have s^2 = 1/12, two others of three weigh half beside kappa 2.
    """
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    baseline = Baseline(root=0.5, correlations=kappas(1.0, 2.0, 1e12))
    first = (5 / 6) ** 2 / 2 / 4
    second = (1 / 12) / 2 / 4 + first / 4
    expected = np.array([first, first, second, second, second, second, second])
    found = step_baseline_errors(UNEVEN, values, baseline)
    np.testing.assert_allclose(found**2, expected, rtol=1e-6)
    errors = advantage_errors(
        UNEVEN,
        values,
        form=AdvantageForm.SHRUNK_BASELINE,
        pruning=KEEP_ALL,
        baseline=replace(baseline, share=0.3),
    )
    np.testing.assert_allclose(errors**2, values.step_errors**2 + 0.09 * expected, rtol=1e-6)
    np.testing.assert_array_equal(
        shrunk_baseline(UNEVEN, values, baseline), found_of(UNEVEN, values, baseline)
    )
