import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.quickstart import items
from treerpo_ray.quickstart.items_answer import check_answer


@given(st.integers(0, 2**32))
def test_a_solution_has_a_right_line_of_nine_bytes_for_each_item_and_two_of_each_kind(seed):
    rng = random.Random(seed)
    drawn = items.draw_items(rng)
    solution = drawn.write_solution(slip_rate=0.0, rng=rng)
    lines = solution.split("\n")
    assert " ".join(lines) == drawn.answer
    assert f"{' '.join(line.split('=')[0] for line in lines)}?" == drawn.question
    assert sorted(line[2] for line in lines) == sorted("+-&" * 2)
    for line in lines:
        left, sign, right, result = re.fullmatch(r"(\d\d)([-+&])(\d\d)=(\d\d)", line).groups()
        results = {"+": int(left) + int(right), "-": int(left) - int(right)}
        assert int(result) == (results | {"&": int(left[0] + right[1])})[sign]


def test_every_kind_is_as_likely_at_every_place():
    rng, num_drawn = random.Random(0), 3000
    drawn = [items.draw_items(rng).items for _ in range(num_drawn)]
    for place in range(items.NUM_ITEMS):
        for sign in items.SIGNS:
            share = sum(each[place].sign == sign for each in drawn) / num_drawn
            assert share == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize(
    ("item", "result", "slip"),
    [((38, "+", 47), 85, 75), ((52, "-", 27), 25, 35), ((31, "&", 58), 38, 51)],
)
def test_an_item_and_its_slip(item, result, slip):
    left, sign, right = item
    drawn = items.Item(left=left, sign=sign, right=right)
    assert (drawn.result, drawn.slip) == (result, slip)


def test_each_slip_is_wrong_and_costs_its_own_item_alone():
    rng, rewards = random.Random(0), []
    for _ in range(2000):
        drawn = items.draw_items(rng)
        every_line = drawn.write_solution(slip_rate=1.0, rng=rng)
        assert check_answer(every_line, (drawn.answer,)) == 0
        solution = drawn.write_solution(slip_rate=0.5, rng=rng)
        rewards.append(check_answer(solution, (drawn.answer,)))
    assert set(rewards) == {number / 6 for number in range(7)}
    assert sum(rewards) / len(rewards) == pytest.approx(0.5, abs=0.02)
