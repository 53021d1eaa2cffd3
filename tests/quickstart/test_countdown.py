import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.quickstart import countdown

LINE = re.compile(r"([0-9]+)([-+*/])([0-9]+)=([0-9]+)")


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_line_is_right_and_takes_two_values_that_are_left_whatever_the_slips(seed, slip_rate):
    rng = random.Random(seed)
    exercise = countdown.draw_countdown(rng)
    assert exercise.question == f"{exercise.answer}?"
    numbers, target = exercise.answer.split("=")
    left = numbers.split(" ")
    assert len(left) == 3
    *lines, last = exercise.write_solution(slip_rate=slip_rate, rng=rng).split("\n")
    for line in lines:
        first, sign, second, result = LINE.fullmatch(line).groups()
        left.remove(first)
        left.remove(second)
        left.append(result)
        a, b = Fraction(first), Fraction(second)
        assert int(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[sign]
        assert 0 <= int(result) <= 99
    assert len(left) == 1
    if slip_rate == 0:
        assert left == [target]
        assert int(target) >= 10
    assert last.startswith("#### ")
    assert sorted(re.findall("[0-9]+", last)) == sorted(numbers.split(" "))


@pytest.mark.parametrize(
    ("numbers", "lines"),
    [
        ((6, 3), {"6+3=9", "6-3=3", "6*3=18", "6/3=2"}),
        ((3, 7), {"7+3=10", "7-3=4", "7*3=21"}),
        ((5, 1), {"5+1=6", "5-1=4"}),
        ((60, 60), {"60-60=0", "60/60=1"}),
        ((99, 0), {"99+0=99", "99-0=99"}),
    ],
)
def test_the_lines_that_two_values_allow(numbers, lines):
    found = countdown.next_lines(countdown.to_values(numbers))
    assert {str(line) for line in found} == lines


def test_a_line_puts_its_result_with_its_expression_in_the_place_of_two_values():
    values = countdown.to_values((12, 3, 25))
    first = next(line for line in countdown.next_lines(values) if str(line) == "25-12=13")
    values = countdown.after(values, first)
    assert [value.number for value in values] == [3, 13]
    second = next(line for line in countdown.next_lines(values) if str(line) == "13*3=39")
    assert countdown.after(values, second)[0].expression == "(25-12)*3"


def test_after_a_slip_the_lines_are_random():
    exercise = countdown.draw_countdown(random.Random(1))
    right = exercise.write_solution(slip_rate=0.0, rng=random.Random(0))
    assert right.split("\n")[:-1] == [str(line) for line in exercise.lines]
    slipped = {exercise.write_solution(slip_rate=1.0, rng=random.Random(i)) for i in range(50)}
    assert len(slipped) > 10
