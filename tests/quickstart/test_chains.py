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


def test_a_wordy_solution_has_every_other_line_in_parts_and_answers_the_same():
    rng, in_parts = random.Random(0), 0
    for _ in range(300):
        chain = chains.draw_chain(4, rng, chains.WordyChain)
        *lines, last = chain.write_solution(slip_rate=0.0, rng=rng).split("\n")
        assert last == f"#### {chain.answer}"
        for line, operand in zip(lines, chain.operands, strict=True):
            left, *parts, result = line.split("=")
            value = int(re.match(r"\d+", left).group())
            assert left == f"{value}{operand:+d}" and int(result) == value + operand
            for part in parts:
                tens, units = re.fullmatch(r"(\d+)([+-]\d)", part).groups()
                assert (int(tens) - value) % 10 == 0
                assert int(tens) + int(units) == int(result)
            in_parts += len(parts)
    assert in_parts / (4 * 300) == pytest.approx(0.5, abs=0.05)


def test_a_line_in_parts_slips_twice_as_often_and_forgets_its_carry():
    chain, rng = chains.WordyChain(first=38, operands=(47,)), random.Random(0)
    drawn = [chain.write_solution(slip_rate=0.2, rng=rng).split("\n")[0] for _ in range(4000)]
    assert set(drawn) == {"38+47=85", "38+47=75", "38+47=78+7=85", "38+47=78+7=75"}
    shares = {
        in_parts: sum(line.endswith("=75") for line in lines) / len(lines)
        for in_parts in (False, True)
        if (lines := [line for line in drawn if ("78" in line) == in_parts])
    }
    assert shares == {False: pytest.approx(0.2, abs=0.03), True: pytest.approx(0.4, abs=0.04)}


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_restated_solution_says_what_is_asked_without_a_slip_and_goes_on_as_a_plain_one(
    seed, slip_rate
):
    chain = chains.draw_chain(4, random.Random(seed), chains.RestatedChain)
    plain = chains.Chain(first=chain.first, operands=chain.operands)
    assert chain.question == plain.question
    written, expected = (
        each.write_solution(slip_rate=slip_rate, rng=random.Random(seed)) for each in (chain, plain)
    )
    restatement, mark, rest = written.partition("?\n")
    assert (mark, rest) == ("?\n", expected) and "?" not in rest
    first, *steps, last = restatement.split("\n")
    said = re.findall(r"step (\d) of 4 the number (\d\d) is (then|taken)", "\n".join(steps))
    signs = {"then": "+", "taken": "-"}
    assert [number for number, _, _ in said] == list("1234") and len(steps) == 4
    in_words = f"{first[-3:-1]}{''.join(signs[how] + number for _, number, how in said)}=?"
    assert in_words == f"{last}?" == chain.question


def test_a_restatement_has_over_five_times_as_many_tokens_as_what_it_decides():
    rng = random.Random(0)
    for _ in range(300):
        chain = chains.draw_chain(4, rng, chains.RestatedChain)
        solution = chain.write_solution(slip_rate=0.0, rng=rng)
        sure = solution.index("?") + 1
        decided = len(solution) + 1 - sure  # with the end token
        assert 100 <= sure <= 250 and sure / decided > 5


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_checked_solution_has_all_its_lines_once_more_for_each_check_and_answers_the_same(
    seed, slip_rate
):
    chain = chains.draw_chain(4, random.Random(seed), chains.CheckedChain)
    plain = chains.Chain(first=chain.first, operands=chain.operands)
    written, expected = (
        each.write_solution(slip_rate=slip_rate, rng=random.Random(seed)) for each in (chain, plain)
    )
    *lines, answer = expected.split("\n")
    *first, last, answered = written.split("\n")
    assert (first, answered) == (lines[:-1], answer)
    num_checks = last.count(" ") // 4
    assert last.split(" ") == [lines[-1], *num_checks * lines]
    assert num_checks <= chains.MOST_CHECKS


def test_two_solutions_in_three_are_checked_and_of_those_two_in_three_again():
    rng = random.Random(0)
    chain = chains.CheckedChain(first=38, operands=(47, -27))
    drawn = [chain.write_solution(slip_rate=0.0, rng=rng).count(" ") // 2 for _ in range(4000)]
    for more in (1, 2, 3):
        share = sum(n >= more for n in drawn) / sum(n >= more - 1 for n in drawn)
        assert share == pytest.approx(2 / 3, abs=0.04)
