"""Standard errors: by hand, and the coverage of their intervals over simulated nested trees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.support.learning.trees import by_range, full_tree, make_tree, on_leaves, rewards, trees
from treerpo_ray.algo.advantages.baselines import Baseline
from treerpo_ray.algo.advantages.errors import advantage_errors
from treerpo_ray.algo.advantages.forms import AdvantageForm, all_advantages, step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import PruneRule, Pruning, step_groups
from treerpo_ray.algo.standard_errors import standard_error_of_mean
from treerpo_ray.algo.tree import ROOT, Tree


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([0.0, 1.0], 0.5),  # s^2 = 1/2
        ([0.0, 0.0, 0.0, 1.0], 0.25),  # s^2 = 1/4
        ([0.25, 0.75], 0.25),
        ([0.0, 0.25, 0.5, 0.75, 1.0], (0.625 / 20) ** 0.5),
        ([0.0] * 4, (0.1 * 0.9 / 3) ** 0.5),  # Jeffreys: 1/2 of 5
        ([1.0] * 4, (0.1 * 0.9 / 3) ** 0.5),
        ([0.5] * 4, (0.25 / 3) ** 0.5),
        ([0.0] * 8, (0.5 / 9 * 8.5 / 9 / 7) ** 0.5),
        ([1.0], (0.25 * 0.75) ** 0.5),
        ([1.0, float("nan")], float("nan")),
    ],
)
def test_standard_errors_by_hand(values: list[float], error: float) -> None:
    found = standard_error_of_mean(np.array(values))
    assert float(found) == pytest.approx(error, nan_ok=True)


@given(num_children=st.integers(2, 16), data=st.data())
def test_of_mixed_rewards_it_is_the_closed_form_of_a_binomial(
    num_children: int, data: st.DataObject
) -> None:
    num_right = data.draw(st.integers(1, num_children - 1))
    values = np.array([1.0] * num_right + [0.0] * (num_children - num_right))
    mean = num_right / num_children
    expected = (mean * (1 - mean) / (num_children - 1)) ** 0.5
    assert float(standard_error_of_mean(values)) == pytest.approx(expected)


def test_errors_of_a_tree_by_hand() -> None:
    """Step 0's children are 0, 1, 1, 0 and step 1 is a leaf: the prompt's values are 1/2 and 1."""
    tree = make_tree([-1, -1, 0, 0, 0, 0])
    values = mean_backup(tree, on_leaves(tree, [1.0, 0.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(values.step_errors, [12**-0.5, 0, 0, 0, 0, 0])
    assert values.root_error == pytest.approx(0.25)


@given(tree=trees(), data=st.data())
def test_each_parent_has_the_error_of_its_childrens_mean(tree: Tree, data: st.DataObject) -> None:
    values = mean_backup(tree, data.draw(rewards(tree, with_errors=True)))
    errors = np.append(values.step_errors, values.root_error)
    for leaf in tree.leaves:
        assert errors[leaf] == 0 or np.isnan([errors[leaf], values.steps[leaf]]).all()
    for parent, children in tree.children.items():
        expected = standard_error_of_mean(values.steps[list(children)])
        np.testing.assert_array_equal(errors[parent], expected)


# Coverage ----------------------------------------------------------------------------------------

NUM_TREES = 4000
EARLY = 0.15
"""Share of steps above the last depth that end their answer."""


def simulated_leaves(
    rng: np.random.Generator, num_children: int, depth: int, value: float, spread: float
) -> np.ndarray:
    """Rewards of NUM_TREES trees with root value `value`; an early leaf's stands for all below.

    The true value of a child is drawn around its parent's, Beta with a share `spread` of the
    largest variance: 0 gives independent leaves, 1 lets the first step decide.
    """
    values, ended = np.full((NUM_TREES, 1), value), np.zeros((NUM_TREES, 1), bool)
    for level in range(1, depth + 1):
        values, ended = (np.repeat(a, num_children, axis=1) for a in (values, ended))
        if level < depth and 0 < spread < 1:
            scale = (1 - spread) / spread
            drawn = rng.beta(*(np.clip(v * scale, 1e-9, None) for v in (values, 1 - values)))
            values = np.where(ended, values, drawn)
        ends = (level == depth) | (spread == 1) | (rng.random(values.shape) < EARLY)
        rewarded = (rng.random(values.shape) < values).astype(float)
        values = np.where(ends & ~ended, rewarded, values)
        ended = ended | ends
    return values


def coverage(
    num_children: int, depth: int, value: float, spread: float
) -> tuple[float, float, float]:
    """Coverage of the 95 % intervals (Student's, N - 1 degrees of freedom); mean square of the
    errors over the true variance, rooted; coverage if all leaves counted as independent."""
    rng = np.random.default_rng((num_children, depth, int(100 * value), int(100 * spread)))
    leaves = simulated_leaves(rng, num_children, depth, value, spread)
    children = leaves.reshape(NUM_TREES, num_children, -1).mean(2)
    means, errors = children.mean(1), standard_error_of_mean(children)
    quantile = stats.t.ppf(0.975, num_children - 1)
    naive = 1.96 * np.sqrt(means * (1 - means) / leaves.shape[1])
    return (
        float((np.abs(means - value) <= quantile * errors).mean()),
        float(np.sqrt((errors**2).mean()) / means.std()),
        float((np.abs(means - value) <= naive).mean()),
    )


COVERAGE = {
    (4, 1, 0.0): (1.00, 0.99, 1.00, 1.00),
    (4, 2, 0.0): (1.00, 0.95, 0.98, 1.00),
    (4, 2, 0.1): (1.00, 0.94, 0.97, 1.00),
    (4, 2, 0.3): (1.00, 0.92, 0.95, 0.99),
    (4, 2, 1.0): (1.00, 0.99, 1.00, 1.00),
    (4, 3, 0.1): (0.86, 0.94, 0.96, 0.91),
    (4, 3, 0.3): (0.90, 0.90, 0.93, 0.87),
    (8, 1, 0.0): (1.00, 0.94, 0.92, 1.00),
    (8, 2, 0.0): (0.93, 0.94, 0.94, 0.93),
    (8, 2, 0.1): (0.90, 0.92, 0.95, 0.91),
    (8, 2, 0.3): (0.88, 0.91, 0.94, 0.88),
    (8, 2, 1.0): (1.00, 0.93, 0.93, 1.00),
    (8, 3, 0.1): (0.86, 0.93, 0.95, 0.90),
    (8, 3, 0.3): (0.80, 0.92, 0.94, 0.89),
}
"""Coverage by children, depth and spread, at a true value of 0.1, 0.3, 0.5 and 0.8.

At 0.3 and 0.5 it is 0.9 or more. Away from the middle, 0.8 included, it falls to 0.80 the deeper
the tree and the more its leaves are correlated: the children's values are skewed, and few trees
hold the rare branch that would widen their interval. The values of four children, and rewards
alone, are so coarse that it may also be 1.
"""
NOISE = 0.0095
"""Two standard deviations of a share of NUM_TREES at 0.9."""


@pytest.mark.parametrize("case", COVERAGE)
def test_intervals_cover_the_true_value_as_tabulated(case: tuple[int, int, float]) -> None:
    found = [coverage(*case[:2], value, case[2]) for value in (0.1, 0.3, 0.5, 0.8)]
    covered = [share for share, _, _ in found]
    assert covered == pytest.approx(COVERAGE[case], abs=0.011)
    assert min(covered[1:3]) >= 0.9 - NOISE and min(covered) >= 0.8 - NOISE
    for _, size, _ in found[1:3]:
        assert 0.97 < size < 1.09, "the errors have the size that they claim"
    if case[1] > 1:
        assert max(naive for _, _, naive in found) < 0.86, "correlation must not be left out"


@pytest.mark.parametrize("form", [AdvantageForm.DIFFERENCE, AdvantageForm.BERNOULLI])
@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (1, 4)])
@pytest.mark.parametrize("num_children", [4, 8])
def test_intervals_of_advantages_cover_what_is_true_of_the_step(
    num_children: int, shape: tuple[int, int], form: AdvantageForm
) -> None:
    """Of all steps of kept groups, with 1.96 standard errors of the plain difference, or of that
    over p (1 - p), which the error takes as known though it is found from the same group.

    The chances of the prompt's children are Beta draws; N leaves below each are right by chance.
    Given a child of chance (or reward) q below a parent of chance p, its advantage is
    (1 - 1/N) (q - p) in expectation. Four children are often equal by chance, and then have an
    error on the safe side.
    """
    rng = np.random.default_rng((num_children, *shape))
    tree, mean, free = full_tree(num_children, 2, 1), shape[0] / sum(shape), 1 - 1 / num_children
    covered: list[bool] = []
    leaves: list[bool] = []
    for _ in range(300):
        chances = rng.beta(*shape, num_children)
        above = chances.repeat(num_children)
        right = (rng.random(above.shape) < above).astype(float)
        values = mean_backup(tree, on_leaves(tree, right.tolist()))
        found = step_advantages(tree, values, form=form, pruning=by_range(0.1))
        errors = advantage_errors(tree, values, form=form, pruning=by_range(0.1))
        true = free * np.append(chances - mean, right - above)
        if form is AdvantageForm.BERNOULLI:
            parents = np.append(np.full(num_children, mean), above)
            true /= parents * (1 - parents)
        is_covered, is_kept = np.abs(found - true) <= 1.96 * errors, ~np.isnan(found)
        covered += is_covered[:num_children][is_kept[:num_children]].tolist()
        leaves += is_covered[num_children:][is_kept[num_children:]].tolist()
    assert len(covered) > 1000 and len(leaves) > 2000
    assert 0.92 <= np.mean(covered) <= 0.99
    assert (0.92 if form is AdvantageForm.DIFFERENCE else 0.88) <= np.mean(leaves) <= 0.99


SHRUNK = Baseline(root=0.4, correlations={1: 0.3, 2: 0.4})


def grown_tree(rng: np.random.Generator, num_children: int, ends: float) -> tuple[Tree, np.ndarray]:
    """A tree of depth 2 with the chances of the prompt's children; a share of these end early."""
    inner = np.flatnonzero(rng.random(num_children) >= ends)
    tree = make_tree([-1] * num_children + inner.repeat(num_children).tolist())
    return tree, rng.beta(2, 2, num_children)


def true_advantage(
    form: AdvantageForm, tree: Tree, right: list[float], chances: np.ndarray, step: int
) -> float:
    """Mean of the advantage over all trees of this shape through the step: the form is linear.

    A leaf then has the chance of the last step that it shares with the path to `step`.
    """
    own, expected = tree.path(step)[0], list(right)
    for place, leaf in enumerate(tree.leaves):
        if leaf != step:
            expected[place] = chances[own] if own in tree.path(leaf) else 0.5
    values = mean_backup(tree, on_leaves(tree, expected))
    return float(all_advantages(form, tree, values, step_groups(tree, values), SHRUNK)[step])


@pytest.mark.parametrize("ends", [0.0, 0.25])
@pytest.mark.parametrize("num_children", [4, 8])
def test_intervals_of_advantages_over_the_tree_cover_what_is_true_of_the_step(
    num_children: int, ends: float
) -> None:
    """Of one early leaf, one step with others below and one leaf below that, of each tree.

    TreeRL's advantages and errors are TreePO's times a factor at this depth. The errors are as
    large as what they are the errors of. An advantage that hangs on the few children of the
    prompt alone, a leaf's with GLOBAL and that of an early leaf, would need Student's quantile in
    place of 1.96 to be covered more often. A shrunk baseline leaves the noise of a step's own few
    leaves, which 1.96 covers by 91 to 95 % (of 2,500 trees; with 250 two deviations are 4 %).
    """
    rng = np.random.default_rng((num_children, int(100 * ends)))
    forms = (AdvantageForm.GLOBAL, AdvantageForm.TREEPO, AdvantageForm.SHRUNK_BASELINE)
    pruning = Pruning(rule=PruneRule.TREE_RANGE, threshold=0.0)
    drawn: dict[tuple[AdvantageForm, str], list[tuple[float, float]]] = {}
    for _ in range(250):
        tree, chances = grown_tree(rng, num_children, ends)
        right = [float(rng.random() < chances[tree.path(leaf)[0]]) for leaf in tree.leaves]
        values = mean_backup(tree, on_leaves(tree, right))
        # The first of each kind; there may be no early leaf, or nothing else.
        kinds = [("leaf" if tree.depths[leaf] == 2 else "early leaf", leaf) for leaf in tree.leaves]
        kinds += [("above", step) for step in tree.children if step != ROOT]
        steps = dict(reversed(kinds))
        for form in forms:
            found, errors = (
                each(tree, values, form=form, pruning=pruning, baseline=SHRUNK)
                for each in (step_advantages, advantage_errors)
            )
            for kind, step in steps.items():
                off = found[step] - true_advantage(form, tree, right, chances, step)
                drawn.setdefault((form, kind), []).append((off, errors[step]))
    assert len(drawn) == len(forms) * (3 if ends else 2)
    for (form, kind), pairs in drawn.items():
        off, error = np.array([pair for pair in pairs if not np.isnan(pair[0])]).T
        size = np.sqrt((error**2).mean() / (off**2).mean())
        covered = (np.abs(off) <= 1.96 * error).mean()
        is_shrunk = form is AdvantageForm.SHRUNK_BASELINE
        assert 0.9 < size < (1.2 if is_shrunk else 1.15), (form, kind)
        least = 0.87 if is_shrunk else 0.92 if kind == "above" else 0.85
        assert least <= covered <= 0.99, (form, kind)
