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
    """The last tenth of the flat arm is 0.975, nine tenths of it 0.8775: it is there with its 18th
    step; of the other arm one run with step 8 and one with step 16, which is where both stay."""
    flat = [curve_result("flat", RISING, seed=seed) for seed in range(3)]
    own = [
        curve_result("tree", [*[0.0] * (first - 1), *[1.0] * (21 - first)], seed=first)
        for first in (8, 16)
    ]
    found = token_ratio(own, flat)
    assert found is not None
    assert (found.flat, found.level) == ("flat", pytest.approx(87.75))
    assert (found.tokens, found.flat_tokens) == (16_000, 18_000)
    # Left out, they are there after 16 and 8: standard error of the log half of log 2;
    # t(0.975, 1) = 12.7062
    assert found.ratio.mean == pytest.approx(16 / 18)
    assert found.ratio.high == pytest.approx(16 / 18 * 2 ** (12.7062 / 2), rel=1e-4)
    assert not found.is_bound


def test_an_arm_that_never_gets_there_makes_a_lower_bound_without_an_interval() -> None:
    flat = [curve_result("flat", RISING, seed=seed) for seed in range(2)]
    own = [curve_result("tree", FAST, seed=0), curve_result("tree", [0.1] * 40, seed=1)]
    found = token_ratio(own, flat)
    assert found is not None and found.is_bound and found.tokens is None
    # 20 k and 40 k tokens in the mean, over 18 k
    assert found.ratio.mean == pytest.approx(30 / 18)
    assert np.isnan(found.ratio.low) and str(found) == "> 1.67"


def test_a_flat_arm_needs_what_takes_it_nearly_to_where_it_ends() -> None:
    early = [curve_result("flat", [*[0.1] * 4, *[0.5] * 16], seed=seed) for seed in range(2)]
    found = token_ratio([curve_result("tree", FAST)], early)
    assert found is not None
    assert (found.level, found.tokens, found.flat_tokens) == (pytest.approx(45), 5000, 5000)
    mixed = [early[0], curve_result("flat", RISING, seed=1)]
    found = token_ratio([curve_result("tree", FAST, seed=seed) for seed in range(2)], mixed)
    assert found is not None
    assert found.level == pytest.approx(0.9 * (97.5 + 50) / 2)
    # 0.66: above it is the mean of the better run's 17th step, 0.85, and the other's 18th, 0.5
    assert (found.tokens, found.flat_tokens) == (7000, 17_000)
    assert found.ratio.mean == pytest.approx(7 / 17) and not found.is_bound
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
    """55 steps of 16 answers, whose chance goes from 22 % towards 62 %, as W1's does."""
    rng = np.random.default_rng([seed, round(100 * speed)])
    chances = 0.22 + 0.4 * (1 - np.exp(-np.arange(1, 56) * speed / 25))
    return curve_result(arm, list(rng.binomial(16, chances) / 16), seed=seed)


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_of_noisy_runs_the_share_of_tokens_comes_out_whatever_it_is(share: float) -> None:
    """Forty comparisons of five seeds each."""
    found: list[TokenRatio] = []
    for number in range(40):
        seeds = range(5 * number, 5 * number + 5)
        flat = [noisy("flat", 1.0, 1000 + seed) for seed in seeds]
        ratio = token_ratio([noisy("own", 1 / share, seed) for seed in seeds], flat)
        assert ratio is not None
        found.append(ratio)
    assert np.median([each.ratio.mean for each in found]) == pytest.approx(share, rel=0.15)
    held = [each.ratio.low <= share <= each.ratio.high for each in found if not each.is_bound]
    assert len(held) >= 20, "a slow arm may not get there"
    assert np.mean(held) >= 0.85
