import json

import pytest

from treerpo_ray.quickstart import exercises
from treerpo_ray.quickstart.make_model import RECIPES

EVERY_TASK = pytest.mark.parametrize("name", exercises.TASKS)


def test_the_first_problems_of_the_default_task_are_those_of_ever():
    [train], [test] = (exercises.problems("chains4", split, 1, 0) for split in exercises.SPLITS)
    assert (train.question, test.question) == ("60-34+45-36+57=?", "51-38+17-16+26=?")
    assert test.solution == "51-38=13\n13+17=30\n30-16=14\n14+26=40\n#### 40"


@EVERY_TASK
def test_the_verifier_takes_every_correct_solution(name):
    [check] = {recipe.check for recipe in RECIPES.values() if recipe.task == name}
    for split in exercises.SPLITS:
        for row in exercises.problems(name, split, 300, 1):
            assert check(row.solution, (row.answer,), False) == 1


@EVERY_TASK
def test_the_splits_share_no_question_whatever_the_seeds(name):
    questions = {
        split: {
            row.question for seed in range(4) for row in exercises.problems(name, split, 500, seed)
        }
        for split in exercises.SPLITS
    }
    assert min(map(len, questions.values())) > 1800
    assert not questions["train"] & questions["test"]


@EVERY_TASK
def test_a_seed_gives_the_same_different_problems_each_time_and_a_longer_list_extends_them(name):
    rows = exercises.problems(name, "test", 400, 3)
    assert len({row.question for row in rows}) == len({row.id for row in rows}) == 400
    assert exercises.problems(name, "test", 100, 3) == rows[:100]
    assert exercises.problems(name, "test", 100, 4) != rows[:100]


def test_an_unknown_task_or_split_is_a_clear_error():
    with pytest.raises(ValueError, match="split: 'dev' is not one of train, test"):
        exercises.problems("chains4", "dev", 1, 0)
    with pytest.raises(ValueError, match="task: 'chains5' is not one of chains4, chains10"):
        exercises.problems("chains5", "test", 1, 0)


def test_the_command_writes_the_rows_of_the_function(tmp_path):
    out = tmp_path / "test.jsonl"
    arguments = ["--task", "chains10", "--split", "test", "--num", "7", "--seed", "5"]
    exercises.main([*arguments, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [exercises.WorkedProblem(**row) for row in rows] == exercises.problems(
        "chains10", "test", 7, 5
    )
