"""Errors of advantages by hand; that they cover is in test_standard_errors."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.trees import by_range, full_tree, make_tree, on_leaves, rewards, trees
from treerpo_ray.algo.advantages.errors import TreeForm, advantage_errors
from treerpo_ray.algo.advantages.forms import AdvantageForm, step_advantages
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.groups import PruneRule, Pruning, step_groups
from treerpo_ray.algo.tree import Tree

KEEP_ALL = by_range(-1.0)
UNEVEN = make_tree([-1, -1, 0, 0, 0, 2, 2])
"""Leaves 1, 3, 4, 5 and 6: step 1 ended early, step 0 has three children, step 2 has two."""


def uneven_values() -> Values:
    """Means over leaves: the prompt 2/5, step 0 1/4, step 2 1/2."""
    return mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        (AdvantageForm.DIFFERENCE, 1.0),
        (AdvantageForm.LEAVE_ONE_OUT, 4 / 3),
        (AdvantageForm.POLICY_GRADIENT, 4 / 3),
        (AdvantageForm.BERNOULLI, 16 / 3),
        (AdvantageForm.BERNOULLI_STD, (16 / 3) ** 0.5),
        (AdvantageForm.STANDARD, 1 / (0.5 + 1e-6)),
        (AdvantageForm.GLOBAL, 1.0),
        (AdvantageForm.TREERL, 2.0),
        (AdvantageForm.TREEPO, 1.0),
    ],
)
def test_the_error_of_an_advantage_is_that_of_the_difference_in_the_scale_of_the_form(
    form: AdvantageForm, scale: float
) -> None:
    """One of four leaves is right: S^2 = 1/16, f = 3/4, so a difference has f S^2 = 3/64."""
    tree = make_tree([-1, -1, -1, -1])
    values = mean_backup(tree, np.array([1.0, 0.0, 0.0, 0.0]))
    errors = advantage_errors(tree, values, form=form, pruning=by_range(0.1))
    np.testing.assert_allclose(errors, [scale * (3 / 64) ** 0.5] * 4)


@pytest.mark.parametrize("form", [AdvantageForm.REWARD, AdvantageForm.PAST_BASELINE])
def test_what_is_compared_with_no_sibling_has_the_error_of_its_value(form: AdvantageForm) -> None:
    """Step 0's children are worth 0, 0 and 1/2: variance 1/12 over 3. A leaf's reward is exact."""
    errors = advantage_errors(UNEVEN, uneven_values(), form=form, pruning=KEEP_ALL)
    np.testing.assert_allclose(errors, [1 / 6, 0, 1 / 2, 0, 0, 0, 0])


def test_the_policy_gradient_has_its_weight_in_its_errors() -> None:
    """Step 2's children are 1 and 0: S^2 = 1/4, f = 1/2, N / (N - 1) = 2, and they count 1/6."""
    values = uneven_values()
    errors = advantage_errors(
        UNEVEN, values, form=AdvantageForm.POLICY_GRADIENT, pruning=by_range(0.1)
    )
    np.testing.assert_allclose(errors[5:], [2 / 6 * 8**-0.5] * 2)


ROOT_VARIANCE, FIRST_VARIANCE, INNER_VARIANCE = 0.24**2, (3 / 16) ** 2, 1 / 4
"""Of UNEVEN's leaf means. The prompt's children are 1/4 of four leaves and 1 of one, which move
its mean 2/5 by 8/5 and 2/5 of half their distance: -+0.24. Those of step 0 are 1/2 of two leaves
and twice 0 of one, which do so by 3/2 and 3/4 of a third: 3/8 and twice -3/16, whose squares
come to 27/128, over 2 * 3. Those of step 2 are 1 and 0."""


def test_the_global_form_by_hand() -> None:
    """Steps 0 and 1 have 4 and 1 of the leaves: with 1/5 for each leaf the prompt's own part is
    off the path but for 16/17 or 1/17 of it; below step 0 it is 4/5, below step 2 2/5."""
    found = advantage_errors(UNEVEN, uneven_values(), form=AdvantageForm.GLOBAL, pruning=KEEP_ALL)
    root, first = ROOT_VARIANCE / 17, (4 / 5) ** 2 * FIRST_VARIANCE
    inner = root + first / 3  # 1 - 4 / (4 + 1 + 1)
    expected = [
        root + (1 - 4 / 5) ** 2 * FIRST_VARIANCE,
        ROOT_VARIANCE * 16 / 17,
        inner + (1 - 2 / 5) ** 2 * INNER_VARIANCE,
        *[root + first * 5 / 6] * 2,
        *[inner + (2 / 5) ** 2 * INNER_VARIANCE / 2] * 2,
    ]
    np.testing.assert_allclose(found**2, expected)


@pytest.mark.parametrize(
    ("form", "scale"), [(AdvantageForm.TREERL, 2**0.5), (AdvantageForm.TREEPO, 2 / 3)]
)
def test_the_forms_that_compare_with_the_prompt_and_a_step_by_hand(
    form: AdvantageForm, scale: float
) -> None:
    """Step 2 is compared with the prompt and step 0: 1/5 for each leaf, and 1/5 + 1/4 below step
    0. TreeRL counts sqrt(2); in TreePO two answers of three subgroups each run through it."""
    found = advantage_errors(UNEVEN, uneven_values(), form=form, pruning=KEEP_ALL)
    rate = 1 / 5 + 1 / 4
    variance = ROOT_VARIANCE / 17 + (4 * rate) ** 2 * FIRST_VARIANCE / 3
    variance += (2 - 2 * rate) ** 2 * INNER_VARIANCE
    assert found[2] == pytest.approx(scale * variance**0.5)


@given(data=st.data())
def test_below_the_prompt_of_an_even_tree_the_global_form_has_the_errors_of_the_difference(
    data: st.DataObject,
) -> None:
    tree = full_tree(3, 2, 1)
    values = mean_backup(tree, data.draw(rewards(tree)))
    found = advantage_errors(tree, values, form=AdvantageForm.GLOBAL, pruning=KEEP_ALL)
    expected = step_groups(tree, values)[0].difference_errors[0]
    np.testing.assert_allclose(found[:3], expected, atol=1e-8)


@pytest.mark.parametrize("form", get_args(TreeForm))
@given(tree=trees(), data=st.data())
def test_with_a_form_of_the_tree_every_advantage_of_a_tree_without_an_error_has_one(
    form: AdvantageForm, tree: Tree, data: st.DataObject
) -> None:
    has_errors = data.draw(st.booleans())
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=has_errors)))
    advantages = step_advantages(tree, values, form=form, pruning=KEEP_ALL)
    errors = advantage_errors(tree, values, form=form, pruning=KEEP_ALL)
    assert (errors[~np.isnan(errors)] >= 0).all()
    if has_errors:
        assert np.isnan(errors[np.isnan(advantages)]).all()
    else:
        np.testing.assert_array_equal(np.isnan(errors), np.isnan(advantages))


def test_equal_values_of_a_group_do_not_tell_the_scale_of_a_form_of_groups() -> None:
    equal = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0] * 5))
    errors = advantage_errors(UNEVEN, equal, form=AdvantageForm.DIFFERENCE, pruning=KEEP_ALL)
    assert np.isnan(errors).all()


@pytest.mark.parametrize("form", [AdvantageForm.DIFFERENCE, AdvantageForm.GLOBAL])
def test_shrinkage_scales_errors_as_it_scales_advantages(form: AdvantageForm) -> None:
    """The prompt's values are 1 and 0, which leaves 13/18 of them; see `test_advantages`."""
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    values = mean_backup(tree, on_leaves(tree, [1.0, 1.0, 0.0, 0.0]))
    plain = advantage_errors(tree, values, form=form, pruning=KEEP_ALL)
    shrunk = advantage_errors(
        tree, values, form=form, pruning=Pruning(rule=PruneRule.SHRINKAGE, threshold=0.0)
    )
    np.testing.assert_allclose(shrunk[:2], 13 / 18 * plain[:2])
    assert np.isnan(shrunk[2:]).all()
