"""Advantages: how much better a step is than its siblings.

A form is one small function. One that needs more than the values of the group (the parent's
value, the root's, the leaves below) takes it from the tree and the values that
`group_advantages` hands on.
"""

from enum import StrEnum
from typing import assert_never

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.groups import GroupState, StepGroup, step_groups
from treerpo_ray.algo.tree import Tree

STD_EPSILON = 1e-6
"""Added to GRPO's standard deviation, as its published implementations do."""

ROUNDING = 1e-9
"""Values closer than this are equal: a mean of equal numbers may be off by a last digit."""


class AdvantageForm(StrEnum):
    """Name of a form in the config."""

    BERNOULLI = "bernoulli"
    BERNOULLI_STD = "bernoulli_std"
    DIFFERENCE = "difference"
    STANDARD = "standard"


def bernoulli(values: Float64[np.ndarray, " children"]) -> Float64[np.ndarray, " children"]:
    """(R - mu) / (mu (1 - mu)): the paper's form, a variance (arXiv 2506.05183, eq. 4).

    For N values in [0, 1] no advantage is larger than N.
    """
    return _scaled(values, _bernoulli_variance(values))


def bernoulli_std(values: Float64[np.ndarray, " children"]) -> Float64[np.ndarray, " children"]:
    """(R - mu) / sqrt(mu (1 - mu)): the paper's form with a standard deviation."""
    return _scaled(values, _bernoulli_variance(values) ** 0.5)


def difference(values: Float64[np.ndarray, " children"]) -> Float64[np.ndarray, " children"]:
    """R - mu: no scale (Dr.GRPO, arXiv 2503.20783)."""
    return _scaled(values, 1.0)


def standard(values: Float64[np.ndarray, " children"]) -> Float64[np.ndarray, " children"]:
    """(R - mu) / (std + 1e-6), std unbiased: GRPO (arXiv 2402.03300, section 4.1.2)."""
    std = values.std(ddof=1) if len(values) > 1 else 0.0
    return _scaled(values, std + STD_EPSILON)


def group_advantages(
    form: AdvantageForm, tree: Tree, values: Values, group: StepGroup
) -> Float64[np.ndarray, " children"]:
    """Advantage of each child of `group`, a group of `tree` without NaN values."""
    match form:
        case AdvantageForm.BERNOULLI:
            return bernoulli(group.values)
        case AdvantageForm.BERNOULLI_STD:
            return bernoulli_std(group.values)
        case AdvantageForm.DIFFERENCE:
            return difference(group.values)
        case AdvantageForm.STANDARD:
            return standard(group.values)
    assert_never(form)


def step_advantages(
    tree: Tree, values: Values, *, form: AdvantageForm, threshold: float
) -> Float64[np.ndarray, " steps"]:
    """Advantage of each step of a kept group; NaN for every step that is not trained on.

    Every token of a step has the step's advantage: no discount and no sum over depths.
    `threshold` is that of `StepGroup.state`.
    """
    advantages = np.full(len(tree.steps), np.nan)
    for group in step_groups(tree, values):
        if group.state(threshold) is GroupState.KEPT:
            advantages[list(group.children)] = group_advantages(form, tree, values, group)
    return advantages


def _bernoulli_variance(values: Float64[np.ndarray, " children"]) -> float:
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"the Bernoulli forms need rewards in [0, 1], not {values.min():g} to "
            f"{values.max():g}: choose the form difference or standard"
        )
    mean = float(values.mean())
    return mean * (1 - mean)


def _scaled(
    values: Float64[np.ndarray, " children"], scale: float
) -> Float64[np.ndarray, " children"]:
    """Deviation from the mean over `scale`; exactly zero for equal values, whatever the scale."""
    if values.max() - values.min() < ROUNDING:
        return np.zeros_like(values)
    return (values - float(values.mean())) / scale
