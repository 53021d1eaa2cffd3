"""Lengths of answers at the same reward, on curves whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from tests.support.saved_runs.results import curve_result
from treerpo_ray.study.comparisons.lengths import halfway_length
from treerpo_ray.study.comparisons.token_ratios import ArmCurve

RISING = [0.05 * step for step in range(1, 21)]
"""Twenty steps: the first tenth is 0.075, the last 0.975, and 0.525 is half-way."""
SHORTER = [100.0 - 2 * step for step in range(1, 21)]


def test_the_length_is_that_around_the_place_where_the_reward_is_half_way() -> None:
    """The eleventh step is there, of 78 tokens, as it and its two neighbours are in the mean."""
    flat = [curve_result("flat", RISING, lengths=SHORTER)]
    curve = ArmCurve.of(flat)
    assert curve.halfway == pytest.approx(0.525) and curve.tokens_to(curve.halfway) == 11_000
    found = halfway_length(flat, {}, flat)
    assert found is not None
    assert (found.level, found.tokens.mean) == (pytest.approx(52.5), pytest.approx(78))
    assert str(found.tokens) == "78.0" and found.over == {}


def test_an_arm_that_is_there_at_its_end_or_never_has_the_length_of_its_end() -> None:
    """Half-way comes with the last tenth alone, whose answers have 30 and 20 tokens."""
    flat = [curve_result("flat", RISING)]
    late = [curve_result("late", [*[0.1] * 18, 0.9, 0.9], lengths=[*[90.0] * 18, 30.0, 20.0])]
    found = halfway_length(late, {}, flat)
    assert found is not None and found.tokens.mean == 25
    never = [curve_result("never", [0.1] * 20, lengths=[*[90.0] * 18, 30.0, 20.0])]
    assert halfway_length(never, {}, flat) is None
    assert ArmCurve.of(never).length_at(0.5) == 25
    beside = halfway_length(late, {"never": never, "none": []}, flat)
    assert beside is not None and beside.over == {}


def test_lengths_are_held_against_others_with_an_interval_over_seeds() -> None:
    """Of runs that are alike but for 60 and 80 tokens, and 100 and 140, the mean is of both; left
    out, they are the other: standard errors of the logs log(8/6)/2 and log(14/10)/2."""
    flat = [
        curve_result("flat", RISING, seed=seed, lengths=[each] * 20)
        for seed, each in enumerate((100.0, 140.0))
    ]
    own = [
        curve_result("tree", RISING, seed=seed, lengths=[each] * 20)
        for seed, each in enumerate((60.0, 80.0))
    ]
    found = halfway_length(own, {"flat": flat}, flat)
    assert found is not None
    assert found.tokens.mean == 70
    # Standard error 10, t(0.975, 1) = 12.7062
    assert found.tokens.high == pytest.approx(70 + 10 * 12.7062, rel=1e-4)
    ratio = found.over["flat"]
    assert ratio.mean == pytest.approx(70 / 120)
    squares = np.log([8 / 6, 14 / 10]) ** 2 / 4
    freedom = squares.sum() ** 2 / (squares**2).sum()
    half = stats.t.ppf(0.975, freedom) * squares.sum() ** 0.5
    assert np.log(ratio.high / ratio.mean) == pytest.approx(half)
    assert ratio.low * ratio.high == pytest.approx(ratio.mean**2)


def test_answers_of_what_was_chosen_are_not_compared() -> None:
    flat = [curve_result("flat", RISING)]
    chosen = [curve_result("dapo", RISING, more="gate:\n  max_redraws: 2\n")]
    assert halfway_length(chosen, {}, flat) is None
    assert halfway_length(flat, {}, []) is None
    beside = halfway_length(flat, {"dapo": chosen}, flat)
    assert beside is not None and beside.over == {}
