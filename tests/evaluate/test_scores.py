"""Scores: closed forms, counts by brute force, and intervals that cover as often as they say."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.evaluations import interval
from treerpo_ray.evaluate.scores import (
    Estimate,
    Samples,
    Score,
    majority,
    mean_estimate,
    mean_over_benchmarks,
    median_length,
    paired_differences,
    pass_at,
    powers_of_two,
    scores,
    weighted_medians,
)

NAN = float("nan")
NORMAL_975 = 1.959964
"""The 97.5 % quantile of the normal distribution."""


def samples(
    is_correct: list[float], group: list[int] | None = None, length: list[int] | None = None
) -> Samples:
    count = len(is_correct)
    return Samples(
        is_correct=np.array(is_correct),
        length=np.array(length or [2] * count),
        is_cut_off=np.zeros(count, bool),
        group=None if group is None else np.array(group),
    )


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct: int, k: int) -> None:
    drawn = [1.0] * correct + [0.0] * (5 - correct)
    subsets = list(combinations(drawn, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at(samples(drawn), k) == pytest.approx(expected)


def test_samples_without_a_verdict_are_not_among_those_of_pass_at_k() -> None:
    assert pass_at(samples([1, NAN, 0, 0]), 2) == pytest.approx(2 / 3)
    assert np.isnan(pass_at(samples([1, NAN, NAN]), 2))


@pytest.mark.parametrize(
    ("is_correct", "group", "expected"),
    [
        ([1, 1, 0], [0, 0, 1], 1.0),
        ([1, 0, 0], [0, 1, 1], 0.0),
        ([1, 0, 0, 1], [0, 1, 1, 0], 0.5),  # a tie: one of the two is drawn
        ([1, 0, 0], [0, 1, 2], 1 / 3),
        ([1, 0, 0, 0], [0, -1, -1, -1], 1.0),  # who has no answer has no vote
        ([0, 0], [-1, -1], 0.0),
        ([NAN, NAN, 1], [0, 0, 1], 1.0),
    ],
)
def test_the_majority_by_hand(is_correct, group, expected) -> None:
    assert majority(samples(is_correct, group)) == pytest.approx(expected)


def test_a_majority_is_unknown_without_verdicts_or_groups() -> None:
    assert np.isnan(majority(samples([NAN, NAN], [0, 0])))
    assert np.isnan(majority(samples([1, 0], None)))


def test_the_scores_of_two_problems_by_hand() -> None:
    problems = [
        samples([1, 0, 0, 0], [0, 1, 1, 2], [1, 2, 3, 4]),
        samples([1, 1, 1, NAN], [0, 0, 0, -1], [5, 6, 7, 8]),
    ]
    found = scores(problems, pass_ks=powers_of_two(4), num_samples=4, seed=0)
    assert found["pass@1"].value == pytest.approx((1 / 4 + 1) / 2)
    assert found["pass@2"].value == pytest.approx((1 / 2 + 1) / 2)
    assert (found["pass@4"].value, found["pass@4"].num_problems) == (1.0, 1)
    assert found["maj@4"].value == pytest.approx((0 + 1) / 2)
    assert found["length"].value == pytest.approx((2.5 + 6.5) / 2)
    assert found["median_length"].value == pytest.approx(4.5)
    assert found["cut_off"].value == 0
    assert (found["length"].low, found["length"].high) == (2.5, 6.5)


def test_with_partial_credit_the_mean_reward_stands_beside_the_share_of_whole_rewards() -> None:
    """Rewards 1, 1/2, 1/4 and none; then 0 and 1: one of three and one of two are right."""
    part = replace(samples([1, 0, 0, NAN]), reward=np.array([1, 0.5, 0.25, NAN]))
    plain = samples([0, 1, 1, 0])
    found = scores([part, plain], pass_ks=(1, 2), num_samples=4, seed=0)
    assert found["reward"].value == pytest.approx((1.75 / 3 + 1 / 2) / 2)
    assert found["pass@1"].value == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["pass@2"].value == pytest.approx((2 / 3 + 5 / 6) / 2)
    less = paired_differences([part], [plain], pass_ks=(1,), num_samples=4, seed=0)
    assert less["reward"].value == pytest.approx(1.75 / 3 - 1 / 2)
    assert "reward" not in scores([plain], pass_ks=(1,), num_samples=4, seed=0)


def test_requests_that_failed_are_no_short_samples() -> None:
    problems = [
        samples([1, NAN], None, [6, 0]), samples([NAN, NAN], None, [0, 0]),
        samples([0, 1], None, [2, 4]),
    ]  # fmt: skip
    problems[0].is_cut_off[0] = True
    found = scores(problems, pass_ks=(1, 2), num_samples=2, seed=0)
    assert (found["length"].value, found["length"].num_problems) == ((6 + 3) / 2, 2)
    assert (found["median_length"].value, found["median_length"].num_problems) == (4, 2)
    assert (found["cut_off"].value, found["cut_off"].num_problems) == (1 / 2, 2)
    assert scores(problems[1:2], pass_ks=(1, 2), num_samples=2, seed=0) == {}


def test_powers_of_two_end_at_the_number_of_samples() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 8)] == [(1,), (1, 2), (1, 2), (1, 2, 4, 8)]


@given(data=st.data(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_a_weighted_median_is_that_of_the_values_repeated(
    data: st.DataObject, lengths: list[int]
) -> None:
    weights = st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))
    times = np.array(data.draw(st.lists(weights.filter(any), min_size=1, max_size=5)))
    ascending = np.sort(lengths)
    found = weighted_medians(ascending, times)
    assert found.tolist() == [np.median(np.repeat(ascending, row)) for row in times]


def test_a_median_is_resampled_by_problem_with_all_samples() -> None:
    """Of two problems both, or one twice: each pair has the chance 1/4."""
    problems = [samples([0, 0, 0], length=[1, 2, 9]), samples([0, 0], length=[5, 5])]
    found = median_length(problems, seed=0)
    assert found.value == 5
    medians, counts = np.unique(found.resampled, return_counts=True)
    assert medians.tolist() == [2, 5]
    assert counts / counts.sum() == pytest.approx([1 / 4, 3 / 4], abs=0.02)


def test_two_medians_of_the_same_problems_are_resampled_together() -> None:
    """Though one side has more samples, so that fewer resamples of it are held at a time."""
    rng = np.random.default_rng(0)
    ours = [samples([0.0] * 3, length=rng.integers(1, 99, 3).tolist()) for _ in range(150)]
    theirs = [samples([0.0] * 6, length=[*each.length] * 2) for each in ours]
    found = paired_differences(ours, theirs, pass_ks=(1,), num_samples=3, seed=0)
    score = found["median_length"].score
    assert (score.value, score.low, score.high, score.num_problems) == (0, 0, 0, 150)


def test_paired_differences_know_nothing_of_what_both_share() -> None:
    """Of one sample a problem; ours has in addition a fifth of what theirs has wrong."""
    rng = np.random.default_rng(0)
    is_right = rng.random(400) < 0.5
    gain = (~is_right & (rng.random(400) < 0.2)).astype(float)
    ours, theirs = ([samples([right]) for right in side] for side in (is_right + gain, is_right))
    found = paired_differences(ours, theirs, pass_ks=(1,), num_samples=1, seed=0)["pass@1"].score
    half = 1.959964 * gain.std() / 20
    assert found.value == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_paired_differences_leave_out_what_one_side_does_not_know() -> None:
    ours = [samples([1.0], length=[3]), samples([NAN], length=[0]), samples([1.0], length=[5])]
    theirs = [samples([0.0], length=[1]), samples([1.0], length=[9]), samples([NAN], length=[1])]
    found = paired_differences(ours, theirs, pass_ks=(1,), num_samples=1, seed=0)
    assert (found["pass@1"].value, found["pass@1"].num_problems) == (1.0, 1)
    assert (found["length"].value, found["length"].num_problems) == ((2 + 4) / 2, 2)
    assert (found["median_length"].value, found["median_length"].num_problems) == (4 - 1, 2)
    assert "maj@1" not in found


def test_an_interval_of_paired_differences_covers_about_95_times_in_100() -> None:
    """200 problems of any hardness, of which ours gets each right more often by 0.1."""
    rng, covered = np.random.default_rng(1), 0
    for trial in range(400):
        chances = 0.9 * rng.random(200)
        ours, theirs = (rng.binomial(8, chances + gain) / 8 for gain in (0.1, 0.0))
        score = mean_estimate(ours - theirs, seed=trial).score
        covered += score.low <= 0.1 <= score.high
    assert 0.92 <= covered / 400 <= 0.975


def test_the_mean_over_benchmarks_by_hand_has_only_what_all_have() -> None:
    first, second = (
        {
            name: Estimate(value=value, resampled=np.array([value, value + 2]), num_problems=3)
            for name, value in values.items()
        }
        for values in ({"pass@1": 1.0, "pass@2": 1.0}, {"pass@1": 4.0})
    )
    (mean,) = mean_over_benchmarks([first, second]).items()
    assert mean == ("pass@1", Score(value=2.5, low=2.55, high=4.45, num_problems=6))


def test_the_interval_of_a_mean_over_benchmarks_is_as_wide_as_those_of_its_parts_tell() -> None:
    """Benchmarks of 30 and 500 problems count alike: the smaller one makes most of the width."""
    rng = np.random.default_rng(0)
    parts = [(rng.random(size) < 0.4).astype(float) for size in (30, 500)]
    found = [{"pass@1": mean_estimate(part, seed=seed)} for seed, part in enumerate(parts)]
    score = mean_over_benchmarks(found)["pass@1"]
    half = 1.959964 * sum(part.var() / len(part) for part in parts) ** 0.5 / 2
    assert score.value == pytest.approx((parts[0].mean() + parts[1].mean()) / 2)
    assert [score.low, score.high] == pytest.approx(
        [score.value - half, score.value + half], abs=0.07 * half
    )


def test_the_interval_of_a_mean_does_not_depend_on_the_order() -> None:
    values = np.random.default_rng(0).binomial(4, 0.5, 100) / 4
    assert interval(values, 3) == interval(values[::-1], 3)


def bernoulli(num_problems: int, num_correct: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [num_correct, num_problems - num_correct])


@pytest.mark.parametrize(("num_problems", "num_correct"), [(400, 200), (1000, 100), (2000, 1500)])
def test_the_interval_of_a_bernoulli_mean_is_close_to_the_normal_one(
    num_problems: int, num_correct: int
) -> None:
    mean = num_correct / num_problems
    half = NORMAL_975 * np.sqrt(mean * (1 - mean) / num_problems)
    low, high = interval(bernoulli(num_problems, num_correct), seed=0)
    assert low == pytest.approx(mean - half, abs=0.07 * half)
    assert high == pytest.approx(mean + half, abs=0.07 * half)


def test_the_interval_of_shares_of_several_answers_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).binomial(8, 0.4, 1000) / 8
    half = NORMAL_975 * values.std() / np.sqrt(len(values))
    low, high = interval(values, seed=1)
    assert low == pytest.approx(values.mean() - half, abs=0.07 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.07 * half)


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    rng, covered, num_trials = np.random.default_rng(0), 0, 600
    for trial in range(num_trials):
        low, high = interval((rng.random(300) < 0.3).astype(float), seed=trial)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / num_trials <= 0.975


def test_an_interval_is_reproducible_and_does_not_depend_on_the_order_of_the_problems() -> None:
    values = np.random.default_rng(0).binomial(4, 0.5, 100) / 4
    assert interval(values, seed=3) == interval(values[::-1], seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


@pytest.mark.parametrize("value", [0.0, 0.375, 1.0])
def test_equal_values_leave_no_doubt(value: float) -> None:
    assert interval(np.full(50, value), seed=0) == pytest.approx((value, value))
