"""Advantages: how much better a step is than its siblings, or than what else the tree holds.

A scheme is one small function: of the values of a step group, or of a whole tree. To add one,
write it here, name it in `AdvantageForm` and in `all_advantages`, and one of a tree with what it
is made of in `errors`. `OwnForm` is one that lies elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.advantages.baselines import NO_PAST, Baseline, step_baselines
from treerpo_ray.algo.advantages.length import length_advantages
from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.groups import Pruning, StepGroups, of_kept, step_groups
from treerpo_ray.algo.standard_errors import ROUNDING
from treerpo_ray.algo.tree import ROOT, Tree

STD_EPSILON = 1e-6
"""Added to GRPO's standard deviation, as its published implementations do."""


class AdvantageForm(StrEnum):
    """Name of a scheme in the config."""

    BERNOULLI = "bernoulli"
    BERNOULLI_STD = "bernoulli_std"
    DIFFERENCE = "difference"
    STANDARD = "standard"
    LEAVE_ONE_OUT = "leave_one_out"
    GLOBAL = "global"
    TREERL = "treerl"
    TREEPO = "treepo"
    POLICY_GRADIENT = "policy_gradient"
    REWARD = "reward"
    PAST_BASELINE = "past_baseline"
    SHRUNK_BASELINE = "shrunk_baseline"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnForm:
    """A form that is not of this package.

    Attributes:
        name: How messages call it.
        num_parameters: What it takes: 1, the values of step groups (groups x children); 2, a tree
            and its values; 3, these and the mean root value of earlier learner steps.
        function: Advantages, in the shape of the values.
        error: Their standard errors, from the same parameters; None: they are not known.
    """

    name: str
    num_parameters: int
    function: Callable[..., np.ndarray]
    error: Callable[..., np.ndarray] | None

    def advantages(
        self, tree: Tree, values: Values, groups: Sequence[StepGroups], baseline: float
    ) -> Float64[np.ndarray, " steps"]:
        """Advantage of each step.

        Raises:
            ValueError: the function returned another shape, or for a step of a group without
                errored leaves no finite number.
        """
        return self._of_steps(self.function, tree, values, groups, baseline)

    def errors(
        self, tree: Tree, values: Values, groups: Sequence[StepGroups], baseline: float
    ) -> Float64[np.ndarray, " steps"]:
        """Standard error of each advantage, NaN where it is not known; raises as `advantages`."""
        if self.error is None:
            return np.full(len(tree), np.nan)
        return self._of_steps(self.error, tree, values, groups, baseline)

    def _of_steps(
        self,
        function: Callable[..., np.ndarray],
        tree: Tree,
        values: Values,
        groups: Sequence[StepGroups],
        baseline: float,
    ) -> Float64[np.ndarray, " steps"]:
        def of_group(
            own: Float64[np.ndarray, "*groups children"],
        ) -> Float64[np.ndarray, "*groups children"]:
            return self._checked(function(own.copy()), own.shape)

        if self.num_parameters == 1:
            return _by_group(of_group, tree, groups)
        others = (baseline,) if has_baseline(self) else ()
        own = replace(values, steps=values.steps.copy())
        found = self._checked(function(tree, own, *others), values.steps.shape, is_finite=False)
        for group in groups:
            self._checked(found[group.children[~group.is_errored]])
        return found

    def _checked(
        self, found: np.ndarray, shape: tuple[int, ...] | None = None, *, is_finite: bool = True
    ) -> np.ndarray:
        if shape is not None and found.shape != shape:
            raise ValueError(f"the form {self.name} returned {found.shape}, must be {shape}")
        if is_finite and not np.isfinite(found).all():
            raise ValueError(
                f"the form {self.name} returned no finite number for every step of a group in "
                f"which each has a value: {found.tolist()}"
            )
        return found


Form = AdvantageForm | OwnForm

WITHOUT_SIBLINGS = {
    AdvantageForm.REWARD,
    AdvantageForm.PAST_BASELINE,
    AdvantageForm.SHRUNK_BASELINE,
}
"""Forms in which a step needs no other of its tree to be compared with: an only child has one."""


def has_baseline(form: Form) -> bool:
    """Whether a form takes what earlier learner steps tell of the values."""
    if isinstance(form, OwnForm):
        return form.num_parameters == 3
    return form in (AdvantageForm.PAST_BASELINE, AdvantageForm.SHRUNK_BASELINE)


def single_baseline(form: Form, baseline: Baseline) -> float:
    """What a form holds the reward of a single answer against, or REINFORCE where it compares
    siblings, of which that has none."""
    if form is AdvantageForm.REWARD:
        return 0.0
    if form is AdvantageForm.SHRUNK_BASELINE:
        return baseline.root * baseline.share
    return baseline.root


# Of a step group ---------------------------------------------------------------------------------


def bernoulli(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups children"]:
    """(R - mu) / (mu (1 - mu)): the paper's form, a variance (arXiv 2506.05183, eq. 4).

    It is the variance of values that are 0 or 1. Of values between, those of inner steps or of
    rewards with partial credit, it is the largest that there can be with this mean, so that small
    differences count for little. For N values in [0, 1] no advantage is larger than N.
    """
    return _scaled(values, _bernoulli_variance(values))


def bernoulli_std(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups children"]:
    """(R - mu) / sqrt(mu (1 - mu)): the paper's form with a standard deviation."""
    return _scaled(values, _bernoulli_variance(values) ** 0.5)


def difference(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups children"]:
    """R - mu: no scale (Dr.GRPO, arXiv 2503.20783).

    mu is the parent's value, so this is also SPO-tree's value minus that of the parent
    (arXiv 2505.23564).
    """
    return _scaled(values, 1.0)


def standard(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups children"]:
    """(R - mu) / (std + 1e-6), std unbiased: GRPO (arXiv 2402.03300, section 4.1.2)."""
    std = values.std(-1, ddof=1, keepdims=True) if values.shape[-1] > 1 else 0.0
    return _scaled(values, std + STD_EPSILON)


def leave_one_out(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups children"]:
    """R minus the mean of the other siblings: N / (N - 1) times the difference (RLOO,
    arXiv 2402.14740). Only this baseline is independent of R; an only child has 0."""
    count = values.shape[-1]
    return _scaled(values, (count - 1) / count if count > 1 else 1.0)


# Of a tree ---------------------------------------------------------------------------------------


def global_difference(tree: Tree, values: Values) -> Float64[np.ndarray, " steps"]:
    """V - V of the root: how much better a step leaves the prompt than it was.

    V is the mean reward of the leaves below. TreeRL's global advantage (arXiv 2506.11902) without
    its weights: each step counts once. Below a wrong step all steps are pushed down, and below a
    right one up, as in an answer of GRPO; siblings still differ by their own values.
    """
    means, _ = leaf_means(tree, values)
    return (means - means[ROOT])[:ROOT]


def treerl(tree: Tree, values: Values) -> Float64[np.ndarray, " steps"]:
    """sqrt(L) ((V - V of the root) + (V - V of the parent)): TreeRL (arXiv 2506.11902).

    V is the mean reward of the L leaves below. TreeRL divides by sqrt(L), but trains a step once
    for each of the L answers that share it; here a step is trained once, so with L / sqrt(L).
    """
    means, counts = leaf_means(tree, values)
    total = 2 * means - means[ROOT] - np.append(means[tree.parents], 0.0)
    return (np.sqrt(counts) * total)[:ROOT]


def treepo(tree: Tree, values: Values) -> Float64[np.ndarray, " steps"]:
    """Sum over the answers through a step of their advantages in TreePO (arXiv 2508.17445).

    An answer's advantage is its R minus the mean of a subgroup, averaged over its subgroups.
    An ancestor's subgroup are the leaves below it; that of the prompt always counts, of the
    others those of two answers or more. TreePO trains a step once for each answer through it,
    hence the sum. It also whitens over the batch's tokens, which is left out here: its division
    is a factor common to all steps, but the mean that it takes off first is zero only for even
    trees, whose answers have equally many subgroups and tokens.
    """
    means, counts = leaf_means(tree, values)
    total = np.zeros(len(tree))
    for leaf in tree.leaves:
        if counts[leaf]:
            above = subgroups(tree, counts, leaf)
            total[list(tree.path(leaf))] += values.steps[leaf] - means[above].mean()
    return total


def policy_gradient(tree: Tree, groups: Sequence[StepGroups]) -> Float64[np.ndarray, " steps"]:
    """w (R minus the mean of the other siblings): the gradient of the prompt's expected reward.

    w is the share that a step has in its first ancestor's value: one over the number of siblings
    at each depth but the first. With it the sum of A grad log p over the N steps of the first
    depth and all below them has N times that gradient as its expectation (REINFORCE with RLOO's
    baseline, arXiv 2402.14740), less the part of only children, which have no baseline and so
    count 0; the other forms give the steps of each depth the weight of their number, so that in a
    tree of N x N the first steps count N times too little.
    """
    weights = np.ones(len(tree))
    for siblings in tree.siblings:  # parents come first
        if siblings.depth > 1:
            shares = weights[siblings.parents] / siblings.children.shape[1]
            weights[siblings.children] = shares[:, None]
    return weights * _by_group(leave_one_out, tree, groups)


def past_baseline(values: Values, baseline: float) -> Float64[np.ndarray, " steps"]:
    """V - b, b the mean root value of earlier learner steps: REINFORCE (Williams, 1992).

    b depends on none of the trees that it is taken off from, so the gradient stays unbiased. With
    b = 0 only what was right is trained: rejection sampling, RAFT (arXiv 2504.11343).
    """
    return values.steps - baseline


def shrunk_baseline(
    tree: Tree, values: Values, baseline: Baseline
) -> Float64[np.ndarray, " steps"]:
    """V - share b, b the siblings' mean shrunk towards the parent's b (arXiv 2511.03710, in trees).

    See `baselines`: b depends neither on the step nor on what is below it, so that the gradient is
    unbiased with any share and whatever earlier learner steps say of the shrinkage. Each step
    counts once: a depth of N steps in a full tree has N times its part of the gradient. Where all
    are only children this is `past_baseline`, with a share of 0 the reward.
    """
    return values.steps - baseline.share * step_baselines(tree, values, baseline)


def subgroups(tree: Tree, counts: Float64[np.ndarray, " steps_and_root"], step: int) -> list[int]:
    """Ancestors of a step whose leaves, `counts` of them, are subgroups of `treepo`."""
    return [ROOT, *(above for above in tree.path(step)[:-1] if counts[above] > 1)]


def leaf_means(
    tree: Tree, values: Values
) -> tuple[Float64[np.ndarray, " steps_and_root"], Float64[np.ndarray, " steps_and_root"]]:
    """Mean reward of the leaves below each step that have one, and how many; ROOT is the last."""
    sums, counts = np.zeros((2, len(tree) + 1))
    for leaf in tree.leaves:
        if not np.isnan(values.steps[leaf]):
            below = [ROOT, *tree.path(leaf)]
            sums[below] += values.steps[leaf]
            counts[below] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0), counts


# Of the steps that are trained -------------------------------------------------------------------


def all_advantages(
    form: Form,
    tree: Tree,
    values: Values,
    groups: Sequence[StepGroups],
    baseline: Baseline = NO_PAST,
) -> Float64[np.ndarray, " steps"]:
    """Advantage of each step whose step group has no errored leaf below, pruned or not."""
    match form:
        case OwnForm():
            return form.advantages(tree, values, groups, baseline.root)
        case AdvantageForm.BERNOULLI:
            return _by_group(bernoulli, tree, groups)
        case AdvantageForm.BERNOULLI_STD:
            return _by_group(bernoulli_std, tree, groups)
        case AdvantageForm.DIFFERENCE:
            return _by_group(difference, tree, groups)
        case AdvantageForm.STANDARD:
            return _by_group(standard, tree, groups)
        case AdvantageForm.LEAVE_ONE_OUT:
            return _by_group(leave_one_out, tree, groups)
        case AdvantageForm.GLOBAL:
            return global_difference(tree, values)
        case AdvantageForm.TREERL:
            return treerl(tree, values)
        case AdvantageForm.TREEPO:
            return treepo(tree, values)
        case AdvantageForm.POLICY_GRADIENT:
            return policy_gradient(tree, groups)
        case AdvantageForm.REWARD:
            return past_baseline(values, 0.0)
        case AdvantageForm.PAST_BASELINE:
            return past_baseline(values, baseline.root)
        case AdvantageForm.SHRUNK_BASELINE:
            return shrunk_baseline(tree, values, baseline)
    assert_never(form)


def step_advantages(
    tree: Tree,
    values: Values,
    *,
    form: Form,
    pruning: Pruning,
    groups: Sequence[StepGroups] | None = None,
    baseline: Baseline = NO_PAST,
    token_price: float = 0.0,
) -> Float64[np.ndarray, " steps"]:
    """Advantage of each step of a kept group; NaN for every step that is not trained on.

    Every token of a step has the step's advantage: no discount and no sum over depths.

    Args:
        tree: The tree.
        values: Its values.
        form: What an advantage is.
        pruning: Which groups are kept.
        groups: Those of `step_groups`, where the caller has them.
        baseline: What earlier learner steps tell, for forms that take it.
        token_price: Of the term of `length`, which is added to the form's.

    Raises:
        ValueError: a form or rule that is not of this package returns none of its kind.
    """
    groups = step_groups(tree, values) if groups is None else groups
    found = all_advantages(form, tree, values, groups, baseline)
    return trained_advantages(found, groups, pruning, token_price)


def trained_advantages(
    found: Float64[np.ndarray, " steps"],
    groups: Sequence[StepGroups],
    pruning: Pruning,
    token_price: float,
) -> Float64[np.ndarray, " steps"]:
    """Of what a form gives each step that of kept groups, and the term of lengths; else NaN."""
    return of_kept(found, groups, pruning) + length_advantages(len(found), groups, token_price)


def _by_group(
    form: Callable[
        [Float64[np.ndarray, "*groups children"]], Float64[np.ndarray, "*groups children"]
    ],
    tree: Tree,
    groups: Sequence[StepGroups],
) -> Float64[np.ndarray, " steps"]:
    advantages = np.full(len(tree), np.nan)
    for group in groups:
        has_values = ~group.is_errored
        if has_values.any():
            advantages[group.children[has_values]] = form(group.values[has_values])
    return advantages


def _bernoulli_variance(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups 1"]:
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"the Bernoulli forms need rewards in [0, 1], not {values.min():g} to "
            f"{values.max():g}: choose the form difference or standard"
        )
    mean = values.mean(-1, keepdims=True)
    return mean * (1 - mean)


def _scaled(
    values: Float64[np.ndarray, "*groups children"],
    scale: Float64[np.ndarray, "*groups 1"] | float,
) -> Float64[np.ndarray, "*groups children"]:
    """Deviation from the mean over `scale`; exactly zero for equal values, whatever the scale."""
    is_equal = values.max(-1, keepdims=True) - values.min(-1, keepdims=True) < ROUNDING
    deviations = values - values.mean(-1, keepdims=True)
    return np.where(is_equal, 0.0, deviations / np.where(is_equal, 1.0, scale))
