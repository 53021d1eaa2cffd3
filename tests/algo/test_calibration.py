"""Calibration: closed forms, and values that are right or nothing but noise."""

import numpy as np
import pytest

from tests.support.learning.trees import make_tree
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.calibration import NUM_BINS, calibration_bins, calibration_error
from treerpo_ray.algo.groups import step_groups
from treerpo_ray.algo.tree import ROOT


def bins_of(*rewards: list[float]) -> np.ndarray:
    """Of groups of leaves with these rewards, each below a prompt of its own."""
    total = np.zeros((NUM_BINS, 3))
    for own in rewards:
        tree = make_tree([ROOT] * len(own))
        total += calibration_bins(step_groups(tree, mean_backup(tree, np.array(own))))
    return total


def test_each_sibling_is_foretold_by_the_mean_of_all_others() -> None:
    bins = bins_of([1, 1, 0, 0])
    # A right answer has 1 right among three others, a wrong one 2.
    np.testing.assert_allclose(bins[3], [2, 2 / 3, 2])
    np.testing.assert_allclose(bins[6], [2, 4 / 3, 0])
    assert bins.sum() == pytest.approx(2 + 2 / 3 + 2 + 2 + 4 / 3)
    assert calibration_error(bins) == pytest.approx(2 / 3)


def test_values_that_hold_have_no_error() -> None:
    assert calibration_error(bins_of([1, 1, 1], [0, 0], [0.3, 0.3, 0.3])) == pytest.approx(0)


def test_the_error_is_the_mean_over_predictions_of_the_gap_in_their_bin() -> None:
    bins = bins_of([1, 0], [1, 1])
    # 0 came to 1; three predictions of 1 came to 0, 1 and 1.
    assert calibration_error(bins) == pytest.approx((1 + 1) / 4)


def test_only_children_and_errored_groups_foretell_nothing() -> None:
    bins = bins_of([1], [1, np.nan])
    assert not bins.any() and np.isnan(calibration_error(bins))


def test_the_error_falls_with_the_number_of_answers() -> None:
    """Prompts that are all solved half the time: what values differ by is noise."""
    draw = np.random.default_rng(0)
    errors = [
        calibration_error(bins_of(*draw.integers(0, 2, (400, n)).astype(float).tolist()))
        for n in (2, 8, 64)
    ]
    assert errors[0] > 0.4 and errors[0] > 2 * errors[1] > 4 * errors[2]
