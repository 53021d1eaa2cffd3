"""Adaptive shapes: each learner step has the one that was known, and none is lost too early."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.algo.forks.adaptive_shape import is_measured, measures
from treerpo_ray.search.shapes import AdaptiveShapes, ChosenShape

MEASURING = (1, 4)
CHOSEN = [ChosenShape(1, (1, 8)), ChosenShape(4, (1, 1)), ChosenShape(7, (1, 6))]


def test_a_tree_has_the_newest_shape_up_to_what_its_step_waits_for_unless_it_measures() -> None:
    """Of nine trees eight measure, in one learner step of three."""
    shapes = AdaptiveShapes(measuring=MEASURING, every=3, trees_per_step=9, chosen=CHOSEN)
    grown = [[shapes.shape(step, place, step - 2) for place in range(9)] for step in range(11)]
    known = [
        *((1, 1), (1, 1), (1, 1)),  # nothing is known yet
        *((1, 8), (1, 8), (1, 8)),
        *((1, 1), (1, 1), (1, 1)),
        *((1, 6), (1, 6)),
    ]
    for step, shape in enumerate(known):
        counts = {MEASURING: 8, shape: 1} if step in (1, 4, 7, 10) else {shape: 9}
        assert Counter(grown[step]) == counts


def test_a_shape_that_does_not_adapt_is_the_one_whatever_was_chosen() -> None:
    shapes = AdaptiveShapes(measuring=(4, 4), every=0, trees_per_step=30, chosen=CHOSEN)
    found = {shapes.shape(step, place, step - 1) for step in range(20) for place in range(30)}
    assert found == {(4, 4)}
    assert shapes.chosen == []


@pytest.mark.parametrize("every", [1, 2, 5])
@given(told=st.lists(st.none() | st.integers(1, 16), max_size=12), staleness=st.integers(0, 3))
def test_what_is_given_up_is_nothing_that_later_steps_ask_for(
    every: int, told: list[int | None], staleness: int
) -> None:
    """A look that tells nothing chooses nothing; whatever it is, of a state no look is missed."""
    settings = {"measuring": MEASURING, "every": every, "trees_per_step": 20}
    shapes = AdaptiveShapes(**settings)
    whole: list[ChosenShape] = []
    for step, children in enumerate(told):
        if children is not None:
            whole.append(ChosenShape(step, (1, children)))
            shapes.add(whole[-1], step - staleness)
        everything = AdaptiveShapes(**settings, chosen=whole)
        for later in range(step + 1, step + 6):
            last_step = later - 1 - staleness
            for place in range(20):
                shape = shapes.shape(later, place, last_step)
                assert shape == everything.shape(later, place, last_step)
                if is_measured(later, every) and measures(place, 20):
                    assert shape == MEASURING
        assert len(shapes.chosen) <= 1 + staleness
