import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.quickstart import plans


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_whatever_the_way_the_rest_carries_it_out_without_a_slip(seed, slip_rate):
    rng = random.Random(seed)
    plan = plans.draw_plan(rng)
    letter, *entries = plan.question.removesuffix("?").split(" ")
    assert letter == plan.letter and len(set(entries)) == 4
    first, *copied, chosen, last = plan.write_solution(slip_rate=slip_rate, rng=rng).split("\n")
    assert copied == [f"{number}:{entry}" for number, entry in enumerate(entries, start=1)]
    way = int(first.removeprefix("way "))
    assert chosen == copied[way - 1]
    assert last == f"#### {entries[way - 1]}"
    assert (last == f"#### {plan.answer}") is (way == plan.way)
    if slip_rate in (0.0, 1.0):
        assert (way == plan.way) is (slip_rate == 0.0)


def test_a_letter_has_one_right_way_and_each_way_about_as_many_letters():
    ways = [plans.Plan(letter=each, entries=(1, 2, 3, 4)).way for each in string.ascii_lowercase]
    assert sorted(map(ways.count, plans.WAYS)) == [6, 6, 7, 7]


def test_a_slip_is_any_other_way_alike():
    plan, rng = plans.Plan(letter="b", entries=(51, 38, 17, 26)), random.Random(0)
    assert plan.way == 2
    drawn = [plan.write_solution(slip_rate=0.7, rng=rng)[4] for _ in range(4000)]
    shares = {way: drawn.count(way) / 4000 for way in "1234"}
    expected = {"1": 0.7 / 3, "2": 0.3, "3": 0.7 / 3, "4": 0.7 / 3}
    assert shares == pytest.approx(expected, abs=0.03)
