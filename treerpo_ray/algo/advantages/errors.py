"""Errors of advantages: how far one may be from its mean over all trees through the same step.

Given the path to a step, what else its advantage is made of was drawn independently: the siblings
of each step on the path with all below them, and what lies below the step itself. Each part adds
its variance. Divisors and baselines of a form, and numbers of leaves, are taken as given.

The term of `length` adds its own: given which answers are right, their lengths tell nothing of the
values.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, assert_never

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.advantages.baselines import NO_PAST, Baseline, step_baseline_errors
from treerpo_ray.algo.advantages.forms import (
    AdvantageForm,
    Form,
    OwnForm,
    all_advantages,
    leaf_means,
    subgroups,
)
from treerpo_ray.algo.advantages.length import length_errors
from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.groups import Pruning, StepGroups, of_kept, step_groups
from treerpo_ray.algo.standard_errors import ROUNDING, standard_error_of_mean
from treerpo_ray.algo.tree import ROOT, Tree

TreeForm = Literal[AdvantageForm.GLOBAL, AdvantageForm.TREERL, AdvantageForm.TREEPO]
"""Forms that compare a step with more of the tree than its siblings."""


def advantage_errors(
    tree: Tree,
    values: Values,
    *,
    form: Form,
    pruning: Pruning,
    groups: Sequence[StepGroups] | None = None,
    baseline: Baseline = NO_PAST,
    token_price: float = 0.0,
    advantages: Float64[np.ndarray, " steps"] | None = None,
) -> Float64[np.ndarray, " steps"]:
    """Standard error of each advantage of `step_advantages`; NaN where there is none. It has the
    arguments of that, and `advantages`, those of `all_advantages`, where the caller has them.

    Over simulated trees (tests/algo/test_standard_errors.py) 1.96 of them cover 92 % or more of
    the steps with others below, and of the leaves 92 % in the forms of a group and 85 % in those
    of the tree; 90 % of both with SHRUNK_BASELINE. BERNOULLI's divisor is an estimate, too: of what
    the advantage is with the true one they cover 88 % or more.
    """
    groups = step_groups(tree, values) if groups is None else groups
    errors = _all_errors(form, tree, values, groups, baseline, advantages)
    own = of_kept(errors, groups, pruning)
    return np.hypot(own, length_errors(len(tree), groups, token_price))


def _all_errors(
    form: Form,
    tree: Tree,
    values: Values,
    groups: Sequence[StepGroups],
    baseline: Baseline,
    advantages: Float64[np.ndarray, " steps"] | None,
) -> Float64[np.ndarray, " steps"]:
    match form:
        case OwnForm():
            return form.errors(tree, values, groups, baseline.root)
        case (
            AdvantageForm.BERNOULLI
            | AdvantageForm.BERNOULLI_STD
            | AdvantageForm.DIFFERENCE
            | AdvantageForm.STANDARD
            | AdvantageForm.LEAVE_ONE_OUT
            | AdvantageForm.POLICY_GRADIENT
        ):
            if advantages is None:
                advantages = all_advantages(form, tree, values, groups)
            return _of_groups(groups, advantages)
        case AdvantageForm.GLOBAL | AdvantageForm.TREERL | AdvantageForm.TREEPO:
            return _of_tree(form, tree, values)
        case AdvantageForm.REWARD | AdvantageForm.PAST_BASELINE:
            return values.step_errors
        case AdvantageForm.SHRUNK_BASELINE:
            taken_off = baseline.share * step_baseline_errors(tree, values, baseline)
            return np.hypot(values.step_errors, taken_off)
    assert_never(form)


def _of_groups(
    groups: Sequence[StepGroups], advantages: Float64[np.ndarray, " steps"]
) -> Float64[np.ndarray, " steps"]:
    """Errors of the differences in the scale of the form: it divides a group by one number.

    Equal values do not tell that number: NaN.
    """
    errors = np.full_like(advantages, np.nan)
    for group in groups:
        deviations = group.values - group.values.mean(-1, keepdims=True)
        most = np.abs(deviations).argmax(-1)[:, None]
        largest = np.take_along_axis(deviations, most, -1)
        tells = np.abs(largest[:, 0]) > ROUNDING  # not so where a child has no value
        furthest = np.take_along_axis(group.children, most, -1)
        scale = advantages[furthest[tells]] / largest[tells]
        errors[group.children[tells]] = scale * group.difference_errors[tells]
    return errors


def _of_tree(form: TreeForm, tree: Tree, values: Values) -> Float64[np.ndarray, " steps"]:
    """Errors of k (the sum over some ancestors a of V - V_a), V the mean of the L leaves below.

    A leaf that leaves the path at its step p has the weight r, the sum of 1 / L_a over the a down
    to p. The leaves below p have (L_p S_p)^2 as the variance of their sum, S_p the error of V_p,
    and the child on the path has no part in it: a child's is in proportion to its squared number
    of leaves. The step's own V has the weight that is left, the number of a less r L.
    """
    errors, counts = _leaf_mean_errors(tree, values)
    scales, ancestors = _comparisons(form, tree, counts)
    found = np.full(len(tree), np.nan)
    for step in np.flatnonzero(counts[:ROOT]).tolist():
        variance = rate = 0.0
        for above, below in pairwise((ROOT, *tree.path(step))):
            rate += ancestors[step].count(above) / counts[above]
            others = 1 - counts[below] ** 2 / (counts[list(tree.children[above])] ** 2).sum()
            variance += others * (rate * counts[above] * errors[above]) ** 2
        own = len(ancestors[step]) - rate * counts[step]
        found[step] = scales[step] * (variance + (own * errors[step]) ** 2) ** 0.5
    return found


def _comparisons(
    form: TreeForm, tree: Tree, counts: Float64[np.ndarray, " steps_and_root"]
) -> tuple[Float64[np.ndarray, " steps"], list[list[int]]]:
    """k and the ancestors a of each step, as in `_of_tree`.

    TreePO adds up the answers below a step, each with one over its own number of subgroups: it is
    of this kind where they have equally many, and close to it elsewhere.
    """
    steps = range(len(tree))
    match form:
        case AdvantageForm.GLOBAL:
            return np.ones(len(steps)), [[ROOT] for _ in steps]
        case AdvantageForm.TREERL:
            return np.sqrt(counts[:ROOT]), [[ROOT, parent] for parent in tree.parents.tolist()]
        case AdvantageForm.TREEPO:
            ancestors = [subgroups(tree, counts, step) for step in steps]
            scales = np.zeros(len(steps))
            for leaf in tree.leaves:
                scales[list(tree.path(leaf))] += counts[leaf] / len(ancestors[leaf])
            return scales, ancestors
    assert_never(form)


def _leaf_mean_errors(
    tree: Tree, values: Values
) -> tuple[Float64[np.ndarray, " steps_and_root"], Float64[np.ndarray, " steps_and_root"]]:
    """Standard errors of `leaf_means`, and its counts; NaN where a child has no leaf that counts.

    A mean over leaves is a ratio of two sums over children, with the error of such (Cochran,
    Sampling Techniques, 1977, section 2.11): if they have equally many leaves it is that of a
    plain mean.
    """
    means, counts = leaf_means(tree, values)
    errors = np.where(counts > 0, 0.0, np.nan)
    for parent, children in tree.children.items():
        own = list(children)
        weights = len(own) * counts[own] / max(counts[parent], 1)
        linear = means[parent] + weights * (means[own] - means[parent])
        errors[parent] = standard_error_of_mean(linear)
    return errors, counts
