"""Scores: closed forms, counts by brute force, and intervals that cover as often as they say."""

from itertools import combinations

import numpy as np
import pytest

from treerpo_ray.scores import (
    Samples,
    bootstrap_interval,
    majority,
    median_length,
    paired_difference,
    pass_at,
    powers_of_two,
    scores,
)

NAN = float("nan")


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


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_resampled_median_is_that_of_the_samples_repeated(count: int) -> None:
    rng = np.random.default_rng(count)
    problems = [samples([0.0] * 3, length=rng.integers(1, 9, 3).tolist()) for _ in range(count)]
    found = median_length(problems, seed=0)
    assert found.value == np.median(np.concatenate([problem.length for problem in problems]))
    medians = [
        np.median(np.concatenate([problems[i].length for i in rng.integers(0, count, count)]))
        for _ in range(4000)
    ]
    assert [found.low, found.high] == pytest.approx(np.percentile(medians, [2.5, 97.5]), abs=1.0)


def test_paired_differences_know_nothing_of_what_both_share() -> None:
    rng = np.random.default_rng(0)
    hardness, gain = rng.random(400), rng.normal(0.05, 0.1, 400)
    found = paired_difference(hardness + gain, hardness, seed=0)
    half = 1.959964 * gain.std() / 20
    assert found.value == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.1 * half)
    assert paired_difference(hardness, hardness, seed=0).value == 0


def test_paired_differences_leave_out_what_one_side_does_not_know() -> None:
    found = paired_difference(np.array([1.0, NAN, 0.5]), np.array([0.0, 1.0, NAN]), seed=0)
    assert (found.value, found.num_problems) == (1.0, 1)


def test_an_interval_of_paired_differences_covers_about_95_times_in_100() -> None:
    rng, covered = np.random.default_rng(1), 0
    for trial in range(400):
        shares = rng.random(200)
        ours, theirs = (rng.binomial(8, np.clip(shares + d, 0, 1)) / 8 for d in (0.0, 0.0))
        found = paired_difference(ours, theirs, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 400 <= 0.975


def test_the_interval_of_a_mean_does_not_depend_on_the_order() -> None:
    values = np.random.default_rng(0).binomial(4, 0.5, 100) / 4
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values[::-1], seed=3)
