"""Forms and rules that are not of the package: the same numbers as those that are, and refusals."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest

from tests.support.learning.trees import by_range, make_tree, on_leaves
from treerpo_ray.algo.advantages.baselines import Baseline
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import (
    AdvantageForm,
    OwnForm,
    bernoulli,
    has_baseline,
    leave_one_out,
    past_baseline,
    step_advantages,
    treerl,
)
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.groups import GroupState, OwnRule, PruneRule, Pruning, StepGroups, step_groups
from treerpo_ray.algo.tree import Tree

KEEP_ALL = by_range(-1.0)
TREE = make_tree([-1, -1, 0, 0, 0, 1, 1])
"""Leaves 2 to 6: three below step 0, two below step 1."""
CASES = ([1.0, 0.0, 0.0, 1.0, 0.0], [0.25, 0.5, 1.0, 0.0, 0.75], [1.0, np.nan, 0.0, 1.0, 0.5])


def own(
    function: Callable[..., np.ndarray],
    num_parameters: int,
    error: Callable[..., np.ndarray] | None = None,
) -> OwnForm:
    return OwnForm(name="own", num_parameters=num_parameters, function=function, error=error)


def value_errors(tree: Tree, values: Values, baseline: float) -> np.ndarray:
    return values.step_errors


@pytest.mark.parametrize("rewards", CASES)
@pytest.mark.parametrize(
    ("builtin", "form"),
    [
        (AdvantageForm.BERNOULLI, own(bernoulli, 1)),
        (AdvantageForm.LEAVE_ONE_OUT, own(leave_one_out, 1)),
        (AdvantageForm.TREERL, own(treerl, 2)),
        (
            AdvantageForm.PAST_BASELINE,
            own(lambda tree, values, b: past_baseline(values, b), 3, value_errors),
        ),
    ],
)
def test_a_form_from_elsewhere_is_trained_as_one_of_the_package(
    builtin: AdvantageForm, form: OwnForm, rewards: Sequence[float]
) -> None:
    values = mean_backup(TREE, on_leaves(TREE, rewards))
    for pruning in (KEEP_ALL, by_range(0.3), Pruning(rule=PruneRule.SHRINKAGE, threshold=0.0)):
        advantages, errors = (
            partial(each, TREE, values, pruning=pruning, baseline=Baseline(root=0.3))
            for each in (step_advantages, advantage_errors)
        )
        np.testing.assert_array_equal(advantages(form=form), advantages(form=builtin))
        assert np.isnan(errors(form=form)).all() == (form.error is None)
        if form.error is not None:
            np.testing.assert_array_equal(errors(form=form), errors(form=builtin))
    assert has_baseline(form) == has_baseline(builtin)


def test_a_form_cannot_change_the_values_that_it_is_given() -> None:
    values = mean_backup(TREE, on_leaves(TREE, CASES[0]))
    before = values.steps.copy()

    def zero(given: np.ndarray) -> np.ndarray:
        given[:] = 0
        return given

    def zero_tree(tree: Tree, given: Values) -> np.ndarray:
        return zero(given.steps)

    for form in (own(zero, 1), own(zero_tree, 2)):
        found = step_advantages(TREE, values, form=form, pruning=KEEP_ALL)
        assert (found == 0).all() and (values.steps == before).all()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (own(lambda values: values[..., :1], 1), r"returned \(1, 1\), must be \(1, 2\)"),
        (own(lambda values: values * np.nan, 1), "returned no finite number"),
        (own(lambda tree, values: values.steps[1:], 2), r"returned \(6,\), must be \(7,\)"),
        (
            own(lambda tree, values: values.steps - values.root * np.inf, 2),
            "returned no finite number",
        ),
        (own(lambda v: v, 1, lambda v: v[0]), r"returned \(2,\), must be \(1, 2\)"),
    ],
)
def test_a_form_that_returns_no_number_for_each_step_is_refused(form: OwnForm, words: str) -> None:
    values = mean_backup(TREE, on_leaves(TREE, CASES[0]))
    with pytest.raises(ValueError, match=f"the form own {words}"):
        step_advantages(TREE, values, form=form, pruning=KEEP_ALL)
        advantage_errors(TREE, values, form=form, pruning=KEEP_ALL)


@pytest.mark.parametrize("rewards", CASES)
def test_a_rule_from_elsewhere_keeps_what_is_above_the_threshold(rewards: Sequence[float]) -> None:
    values = mean_backup(TREE, on_leaves(TREE, rewards))
    rule = OwnRule(name="own", function=lambda groups: np.ptp(groups.values, axis=-1))
    for threshold in (-1.0, 0.0, 0.3, 0.6, 1.0):
        for group in step_groups(TREE, values):
            ours = group.states(Pruning(rule=rule, threshold=threshold))
            theirs = group.states(by_range(threshold))
            np.testing.assert_array_equal(ours, theirs)
    assert (step_groups(TREE, values)[0].weights(Pruning(rule=rule, threshold=0)) == 1).all()


def test_a_rule_sees_no_errored_group_and_must_give_a_number_for_each() -> None:
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    values = mean_backup(tree, on_leaves(tree, [np.nan, 1.0, 1.0, 0.0]))
    seen: list[StepGroups] = []

    def rule(groups: StepGroups) -> np.ndarray:
        seen.append(groups)
        return np.array([np.inf])

    [first, second] = step_groups(tree, values)
    pruning = Pruning(rule=OwnRule(name="own", function=rule), threshold=9.0)
    assert first.states(pruning).tolist() == [GroupState.ERRORED] and not seen
    assert second.states(pruning).tolist() == [GroupState.ERRORED, GroupState.KEPT]
    assert [each.values.tolist() for each in seen] == [[[1.0, 0.0]]]
    for wrong in (np.array([1.0, 2.0]), np.array(1.0), np.array([np.nan])):
        bad = OwnRule(name="own", function=lambda groups, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="the rule own must return one number for each of 1"):
            second.states(Pruning(rule=bad, threshold=0.0))
