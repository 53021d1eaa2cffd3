from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.trees import by_range, make_tree, on_leaves, rewards, shuffled, trees
from treerpo_ray.algo.advantages.baselines import Baseline
from treerpo_ray.algo.advantages.forms import (
    WITHOUT_SIBLINGS,
    AdvantageForm,
    bernoulli,
    bernoulli_std,
    difference,
    leave_one_out,
    standard,
    step_advantages,
)
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import GroupState, PruneRule, Pruning, step_groups
from treerpo_ray.algo.tree import Tree

FORMS = [bernoulli, bernoulli_std, difference, standard, leave_one_out]
Form = Callable[[np.ndarray], np.ndarray]
group_values = st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("values", "advantages"),
    [
        ([0, 0, 1, 1], [-2, -2, 2, 2]),
        ([1, 0, 0, 0], [4, -4 / 3, -4 / 3, -4 / 3]),
        ([0.49, 0.49, 0.51, 0.51], [-0.04, -0.04, 0.04, 0.04]),
        ([1, 1, 1, 1, 0, 0, 0, 0], [2, 2, 2, 2, -2, -2, -2, -2]),
        ([1, 0, 0, 0, 0, 0, 0, 0], [8] + [-8 / 7] * 7),
    ],
)
def test_bernoulli_has_the_values_worked_out_from_the_paper(
    values: list[float], advantages: list[float]
) -> None:
    np.testing.assert_allclose(bernoulli(np.array(values, float)), advantages, rtol=1e-9)


@pytest.mark.parametrize(
    ("form", "advantages"),
    [
        (bernoulli, [-7 / 6, -0.5, 5 / 3]),
        (bernoulli_std, [-7 / 6 * 0.24**0.5, -0.5 * 0.24**0.5, 5 / 3 * 0.24**0.5]),
        (difference, [-0.28, -0.12, 0.4]),
        (standard, [-0.28 / 0.355528, -0.12 / 0.355528, 0.4 / 0.355528]),
        (leave_one_out, [-0.42, -0.18, 0.6]),
    ],
)
def test_partial_credit_by_hand(form: Form, advantages: list[float]) -> None:
    """Rewards .12, .28 and .8: the mean is .4, m (1 - m) = .24, the sum of squares .2528."""
    np.testing.assert_allclose(form(np.array([0.12, 0.28, 0.8])), advantages, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (bernoulli, 8.0, -8 / 7),
        (bernoulli_std, 7**0.5, -(7**-0.5)),
        (difference, 7 / 8, -1 / 8),
        (standard, 2.474873, -0.353553),
        (leave_one_out, 1.0, -1 / 7),
    ],
)
def test_one_right_answer_of_eight(form: Form, right: float, wrong: float) -> None:
    advantages = form(np.array([1.0] + [0.0] * 7))
    np.testing.assert_allclose(advantages, [right] + [wrong] * 7, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "size"),
    [
        (bernoulli, 2.0),
        (bernoulli_std, 1.0),
        (difference, 0.5),
        (standard, 0.935413),
        (leave_one_out, 4 / 7),
    ],
)
def test_half_of_eight_right(form: Form, size: float) -> None:
    advantages = form(np.array([1.0] * 4 + [0.0] * 4))
    np.testing.assert_allclose(advantages, [size] * 4 + [-size] * 4, rtol=1e-5)


def test_bernoulli_tells_a_small_gap_from_a_large_one_and_standard_does_not() -> None:
    large, small = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.49, 0.49, 0.51, 0.51])
    assert np.abs(bernoulli(small)).max() < 0.05 < np.abs(bernoulli(large)).max()
    np.testing.assert_allclose(standard(small), standard(large), rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, 1.0, 1.0], [1 / 3] * 7, [0.4], [1.0, 1 - 2e-16]]
)
def test_equal_values_have_no_advantage(form: Form, values: list[float]) -> None:
    assert form(np.array(values)).tolist() == [0.0] * len(values)


@pytest.mark.parametrize("form", [bernoulli, bernoulli_std])
@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 2.0]])
def test_the_bernoulli_forms_refuse_rewards_outside_zero_to_one(
    form: Form, values: list[float]
) -> None:
    with pytest.raises(ValueError, match="choose the form difference or standard"):
        form(np.array(values))


@pytest.mark.parametrize("form", FORMS)
@given(values=group_values)
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(
    form: Form, values: list[float]
) -> None:
    advantages = form(np.array(values))
    assert abs(advantages.sum()) <= 1e-9 * (1 + np.abs(advantages).sum())
    order = np.argsort(values)
    assert (np.diff(advantages[order]) >= 0).all()


@given(values=group_values)
def test_no_bernoulli_advantage_is_larger_than_the_group(values: list[float]) -> None:
    assert np.abs(bernoulli(np.array(values))).max() <= len(values) * (1 + 1e-9)


@given(num_children=st.integers(2, 16), data=st.data())
def test_binary_rewards_have_the_closed_form_n_over_k(
    num_children: int, data: st.DataObject
) -> None:
    num_right = data.draw(st.integers(1, num_children - 1))
    num_wrong = num_children - num_right
    advantages = bernoulli(np.array([1.0] * num_right + [0.0] * num_wrong))
    expected = [num_children / num_right] * num_right + [-num_children / num_wrong] * num_wrong
    np.testing.assert_allclose(advantages, expected)


@given(values=group_values)
def test_the_square_root_form_times_the_bernoulli_deviation_is_the_difference(
    values: list[float],
) -> None:
    array = np.array(values)
    scale = np.sqrt(array.mean() * (1 - array.mean()))
    np.testing.assert_allclose(bernoulli_std(array) * scale, difference(array), atol=1e-12)
    np.testing.assert_allclose(bernoulli(array) * scale, bernoulli_std(array), rtol=1e-9)


@given(values=group_values)
def test_leave_one_out_is_each_value_minus_the_mean_of_the_others(values: list[float]) -> None:
    others = [np.delete(values, own) for own in range(len(values))]
    expected = [v - o.mean() if len(o) else 0.0 for v, o in zip(values, others, strict=True)]
    np.testing.assert_allclose(leave_one_out(np.array(values)), expected, atol=2e-9)


def test_each_form_of_a_group_is_chosen_by_its_name() -> None:
    tree = make_tree([-1, -1, -1, -1])
    leaf_values = np.array([1.0, 0.0, 0.0, 0.25])
    values = mean_backup(tree, leaf_values)
    for form in FORMS:
        chosen = step_advantages(
            tree, values, form=AdvantageForm(form.__name__), pruning=by_range(0.1)
        )
        np.testing.assert_array_equal(chosen, form(leaf_values))


def test_advantages_of_a_tree_by_hand() -> None:
    """The prompt's group is [1/4, 1]: mu = 5/8, sigma = 15/64. Step 0's is [0, 0, 1, 0]:
    mu = 1/4, sigma = 3/16. Step 4's is unanimous."""
    tree = make_tree([-1, -1, 0, 0, 0, 0, 4, 4])
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
    advantages = step_advantages(tree, values, form=AdvantageForm.BERNOULLI, pruning=by_range(0.1))
    third, nan = 4 / 3, float("nan")
    expected = [-1.6, 1.6, -third, -third, 4.0, -third, nan, nan]
    np.testing.assert_allclose(advantages, expected)


UNEVEN = make_tree([-1, -1, 0, 0, 0, 2, 2])
"""Leaves 1, 3, 4, 5 and 6: step 1 ended early, step 0 has three children, step 2 has two."""
KEEP_ALL = by_range(-1.0)


def test_the_global_form_by_hand() -> None:
    """Means over leaves: the root 2/5, step 0 1/4, step 2 1/2."""
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    found = step_advantages(UNEVEN, values, form=AdvantageForm.GLOBAL, pruning=KEEP_ALL)
    np.testing.assert_allclose(found, [-0.15, 0.6, 0.1, -0.4, -0.4, 0.6, -0.4])


def test_treerl_by_hand() -> None:
    """Means over leaves: the root 2/5, step 0 1/4, step 2 1/2 (over children step 0 has 1/6)."""
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    found = step_advantages(UNEVEN, values, form=AdvantageForm.TREERL, pruning=KEEP_ALL)
    expected = [
        2 * (2 * 1 / 4 - 2 * 2 / 5),  # sqrt(4) leaves, the parent is the root
        2 * 1 - 2 * 2 / 5,
        2**0.5 * (2 * 1 / 2 - 2 / 5 - 1 / 4),
        *[2 * 0 - 2 / 5 - 1 / 4] * 2,
        2 * 1 - 2 / 5 - 1 / 2,
        2 * 0 - 2 / 5 - 1 / 2,
    ]
    np.testing.assert_allclose(found, expected)


def test_treepo_by_hand() -> None:
    """Subgroups: all five leaves, mean 2/5; below step 0 four, 1/4; below step 2 two, 1/2."""
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    found = step_advantages(UNEVEN, values, form=AdvantageForm.TREEPO, pruning=KEEP_ALL)
    two = -(2 / 5 + 1 / 4) / 2
    right, wrong = 1 - (2 / 5 + 1 / 4 + 1 / 2) / 3, -(2 / 5 + 1 / 4 + 1 / 2) / 3
    below = right + wrong
    np.testing.assert_allclose(found, [2 * two + below, 3 / 5, below, two, two, right, wrong])


def test_the_policy_gradient_by_hand() -> None:
    """Step 0 has (0 + 0 + 1/2) / 3 = 1/6; below it a step counts 1/3, below step 2 1/6."""
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    found = step_advantages(UNEVEN, values, form=AdvantageForm.POLICY_GRADIENT, pruning=KEEP_ALL)
    expected = [1 / 6 - 1, 1 - 1 / 6, 1 / 3 * 1 / 2, *[1 / 3 * (0 - 1 / 4)] * 2, 1 / 6, -1 / 6]
    np.testing.assert_allclose(found, expected)


def test_an_only_child_has_no_part_in_the_policy_gradient() -> None:
    tree = make_tree([-1, -1, 0, 1])
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0]))
    found = step_advantages(tree, values, form=AdvantageForm.POLICY_GRADIENT, pruning=KEEP_ALL)
    assert found.tolist() == [1, -1, 0, 0]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("form", [AdvantageForm.POLICY_GRADIENT, AdvantageForm.DIFFERENCE])
def test_the_policy_gradient_alone_has_the_gradient_of_the_expected_reward_as_its_mean(
    form: AdvantageForm, ends: bool
) -> None:
    """All trees of 2 x 2 steps over two tokens, each with its chance; token 1 may end an answer."""
    first, second = np.array([0.3, 0.7]), np.array([[0.2, 0.8], [0.6, 0.4]])
    reward = np.array([[1.0, 0.25], [0.0, 0.5]])
    worth = (second * reward).sum(1)
    if ends:
        worth[1] = 0.75
    # Of the logits of the first token, then of the second after each first one.
    exact = [first * (worth - first @ worth)]
    exact += [first[a] * second[a] * (reward[a] - second[a] @ reward[a]) for a in (0, 1)]
    if ends:
        exact[2] = np.zeros(2)
    mean = np.zeros((3, 2))
    for tokens in product((0, 1), repeat=2):
        inner = [index for index, token in enumerate(tokens) if not (ends and token == 1)]
        tree = make_tree([-1, -1, *(parent for parent in inner for _ in range(2))])
        for below in product((0, 1), repeat=2 * len(inner)):
            leaves = {2 + i: reward[tokens[inner[i // 2]]][b] for i, b in enumerate(below)}
            leaves |= {i: worth[1] for i in (0, 1) if i not in inner}
            values = mean_backup(tree, on_leaves(tree, [leaves[leaf] for leaf in tree.leaves]))
            found = step_advantages(tree, values, form=form, pruning=KEEP_ALL)
            chance, gradient = np.prod(first[list(tokens)]), np.zeros((3, 2))
            for index, token in enumerate(tokens):
                gradient[0] += found[index] * (np.eye(2)[token] - first)
            for i, b in enumerate(below):
                a = tokens[inner[i // 2]]
                chance *= second[a][b]
                gradient[1 + a] += found[2 + i] * (np.eye(2)[b] - second[a])
            mean += chance * gradient
    is_gradient = np.allclose(mean, 2 * np.array(exact))
    assert is_gradient == (form is AdvantageForm.POLICY_GRADIENT)


def test_the_reward_itself_and_what_is_left_of_it_above_a_baseline_by_hand() -> None:
    """Step 2 is worth 1/2, so step 0 (0 + 0 + 1/2) / 3 = 1/6."""
    values = mean_backup(UNEVEN, on_leaves(UNEVEN, [1.0, 0.0, 0.0, 1.0, 0.0]))
    worth = np.array([1 / 6, 1, 1 / 2, 0, 0, 1, 0])
    for form, taken_off in ((AdvantageForm.REWARD, 0.0), (AdvantageForm.PAST_BASELINE, 0.3)):
        found = step_advantages(
            UNEVEN, values, form=form, pruning=KEEP_ALL, baseline=Baseline(root=0.3)
        )
        np.testing.assert_allclose(found, worth - taken_off)


@pytest.mark.parametrize("form", AdvantageForm)
def test_an_only_child_is_trained_where_no_sibling_is_asked_for(form: AdvantageForm) -> None:
    tree = make_tree([-1])
    values = mean_backup(tree, np.array([1.0]))
    found = step_advantages(tree, values, form=form, pruning=KEEP_ALL, baseline=Baseline(root=0.25))
    expected = {
        AdvantageForm.REWARD: 1.0,
        AdvantageForm.PAST_BASELINE: 0.75,
        AdvantageForm.SHRUNK_BASELINE: 0.75,
    }
    assert found.tolist() == [expected.get(form, 0.0)]
    assert expected.keys() == WITHOUT_SIBLINGS


@pytest.mark.parametrize("baseline", [0.0, 0.4, 1.0])
def test_one_answer_a_question_has_the_gradient_of_the_expected_reward_for_any_past_baseline(
    baseline: float,
) -> None:
    chances, reward = np.array([0.3, 0.5, 0.2]), np.array([1.0, 0.0, 0.5])
    tree, mean = make_tree([-1]), np.zeros(3)
    for answer, chance in enumerate(chances):
        values = mean_backup(tree, reward[[answer]])
        [found] = step_advantages(
            tree,
            values,
            form=AdvantageForm.PAST_BASELINE,
            pruning=KEEP_ALL,
            baseline=Baseline(root=baseline),
        )
        mean += chance * found * (np.eye(3)[answer] - chances)
    np.testing.assert_allclose(mean, chances * (reward - chances @ reward))


def test_a_subgroup_of_one_answer_compares_it_with_none() -> None:
    tree = make_tree([-1, -1, 0])
    values = mean_backup(tree, on_leaves(tree, [0.0, 1.0]))
    found = step_advantages(tree, values, form=AdvantageForm.TREEPO, pruning=KEEP_ALL)
    assert found.tolist() == [0.5, -0.5, 0.5]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (AdvantageForm.GLOBAL, [1 - 2 / 3, 0 - 2 / 3]),
        (AdvantageForm.TREERL, [2 * 1 - 2 / 3 - 1 / 2, 2 * 0 - 2 / 3 - 1 / 2]),
        (AdvantageForm.TREEPO, [1 - (2 / 3 + 1 / 2) / 2, -(2 / 3 + 1 / 2) / 2]),
    ],
)
def test_a_scheme_of_the_tree_takes_means_over_the_leaves_that_have_a_reward(
    form: AdvantageForm, expected: list[float]
) -> None:
    """Leaf 2 errored, leaf 3 is right: step 0 and the prompt's group are left out, means stay."""
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    values = mean_backup(tree, on_leaves(tree, [float("nan"), 1.0, 1.0, 0.0]))
    found = step_advantages(tree, values, form=form, pruning=KEEP_ALL)
    np.testing.assert_allclose(found, [np.nan] * 4 + expected)


@pytest.mark.parametrize("form", [AdvantageForm.GLOBAL, AdvantageForm.TREERL, AdvantageForm.TREEPO])
@given(rewards=group_values)
def test_at_depth_one_the_schemes_of_a_tree_are_the_difference(
    form: AdvantageForm, rewards: list[float]
) -> None:
    tree = make_tree([-1] * len(rewards))
    values = mean_backup(tree, np.array(rewards))
    found = step_advantages(tree, values, form=form, pruning=KEEP_ALL)
    factor = 2 if form is AdvantageForm.TREERL else 1  # the root is the parent, and counts twice
    np.testing.assert_allclose(found, factor * difference(np.array(rewards)), atol=4e-9)


def test_shrinkage_scales_the_advantages_of_a_group_by_what_is_no_noise() -> None:
    """The prompt's values are 1/2 and 0, s^2 = 1/8. Step 0's has s^2 / N = 1/4, step 1's, of equal
    values, (1/6) (5/6) = 5/36: the mean is 7/36, more than 1/8, so nothing is left."""
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    pruning = Pruning(rule=PruneRule.SHRINKAGE, threshold=0.0)
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0, 0.0, 0.0]))
    found = step_advantages(tree, values, form=AdvantageForm.DIFFERENCE, pruning=pruning)
    np.testing.assert_array_equal(found, [np.nan, np.nan, 0.5, -0.5, np.nan, np.nan])
    # With 1 and 0 the prompt's s^2 is 1/2 and its noise 5/36: 1 - 10/36 is left of +-1/2.
    values = mean_backup(tree, on_leaves(tree, [1.0, 1.0, 0.0, 0.0]))
    found = step_advantages(tree, values, form=AdvantageForm.DIFFERENCE, pruning=pruning)
    np.testing.assert_allclose(found[:2], [13 / 36, -13 / 36])
    assert np.isnan(found[2:]).all()


def test_a_group_with_an_error_below_is_left_out_and_the_others_are_trained() -> None:
    tree = make_tree([-1, -1, 0, 0, 1, 1])
    values = mean_backup(tree, on_leaves(tree, [float("nan"), 1.0, 1.0, 0.0]))
    advantages = step_advantages(tree, values, form=AdvantageForm.DIFFERENCE, pruning=by_range(0.1))
    np.testing.assert_array_equal(advantages, [np.nan] * 4 + [0.5, -0.5])


def test_a_tree_whose_leaves_all_errored_is_not_trained_at_all() -> None:
    tree = make_tree([-1, -1, 0, 0])
    values = mean_backup(tree, np.full(4, np.nan))
    for form in AdvantageForm:
        assert np.isnan(step_advantages(tree, values, form=form, pruning=by_range(-1.0))).all()


def test_a_negative_threshold_keeps_unanimous_groups_with_no_advantage() -> None:
    tree = make_tree([-1, -1, 0])
    values = mean_backup(tree, on_leaves(tree, [1.0, 1.0]))
    for form in set(AdvantageForm) - WITHOUT_SIBLINGS:
        found = step_advantages(tree, values, form=form, pruning=by_range(-1.0))
        assert found.tolist() == [0, 0, 0]


@given(tree=trees(), data=st.data())
def test_exactly_the_steps_of_kept_groups_have_an_advantage(
    tree: Tree, data: st.DataObject
) -> None:
    """In every form."""
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    kept = {
        child
        for group in step_groups(tree, values)
        for child in group.children[group.states(by_range(0.1)) == GroupState.KEPT].flat
    }
    for form in AdvantageForm:
        advantages = step_advantages(tree, values, form=form, pruning=by_range(0.1))
        assert set(np.flatnonzero(~np.isnan(advantages))) == kept, form


@given(tree=trees(), data=st.data())
def test_shuffled_siblings_have_shuffled_advantages(tree: Tree, data: st.DataObject) -> None:
    """In every form."""
    num_leaves = len(tree.leaves)
    eighths = st.integers(0, 8).map(lambda n: n / 8)
    drawn = data.draw(st.lists(eighths, min_size=num_leaves, max_size=num_leaves))
    leaf_rewards = on_leaves(tree, drawn)
    ranks = data.draw(st.permutations(range(len(tree.steps))))
    other, order = shuffled(tree, ranks)
    threshold = 0.1234567  # no range of such values is this close to it
    values, other_values = mean_backup(tree, leaf_rewards), mean_backup(other, leaf_rewards[order])
    for form in AdvantageForm:
        advantages, other_advantages = (
            step_advantages(t, v, form=form, pruning=by_range(threshold))
            for t, v in [(tree, values), (other, other_values)]
        )
        np.testing.assert_allclose(
            other_advantages, advantages[order], rtol=1e-9, atol=1e-12, err_msg=form
        )
