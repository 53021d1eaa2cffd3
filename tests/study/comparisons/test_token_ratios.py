"""Tokens to the same level, on curves whose answer is known."""

import numpy as np
import pytest

from tests.support.saved_runs.results import curve_result
from treerpo_ray.study.comparisons.comparison import Result
from treerpo_ray.study.comparisons.token_ratios import ArmCurve, TokenRatio, token_ratio

RISING = [0.05 * step for step in range(1, 21)]
"""Twenty steps, of which the last two are the last tenth: 0.975."""
FAST = [min(0.1 * step, 1.0) for step in range(1, 21)]


def test_a_run_is_there_where_its_rewards_first_stay_at_a_level() -> None:
    # The second step is above the level, but the mean of all steps up to the fourth is not
    early = curve_result("arm", [0.1, 0.6, 0.1, 0.2, *[0.6] * 16])
    assert ArmCurve.of([early]).tokens_to(0.5) == 5000
    assert ArmCurve.of([curve_result("arm", FAST)]).tokens_to(0.5) == 5000
    assert ArmCurve.of([early]).tokens_to(0.0) == 1000
    assert ArmCurve.of([early]).tokens_to(0.61) is None


def test_a_single_good_step_at_the_end_is_no_level() -> None:
    run = curve_result("arm", [*[0.2] * 19, 0.9])
    assert ArmCurve.of([run]).tokens_to(0.5) == 20_000, "the mean of the last two is 0.55"
    assert ArmCurve.of([run]).tokens_to(0.56) is None


def test_what_was_lost_again_was_not_reached() -> None:
    assert ArmCurve.of([curve_result("arm", [*[0.8] * 10, *[0.0] * 10])]).tokens_to(0.5) is None


def test_seeds_make_one_curve_and_each_left_out_the_interval() -> None:
    """The flat arm is there with the last tenth, after 20 steps; of the other arm one run with step
    8 and one with step 16, which is where both stay."""
    flat = [curve_result("flat", RISING, seed=seed) for seed in range(3)]
    own = [
        curve_result("tree", [*[0.0] * (first - 1), *[1.0] * (21 - first)], seed=first)
        for first in (8, 16)
    ]
    found = token_ratio(own, flat)
    assert found is not None
    assert (found.flat, found.level) == ("flat", pytest.approx(97.5))
    assert (found.tokens, found.flat_tokens) == (16_000, 20_000)
    # Left out, they are there after 16 and 8: standard error of the log half of log 2;
    # t(0.975, 1) = 12.7062
    assert found.ratio.mean == pytest.approx(16 / 20)
    assert found.ratio.high == pytest.approx(16 / 20 * 2 ** (12.7062 / 2), rel=1e-4)
    assert not found.is_bound


def test_an_arm_that_never_gets_there_makes_a_lower_bound_without_an_interval() -> None:
    flat = [curve_result("flat", RISING, seed=seed) for seed in range(2)]
    own = [curve_result("tree", FAST, seed=0), curve_result("tree", [0.1] * 40, seed=1)]
    found = token_ratio(own, flat)
    assert found is not None and found.is_bound and found.tokens is None
    # 20 k and 40 k tokens in the mean, over 20 k
    assert found.ratio.mean == pytest.approx(1.5)
    assert np.isnan(found.ratio.low) and str(found) == "> 1.50"


def test_a_flat_arm_needs_what_takes_it_to_where_it_ends() -> None:
    early = [curve_result("flat", [*[0.1] * 4, *[0.5] * 16], seed=seed) for seed in range(2)]
    found = token_ratio([curve_result("tree", FAST)], early)
    assert found is not None
    assert (found.level, found.tokens, found.flat_tokens) == (pytest.approx(50), 5000, 5000)
    mixed = [early[0], curve_result("flat", RISING, seed=1)]
    found = token_ratio([curve_result("tree", FAST, seed=seed) for seed in range(2)], mixed)
    assert found is not None
    assert found.level == pytest.approx((97.5 + 50) / 2)
    # The last tenth, 0.7375, and the 0.9 of the better run before it are above that together
    assert (found.tokens, found.flat_tokens) == (8000, 18_000)
    assert found.ratio.mean == pytest.approx(8 / 18) and not found.is_bound
    itself = token_ratio(mixed, mixed)
    assert itself is not None
    assert str(itself) == "1.00"


def test_one_seed_has_no_interval() -> None:
    alone = token_ratio([curve_result("tree", FAST)], [curve_result("flat", RISING)])
    assert alone is not None
    assert str(alone) == "0.50"


def test_rewards_of_what_was_chosen_have_no_ratio() -> None:
    flat = [curve_result("flat", RISING)]
    chosen = curve_result("dapo", RISING, more="gate:\n  max_redraws: 2\n")
    assert token_ratio([chosen], flat) is None
    assert token_ratio(flat, []) is None


def noisy(arm: str, speed: float, seed: int) -> Result:
    """55 steps of 16 answers, whose chance rises from 22 % to 53 % over 55 / speed of them."""
    rng = np.random.default_rng([seed, round(100 * speed)])
    chances = 0.22 + 0.31 * np.minimum(np.arange(1, 56) * speed / 55, 1)
    return curve_result(arm, list(rng.binomial(16, chances) / 16), seed=seed)


def test_of_noisy_runs_half_the_tokens_come_out_as_that_and_arms_that_are_alike_as_alike() -> None:
    """Forty comparisons of five seeds each: ratios are drawn towards 1, and some are bounds."""
    found: dict[float, list[TokenRatio]] = {1.0: [], 2.0: []}
    for number in range(40):
        seeds = range(5 * number, 5 * number + 5)
        flat = [noisy("flat", 1.0, 1000 + seed) for seed in seeds]
        for speed, ratios in found.items():
            ratio = token_ratio([noisy("own", speed, seed) for seed in seeds], flat)
            assert ratio is not None
            ratios.append(ratio)
    halves, alike = ([each for each in found[speed] if not each.is_bound] for speed in (2.0, 1.0))
    assert len(halves) >= 30
    assert 0.45 < np.median([each.ratio.mean for each in halves]) < 0.7
    assert np.mean([each.ratio.low < 0.5 < each.ratio.high for each in halves]) > 0.75
    assert np.mean([each.ratio.high < 1 for each in alike]) < 0.1
