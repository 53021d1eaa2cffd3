"""Baselines: what is taken off from a step's value that does not depend on the step.

Whatever is known without a step and all below it may be taken off from its value: the gradient
stays unbiased. `step_baselines` shrinks the mean of a step's siblings towards the baseline of its
parent, and so on up to the prompt, whose baseline is the mean root value of earlier learner steps.

How far is measured, by depth, on earlier learner steps too. The best weights of two independent
estimates of one number, here the parent's true value, go by their variances: that of a sibling's
value, sigma^2, and that of the parent's baseline, tau^2 (Buehlmann's credibility, of nested groups
that of Jewell, 1975). With kappa = sigma^2 / tau^2 and m siblings

    b = (kappa b_parent + sum of the siblings' values) / (kappa + m)

A leaf's value is its reward: of right and wrong answers sigma^2 is E[p (1 - p)], and where the
baseline is the mean p, tau^2 is Var(p). Siblings are counted, not the leaves below them, which
share their prefix. What is kept is rho = 1 / (1 + kappa) = tau^2 / (tau^2 + sigma^2), the
intraclass correlation, which is finite where kappa is not.

Where trees of several shapes are trained together (`tree.adaptive` with three levels), values of a
depth are of means over differently many leaves: kappa is then one number for all, best for neither.
Any number leaves the gradient unbiased.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from jaxtyping import Float64, Int64

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.groups import StepGroups
from treerpo_ray.algo.standard_errors import standard_error_of_mean
from treerpo_ray.algo.tree import ROOT, Tree

PAST_STEPS = 10
"""Learner steps that a baseline is measured on: many enough for a small error, few enough to
follow a policy that learns."""
ROOT_VALUE, RHO = "learner/baseline", "learner/correlation_depth_"
"""Names of the metrics of a baseline."""
WITHIN, BETWEEN = "within_depth_", "between_depth_"
"""Of the names of `variance_sums`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What earlier learner steps tell of the values of a batch, and how much of it is taken off.

    Attributes:
        root: Mean root value; 0 before the first step.
        correlations: rho of the steps of each depth, the first one 1. Of a depth that has none it
            is 1: the siblings alone.
        share: Factor of a shrunk baseline.
    """

    root: float = 0.0
    correlations: Mapping[int, float] = field(default_factory=dict)
    share: float = 1.0

    def sibling_weight(
        self, depth: int, num_siblings: Int64[np.ndarray, "*groups children"]
    ) -> Float64[np.ndarray, "*groups children"]:
        """Weight of the siblings' mean against the parent's baseline: m / (kappa + m)."""
        rho = self.correlations.get(depth, 1.0)
        total = 1 - rho + rho * num_siblings
        return np.divide(
            rho * num_siblings, total, out=np.zeros_like(total), where=num_siblings > 0
        )

    def metrics(self) -> dict[str, float]:
        """As a row of metrics; the share is a setting."""
        by_depth = {f"{RHO}{depth}": rho for depth, rho in self.correlations.items()}
        return {ROOT_VALUE: self.root} | by_depth

    @classmethod
    def of_metrics(cls, row: Mapping[str, float], share: float) -> Self:
        """The baseline that has these metrics, which may be among others.

        Raises:
            KeyError: there are none of a baseline.
        """
        by_depth = {
            int(name.removeprefix(RHO)): rho for name, rho in row.items() if name.startswith(RHO)
        }
        return cls(root=row[ROOT_VALUE], correlations=by_depth, share=share)


NO_PAST = Baseline()
"""Before the first learner step."""


def step_baselines(tree: Tree, values: Values, baseline: Baseline) -> Float64[np.ndarray, " steps"]:
    """b of each step: its siblings' mean value, shrunk towards the b of its parent.

    Siblings with an errored leaf below have no value and are left out; without any other the
    parent's b stays, as for an only child.
    """
    found = np.append(np.zeros(len(tree)), baseline.root)  # ROOT = -1 is the last
    for siblings in tree.siblings:  # parents come first
        means, counts = means_of_others(values.steps[siblings.children])
        weights = baseline.sibling_weight(siblings.depth, counts)
        above = found[siblings.parents][:, None]
        found[siblings.children] = above + weights * (means - above)
    return found[:ROOT]


def step_baseline_errors(
    tree: Tree, values: Values, baseline: Baseline
) -> Float64[np.ndarray, " steps"]:
    """Standard error of each b, given the path to the step: of the siblings along it, each with
    all below it. What earlier steps tell is taken as given; NaN below an errored group."""
    variances = np.zeros(len(tree) + 1)
    for siblings in tree.siblings:
        own = values.steps[siblings.children]
        _, counts = means_of_others(own)
        weights = baseline.sibling_weight(siblings.depth, counts)
        of_one = own.shape[-1] * standard_error_of_mean(own)[:, None] ** 2
        of_others = of_one / np.maximum(counts, 1)
        above = variances[siblings.parents][:, None]
        variances[siblings.children] = weights**2 * of_others + (1 - weights) ** 2 * above
    return np.sqrt(variances[:ROOT])


def means_of_others(
    values: Float64[np.ndarray, "groups children"],
) -> tuple[Float64[np.ndarray, "groups children"], Int64[np.ndarray, "groups children"]]:
    """Mean value of the siblings of each step that have one, 0 without any, and how many."""
    is_valued = ~np.isnan(values)
    own = np.where(is_valued, values, 0.0)
    counts = is_valued.sum(-1, keepdims=True) - is_valued
    return (own.sum(-1, keepdims=True) - own) / np.maximum(counts, 1), counts


# How far to shrink -------------------------------------------------------------------------------


def variance_sums(
    tree: Tree, values: Values, groups: Sequence[StepGroups], baseline: Baseline
) -> dict[str, float]:
    """Estimates of sigma^2 and tau^2, added up over the step groups of each depth d of a tree.

    Of the N values of a group, s^2 is their sample variance and V their mean, the parent's value:

        within_depth_d    s^2                   estimates sigma^2
        between_depth_d   (V - b)^2 - s^2 / N   estimates tau^2, b the parent's baseline

    Both are unbiased: given the path to the parent, V is its true value with noise of variance
    sigma^2 / N that b does not depend on. Errored groups and only children tell neither.
    """
    sums: dict[str, float] = {}
    found = np.append(values.steps, values.root)
    expected = np.append(step_baselines(tree, values, baseline), baseline.root)
    for group in groups:
        is_whole = ~group.is_errored
        count = group.values.shape[-1]
        if count == 1 or not is_whole.any():
            continue
        within = group.values[is_whole].var(-1, ddof=1)
        parents = group.parents[is_whole]
        between = (found[parents] - expected[parents]) ** 2 - within / count
        for start, terms in ((WITHIN, within), (BETWEEN, between)):
            name = f"{start}{group.depth}"
            sums[name] = sums.get(name, 0.0) + float(terms.sum())
    return sums


def correlations(sums: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """rho by depth from the `variance_sums` of many trees: the ratio of their totals.

    It is consistent, as a ratio of two means that are unbiased. Where the parents do not differ
    from their baselines by more than noise it is 0: their baselines alone.
    """
    found = {}
    names = {name for each in sums for name in each if name.startswith(WITHIN)}
    for depth in sorted(int(name.removeprefix(WITHIN)) for name in names):
        within = sum(each.get(f"{WITHIN}{depth}", 0.0) for each in sums)
        between = sum(each.get(f"{BETWEEN}{depth}", 0.0) for each in sums)
        found[depth] = between / (between + within) if between > 0 else 0.0
    return found


@dataclass(frozen=True, slots=True)
class PastStep:
    """What one learner step's trees, those of all workers, say to later ones."""

    value: float
    """Mean root value."""
    variances: Mapping[str, float]
    """Their `variance_sums`; empty where no form asks for them."""


def baseline_after(past: Sequence[PastStep], share: float = 1.0) -> Baseline:
    """The baseline that follows from the newest learner steps."""
    if not past:
        return Baseline(share=share)
    return Baseline(
        root=float(np.mean([step.value for step in past])),
        correlations=correlations([step.variances for step in past]),
        share=share,
    )
