"""Adaptive shapes: each learner step has the one that was known, and none is lost too early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.algo.forks.adaptive_shape import is_measured
from treerpo_ray.search.shapes import AdaptiveShapes, ChosenShape

MEASURING = (1, 4)
CHOSEN = [ChosenShape(1, (1, 8)), ChosenShape(4, (1, 1)), ChosenShape(7, (1, 6))]


def test_a_step_has_the_newest_shape_up_to_what_it_waits_for_unless_it_measures() -> None:
    shapes = AdaptiveShapes(measuring=MEASURING, every=3, chosen=CHOSEN)
    assert [shapes.shape(step, step - 2) for step in range(11)] == [
        *(MEASURING, MEASURING, MEASURING),  # nothing is known yet
        *((1, 8), MEASURING, (1, 8)),
        *((1, 1), MEASURING, (1, 1)),
        *((1, 6), MEASURING),
    ]


def test_a_shape_that_does_not_adapt_is_the_one_whatever_was_chosen() -> None:
    shapes = AdaptiveShapes(measuring=(4, 4), every=0, chosen=CHOSEN)
    assert {shapes.shape(step, step - 1) for step in range(20)} == {(4, 4)}
    assert shapes.chosen == []


@pytest.mark.parametrize("every", [1, 2, 5])
@given(told=st.lists(st.none() | st.integers(1, 16), max_size=12), staleness=st.integers(0, 3))
def test_what_is_given_up_is_nothing_that_later_steps_ask_for(
    every: int, told: list[int | None], staleness: int
) -> None:
    """A look that tells nothing chooses nothing; whatever it is, of a state no look is missed."""
    shapes = AdaptiveShapes(measuring=MEASURING, every=every)
    whole: list[ChosenShape] = []
    for step, children in enumerate(told):
        if children is not None:
            whole.append(ChosenShape(step, (1, children)))
            shapes.add(whole[-1], step - staleness)
        everything = AdaptiveShapes(measuring=MEASURING, every=every, chosen=whole)
        for later in range(step + 1, step + 6):
            last_step = later - 1 - staleness
            assert shapes.shape(later, last_step) == everything.shape(later, last_step)
            if is_measured(later, every):
                assert shapes.shape(later, last_step) == MEASURING
        assert len(shapes.chosen) <= 1 + staleness
