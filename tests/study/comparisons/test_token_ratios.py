"""Tokens to the same level, on curves whose answer is known."""

import numpy as np
import pytest

from tests.support.saved_runs.results import curve_result
from treerpo_ray.study.comparisons.token_ratios import token_ratio, tokens_to

RISING = [0.05 * step for step in range(1, 21)]
"""Twenty steps, of which the last two are the last tenth: 0.975."""
FAST = [min(0.1 * step, 1.0) for step in range(1, 21)]


def test_a_run_is_there_where_its_rewards_first_stay_at_a_level() -> None:
    # The second step is above the level, but the mean of all steps up to the fourth is not
    early = curve_result("arm", [0.1, 0.6, 0.1, 0.2, *[0.6] * 16])
    assert tokens_to(0.5, early) == 5000
    assert tokens_to(0.5, curve_result("arm", FAST)) == 5000
    assert tokens_to(0.0, early) == 1000
    assert tokens_to(0.61, early) is None


def test_a_single_good_step_at_the_end_is_no_level() -> None:
    run = curve_result("arm", [*[0.2] * 19, 0.9])
    assert tokens_to(0.5, run) == 20_000, "the mean of the last two is 0.55"
    assert tokens_to(0.56, run) is None


def test_what_was_lost_again_was_not_reached() -> None:
    assert tokens_to(0.5, curve_result("arm", [*[0.8] * 10, *[0.0] * 10])) is None


def test_half_the_tokens_are_a_ratio_of_a_half_with_the_interval_of_its_seeds() -> None:
    """The flat arm is there with the last tenth, after 20 steps; the others with steps 8 and 16."""
    flat = [curve_result("flat", RISING, seed=seed) for seed in range(3)]
    own = [
        curve_result("tree", [*[0.0] * (first - 1), *[1.0] * (21 - first)], seed=first)
        for first in (8, 16)
    ]
    found = token_ratio(own, flat)
    assert found is not None
    assert (found.flat, found.level) == ("flat", pytest.approx(97.5))
    assert (found.tokens, found.flat_tokens) == ([8000, 16_000], [20_000] * 3)
    mean = (8 * 16) ** 0.5 / 20
    # Standard error of the log: half of log 2; t(0.975, 1) = 12.7062
    assert found.ratio.mean == pytest.approx(mean)
    assert found.ratio.high == pytest.approx(mean * 2 ** (12.7062 / 2), rel=1e-4)
    assert not found.is_bound


def test_a_run_that_never_gets_there_makes_a_lower_bound_without_an_interval() -> None:
    flat = [curve_result("flat", RISING)]
    own = [curve_result("tree", FAST, seed=0), curve_result("tree", [0.1] * 40, seed=1)]
    found = token_ratio(own, flat)
    assert found is not None and found.is_bound
    assert found.tokens == [10_000, None]
    # 10 k and all of its 40 k tokens, over 20 k
    assert found.ratio.mean == pytest.approx(1.0)
    assert np.isnan(found.ratio.low) and str(found) == "> 1.00"


def test_a_flat_run_below_the_level_of_its_arm_counts_with_all_its_tokens() -> None:
    flat = [curve_result("flat", RISING, seed=0), curve_result("flat", [0.5] * 20, seed=1)]
    found = token_ratio([curve_result("tree", FAST, seed=seed) for seed in range(2)], flat)
    assert found is not None
    assert found.level == pytest.approx((97.5 + 50) / 2)
    assert (found.tokens, found.flat_tokens) == ([8000, 8000], [15_000, None])
    assert found.ratio.mean == pytest.approx(8 / (15 * 20) ** 0.5)
    assert not found.is_bound
    itself = token_ratio(flat, flat)
    assert itself is not None
    assert str(itself) == "1.00"


def test_rewards_of_what_was_chosen_have_no_ratio() -> None:
    flat = [curve_result("flat", RISING)]
    chosen = curve_result("dapo", RISING, more="gate:\n  max_redraws: 2\n")
    assert token_ratio([chosen], flat) is None
    assert token_ratio(flat, []) is None
