"""The number of engines that trees need, at times and loads written down by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.engine.autoscaler import ScalingPolicy


def scaling(**changes) -> ScalingPolicy:
    fields = {"fewest": 1, "most": 4, "trees_per_engine": 8, "patience_s": 60.0}
    return ScalingPolicy(**(fields | changes))


@pytest.mark.parametrize(
    ("num_trees", "engines"),
    [(0, 1), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (32, 4), (33, 4), (10_000, 4)],
)
def test_the_engines_needed_are_the_trees_by_those_of_one_engine_within_bounds(
    num_trees, engines
) -> None:
    assert scaling().needed(num_trees) == engines


def test_engines_without_a_limit_of_trees_are_always_enough() -> None:
    assert scaling(fewest=3, most=3, trees_per_engine=None).needed(1000) == 3


def test_the_pool_grows_at_once_and_shrinks_after_its_patience() -> None:
    rule = scaling()
    loads = [(0, 4), (10, 30), (11, 0), (50, 12), (70, 0), (71, 0), (110, 0), (111, 0)]
    # 30 trees need 4 engines until 10 + 60; the 12 of second 50 need 2 until 110.
    assert [rule.target(trees, now) for now, trees in loads] == [1, 4, 4, 4, 4, 2, 2, 1]


def test_without_patience_the_pool_follows_the_trees() -> None:
    rule = scaling(patience_s=0.0)
    assert [rule.target(trees, now) for now, trees in [(0, 32), (1, 0), (2, 16)]] == [4, 1, 2]


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 50)), min_size=1),
    st.floats(0, 50),
)
def test_the_target_is_the_most_that_was_needed_within_the_patience(gaps, patience_s) -> None:
    rule = scaling(patience_s=patience_s)
    now, past = 0.0, []
    for gap, num_trees in gaps:
        now += gap
        past.append((now, rule.needed(num_trees)))
        recent = [need for time, need in past if time >= now - patience_s]
        assert rule.target(num_trees, now) == max(recent)
