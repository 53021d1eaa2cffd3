"""Scores: closed forms, counts by brute force, and the intervals of lengths."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.evaluate.scores import (
    Samples,
    Score,
    majority,
    mean_length,
    mean_over_benchmarks,
    median_length,
    paired,
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
    both = paired([part], [plain], pass_ks=(1,), num_samples=4, seed=0)["reward"]
    assert (both.ours.value, both.theirs.value) == (pytest.approx(1.75 / 3), 1 / 2)
    assert both.difference.value == pytest.approx(1.75 / 3 - 1 / 2)
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
    found = paired(ours, theirs, pass_ks=(1,), num_samples=3, seed=0)
    for name in ("length", "median_length"):
        score = found[name].difference
        assert (score.value, score.low, score.high, score.num_problems) == (0, 0, 0, 150)
        assert found[name].ours.low < found[name].ours.value < found[name].ours.high


def test_paired_know_nothing_of_what_both_share() -> None:
    """Of one sample a problem; ours has in addition a fifth of what theirs has wrong."""
    rng = np.random.default_rng(0)
    is_right = rng.random(400) < 0.5
    gain = (~is_right & (rng.random(400) < 0.2)).astype(float)
    ours, theirs = ([samples([right]) for right in side] for side in (is_right + gain, is_right))
    found = paired(ours, theirs, pass_ks=(1,), num_samples=1, seed=0)["pass@1"].difference
    half = 1.959964 * gain.std() / 20
    assert found.value == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_paired_leave_out_what_one_side_does_not_know() -> None:
    ours = [samples([1.0], length=[3]), samples([NAN], length=[0]), samples([1.0], length=[5])]
    theirs = [samples([0.0], length=[1]), samples([1.0], length=[9]), samples([NAN], length=[1])]
    found = paired(ours, theirs, pass_ks=(1,), num_samples=1, seed=0)
    less = {name: (pair.difference.value, pair.ours.num_problems) for name, pair in found.items()}
    assert less["pass@1"] == (1.0, 1)
    assert less["length"] == ((2 + 4) / 2, 2)
    assert less["median_length"] == (4 - 1, 2)
    assert "maj@1" not in found


def test_the_mean_over_benchmarks_by_hand_has_only_what_all_have() -> None:
    first, second = (
        {
            name: Score(value=value, low=value - 3, high=value + 6, num_problems=3)
            for name, value in values.items()
        }
        for values in ({"pass@1": 1.0, "pass@2": 1.0}, {"pass@1": 4.0})
    )
    (mean,) = mean_over_benchmarks([first, second]).items()
    low, high = (pytest.approx(2.5 + end * 2**0.5 / 2) for end in (-3, 6))
    assert mean == ("pass@1", Score(value=2.5, low=low, high=high, num_problems=6))


def test_the_interval_of_a_mean_length_is_close_to_the_normal_one() -> None:
    lengths = np.random.default_rng(0).integers(1, 99, 1000).astype(float)
    half = NORMAL_975 * lengths.std() / np.sqrt(len(lengths))
    score = mean_length(lengths, seed=0).score
    assert [score.low, score.high] == pytest.approx(
        [score.value - half, score.value + half], abs=0.07 * half
    )


@pytest.mark.parametrize(("verdict", "ends"), [(0.0, "low"), (1.0, "high")])
def test_what_never_differs_is_not_claimed_to_be_certain(verdict: float, ends: str) -> None:
    """Of four answers to each of 20 problems, for every share and for their differences."""
    alike = [samples([verdict] * 4, [0] * 4) for _ in range(20)]
    found = scores(alike, pass_ks=powers_of_two(4), num_samples=4, seed=0)
    assert {"pass@1", "pass@2", "pass@4", "maj@4"} < found.keys()
    for name in ("pass@1", "pass@2", "pass@4", "maj@4"):
        assert getattr(found[name], ends) == found[name].value == verdict
        assert found[name].high - found[name].low == pytest.approx(1.96**2 / (20 + 1.96**2), 1e-3)
    pair = paired(alike, alike, pass_ks=(1,), num_samples=4, seed=0)["pass@1"]
    assert pair.difference.low < pair.difference.value == 0 < pair.difference.high
