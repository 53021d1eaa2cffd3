"""The choice of a shape by closed forms, and in simulation that it comes to the right one."""

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from tests.support.learning.simulated_forks import chain_forks, early_forks, late_forks
from treerpo_ray.algo.forks.adaptive_shape import (
    LEAST_GAIN,
    ShapeChoice,
    choice_by,
    is_measured,
    largest_forks,
    measured_cuts,
    measures,
    num_measured,
    single_answers,
)
from treerpo_ray.algo.forks.rule import CutSamples, Fork, ForkEstimate, fork_estimate
from treerpo_ray.algo.forks.samples import TreeGradients, step_samples


def told(depth: int, *, within: float, between: float, before: float, after: float) -> ForkEstimate:
    """What trees tell that have just these variances and tokens, so many of them that what they
    have not seen is little; E g is 0."""
    ones = np.ones(MANY)
    samples = CutSamples(
        square=(within + between) * ones,
        product=between * ones,
        others=0 * ones,
        num_others=(MANY - 1) * ones,
        before=before * ones,
        after=after * ones,
        num_prefixes=ones,
    )
    return ForkEstimate(depth=depth, samples=samples)


MANY = 100_000
LATE = {"within": 15.0, "between": 1.0, "before": 16.0, "after": 4.0}
"""16 sure tokens, then 4 that are all to be right, each at 1/2."""

# Closed forms ------------------------------------------------------------------------------------


def test_late_uncertainty_is_forked_at_by_eight() -> None:
    share = (1 + 15 / 8) / 16 * 48 / 20
    found = choice_by([told(1, **LATE)], 2)
    assert found is not None and found.num_children == (1, 8)
    assert found.token_share == pytest.approx(share, rel=1e-3)


def test_of_several_places_that_of_the_fewest_tokens_is_forked_at_and_no_other() -> None:
    worse = LATE | {"within": 3.0}
    for depth in (1, 2, 3):
        estimates = [told(d, **(LATE if d == depth else worse)) for d in (1, 2, 3)]
        found = choice_by(estimates, 4)
        assert found is not None
        assert found.num_children == tuple(8 if level == depth else 1 for level in range(4))


def test_a_place_of_which_nothing_is_known_is_not_chosen() -> None:
    found = choice_by([told(2, **LATE)], 3)
    assert found is not None and found.num_children == (1, 1, 8)
    assert choice_by([], 3) is None


@pytest.mark.parametrize(
    "variances",
    [
        {"within": 0.0, "between": 1.0},  # an early decision, then a sure rest
        {"within": 0.24, "between": 1.0},  # less than b / a of it
        {"within": 0.5, "between": 1.0},  # more, but hardly
    ],
)
def test_where_no_fork_saves_a_tenth_answers_are_single(variances: dict[str, float]) -> None:
    found = choice_by([told(1, **(LATE | variances))], 2)
    assert found == ShapeChoice(num_children=(1, 1), token_share=1.0)


def test_a_fork_is_grown_just_where_its_whole_number_of_answers_gains_enough() -> None:
    grown = []
    for within in np.linspace(0.3, 2.0, 200):
        fork = Fork(**(LATE | {"within": within}))
        best = min(fork.token_share(number) for number in range(2, 17))
        found = choice_by([told(1, **(LATE | {"within": within}))], 2)
        assert found is not None
        if abs(1 / best - LEAST_GAIN) > 1e-3:
            assert (found.num_children != (1, 1)) == (1 / best > LEAST_GAIN)
        grown.append(found.num_children != (1, 1))
    assert 20 < sum(grown) < 180 and grown == sorted(grown)


def test_measured_are_the_second_learner_step_and_each_so_many_behind_it() -> None:
    assert [step for step in range(25) if is_measured(step, 10)] == [1, 11, 21]
    assert [step for step in range(5) if is_measured(step, 1)] == [1, 2, 3, 4]
    assert not any(is_measured(step, 0) for step in range(25))


@pytest.mark.parametrize(
    ("num_trees", "places"),
    [
        (1, [0]),
        (8, list(range(8))),
        (12, [0, 2, 3, 5, 6, 8, 9, 11]),  # those that begin another of eight equal parts
        (16, [0, 2, 4, 6, 8, 10, 12, 14]),
        (64, list(range(0, 64, 4))),
    ],
)
def test_a_quarter_of_a_learner_steps_trees_measures_in_even_distances_and_eight_at_least(
    num_trees: int, places: list[int]
) -> None:
    assert [place for place in range(num_trees) if measures(place, num_trees)] == places
    assert num_measured(num_trees) == len(places)


@pytest.mark.parametrize(
    ("shape", "cuts", "largest"),
    [
        ((1, 4), (1,), ((1, 16),)),
        ((2, 1, 3), (2,), ((1, 1, 16),)),
        ((1, 2, 2), (1, 2), ((1, 16, 1), (1, 1, 16))),
        ((8,), (), ()),
        ((8, 1), (), ()),
    ],
)
def test_places_to_fork_are_those_behind_a_first_step_whose_children_have_siblings(
    shape: tuple[int, ...], cuts: tuple[int, ...], largest: tuple[tuple[int, ...], ...]
) -> None:
    assert measured_cuts(shape) == cuts
    assert largest_forks(shape) == largest
    assert single_answers(len(shape)) == tuple(1 for _ in shape)


# Simulation --------------------------------------------------------------------------------------


def choices(
    make: Callable[[np.random.Generator, int, int], list[TreeGradients]], seed: int, num_trees: int
) -> list[ShapeChoice]:
    """What is chosen after each of ten looks at so many trees [1, 4], by the newest five."""
    rng, looks, found = np.random.default_rng(seed), deque[CutSamples](maxlen=5), []
    for _ in range(10):
        looks.append(step_samples(make(rng, num_trees, 4), 1))
        estimate = fork_estimate(1, looks)
        assert estimate is not None
        choice = choice_by([estimate], 2)
        assert choice is not None
        found.append(choice)
    return found


def test_where_late_tokens_decide_the_choice_comes_to_about_eight_answers() -> None:
    """N* is 8 of 16 prompts. Of a few trees the number is uncertain, but not that a fork pays, and
    what it needs then is hardly more: the tokens are flat in N about the best one."""
    many = choices(late_forks, 0, 1000)[4:]
    assert all(6 <= choice.num_children[1] <= 10 for choice in many)
    fork = Fork(within=16.0, between=1.0, before=16, after=4)
    for seed in range(5):
        for choice in choices(late_forks, seed, 24)[4:]:
            needed = fork.token_share(choice.num_children[1])
            assert needed < 1.15 * fork.token_share(fork.children) < 0.5


def test_where_an_early_token_decides_all_answers_are_single_after_any_look() -> None:
    for seed in range(5):
        assert {each.num_children for each in choices(early_forks, seed, 24)} == {(1, 1)}


@pytest.mark.parametrize("right", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(
    ("is_against_mean", "contexts"),
    [
        (True, 16),
        (False, 1),  # RAFT's credit of prompts that are all alike: the mean gradient is large
    ],
)
def test_where_a_wrong_prefix_is_rare_no_fork_is_grown_for_want_of_one(
    right: float, is_against_mean: bool, contexts: int
) -> None:
    """Eight independent tokens, a cut in their middle: no number of continuations gains, N = 2
    needs 1.1 of the tokens, and 16 more than four times as many. In a third of the looks at 40
    trees that are right 95 times of 100 no prefix is wrong."""
    baseline = right if is_against_mean else 0.0
    make = partial(chain_forks, chance=right ** (1 / 8), baseline=baseline, contexts=contexts)
    known = fork_estimate(1, [step_samples(make(np.random.default_rng(99), 8000, 2), 1)])
    assert known is not None and known.fork.token_share(2) > 1 and known.fork.token_share(16) > 4
    needed = [
        known.fork.token_share(choice.num_children[1])
        for seed in range(20)
        for choice in choices(make, seed, 8)[4:]
    ]
    assert np.mean(needed) < 1.1
