import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.quickstart import task

SPLIT_AND_SEED = st.tuples(st.sampled_from(task.SPLITS), st.integers(0, 2**32))


def recompute(question: str) -> int:
    """Read the numbers off the question, independently of how the chain was drawn."""
    assert re.fullmatch(r"\d\d([+-]\d\d){4}=\?", question)
    return sum(int(number) for number in re.findall(r"[+-]?\d\d", question))


@given(SPLIT_AND_SEED)
def test_answers_are_those_of_the_questions(split_and_seed):
    split, seed = split_and_seed
    for problem in task.problems(split, 5, seed):
        assert problem.answer == str(recompute(problem.question))


@given(SPLIT_AND_SEED)
def test_every_line_of_a_solution_is_right_and_carries_and_the_last_one_answers(split_and_seed):
    split, seed = split_and_seed
    for problem in task.problems(split, 5, seed):
        *lines, last = problem.solution.split("\n")
        assert last == f"#### {problem.answer}"
        value = int(problem.question[:2])
        for line in lines:
            left, sign, right, result = re.fullmatch(r"(\d\d)([+-])(\d\d)=(\d\d)", line).groups()
            assert int(left) == value
            value = int(left) + int(sign + right)
            assert value == int(result)
            tens = int(left[0]) + int(sign + right[0])
            assert value // 10 != tens
        assert str(value) == problem.answer


def test_the_splits_share_no_question_whatever_the_seeds():
    train = {row.question for seed in range(10) for row in task.problems("train", 1000, seed)}
    test = {row.question for seed in range(10) for row in task.problems("test", 1000, seed)}
    assert len(train) > 9000
    assert len(test) > 9000
    assert not train & test


def test_a_seed_gives_the_same_different_problems_each_time_and_a_longer_list_extends_them():
    rows = task.problems("test", 400, 3)
    assert len({row.question for row in rows}) == len({row.id for row in rows}) == 400
    assert task.problems("test", 100, 3) == rows[:100]
    assert task.problems("test", 100, 4) != rows[:100]


@pytest.mark.parametrize(
    ("value", "operand", "result"),
    [(38, 47, 75), (31, 47, 78), (52, -27, 35), (57, -22, 35), (40, -11, 31)],
)
def test_without_carry_a_sum_loses_its_ten_and_a_difference_swaps_its_units(value, operand, result):
    assert task.add_without_carry(value, operand) == result


def test_a_solver_that_slips_in_each_line_goes_on_from_its_wrong_results():
    chain = task.Chain(first=51, operands=(-38, 17, -16, 26))
    assert task.write_solution(chain, slip_rate=1.0, rng=random.Random(0)) == (
        "51-38=27\n27+17=34\n34-16=22\n22+26=48\n#### 48"
    )
    assert task.write_solution(chain, slip_rate=0.0, rng=random.Random(0)) == (
        "51-38=13\n13+17=30\n30-16=14\n14+26=40\n#### 40"
    )


def test_an_unknown_split_is_a_clear_error():
    with pytest.raises(ValueError, match="split: 'dev' is not one of train, test"):
        task.problems("dev", 1, 0)


def test_the_command_writes_the_rows_of_the_function(tmp_path):
    out = tmp_path / "test.jsonl"
    task.main(["--split", "test", "--num", "7", "--seed", "5", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [task.Problem(**row) for row in rows] == task.problems("test", 7, 5)
