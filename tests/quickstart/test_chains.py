import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.quickstart import chains


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_every_line_of_a_solution_is_right_and_carries_and_the_last_one_answers(num_lines, seed):
    rng = random.Random(seed)
    chain = chains.draw_chain(num_lines, rng)
    assert re.fullmatch(rf"\d\d([+-]\d\d){{{num_lines}}}=\?", chain.question)
    numbers = [int(number) for number in re.findall(r"[+-]?\d\d", chain.question)]
    *lines, last = chain.write_solution(slip_rate=0.0, rng=rng).split("\n")
    assert len(lines) == num_lines
    value = numbers[0]
    for line, operand in zip(lines, numbers[1:], strict=True):
        left, sign, right, result = re.fullmatch(r"(\d\d)([+-])(\d\d)=(\d\d)", line).groups()
        assert (int(left), int(sign + right)) == (value, operand)
        value = int(left) + int(sign + right)
        assert value == int(result)
        tens = int(left[0]) + int(sign + right[0])
        assert value // 10 != tens
    assert str(value) == str(sum(numbers)) == chain.answer
    assert last == f"#### {chain.answer}"


@pytest.mark.parametrize(
    ("value", "operand", "result"),
    [(38, 47, 75), (31, 47, 78), (52, -27, 35), (57, -22, 35), (40, -11, 31)],
)
def test_without_carry_a_sum_loses_its_ten_and_a_difference_swaps_its_units(value, operand, result):
    assert chains.add_without_carry(value, operand) == result


def test_a_solver_that_slips_in_each_line_goes_on_from_its_wrong_results():
    chain = chains.Chain(first=51, operands=(-38, 17, -16, 26))
    assert chain.write_solution(slip_rate=1.0, rng=random.Random(0)) == (
        "51-38=27\n27+17=34\n34-16=22\n22+26=48\n#### 48"
    )
    assert chain.write_solution(slip_rate=0.0, rng=random.Random(0)) == (
        "51-38=13\n13+17=30\n30-16=14\n14+26=40\n#### 40"
    )


def test_a_winding_solution_takes_off_again_what_it_adds_and_answers_the_same():
    rng, detours = random.Random(0), 0
    for _ in range(300):
        chain = chains.draw_chain(4, rng, chains.WindingChain)
        *work, last = chain.write_solution(slip_rate=0.0, rng=rng).split("\n")
        assert last == f"#### {chain.answer}"
        added = [int(re.fullmatch(r"\d+([+-]\d+)=\d+", line).group(1)) for line in work]
        assert sum(added) == sum(chain.operands)
        detours += (len(added) - 4) / 2
    assert detours / (4 * 300) == pytest.approx(chains.DETOUR_RATE, abs=0.04)


def test_a_chain_without_detours_draws_no_chance_for_them():
    chain = chains.Chain(first=51, operands=(-38, 17))
    ours, theirs = random.Random(1), random.Random(1)
    chain.write_solution(slip_rate=0.3, rng=ours)
    for _ in chain.operands:
        theirs.random()
    assert ours.random() == theirs.random()
