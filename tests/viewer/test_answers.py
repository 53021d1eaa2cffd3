"""Answers of evaluations, and problems that were met twice."""

import numpy as np
import pytest

from tests.support.saved_runs.small_run import (
    SAVED,
    answers_to,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import PROBLEMS
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.sightings import evaluation_sightings
from treerpo_ray.viewer.answers import read_answers
from treerpo_ray.viewer.page import write_page
from treerpo_ray.viewer.reader import RunReader


def test_partial_credit_is_the_value_of_an_answer(tmp_path):
    """Its verdict does not tell how much; an earlier version recorded the verdict alone."""
    run = RunFolder(str(tmp_path))
    file, table = answers_to(PROBLEMS[:1], 3, [["#### 2", "a", "b", "c"]])
    kinds = [["correct", "partial", "wrong", "errored"], [1.0, 0.3, 0.0, None]]
    for name, column in zip(("verdict", "reward"), kinds, strict=True):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), [column])
    for saved, expected in ((table, [1, 0.3, 0]), (table.drop_columns(["reward"]), [1, 0, 0])):
        run.publish_table(file, saved)
        view = read_answers(run, 3, "test-0").view
        assert view.value[:3].tolist() == expected and np.isnan(view.value[3])
        [met] = evaluation_sightings(run, 3)
        assert np.isnan(met.value) and np.isnan(view.root_value)  # as one has no verdict
        run.publish_table(file, saved.slice(0, 3))
        [met] = evaluation_sightings(run, 3)
        whole = read_answers(run, 3, "test-0").view.root_value
        assert met.value == pytest.approx(sum(expected) / 3) == whole


def test_problems_that_were_met_twice_are_told_with_what_they_gained(ask):
    assert [(p["problem"], p["refs"], p["values"], p["gain"]) for p in ask("problems")] == [
        ("test-0", ["e0:test-0", "e12:test-0"], [0.5, 1.0], 0.5),
        ("test-1", ["e0:test-1", "e12:test-1"], [1.0, 0.0], -1.0),
    ]
    tree = ask("tree", ref="e0:test-0")
    assert (tree["parent"], tree["value"], tree["root_value"]) == ([-1, -1], [0, 1], 0.5)
    assert tree["verdict"] == ["wrong", "correct"] and tree["advantage"] == [None, None]
    (text,) = ask("texts", ref="e0:test-0", nodes="1")
    assert text["answer"] == "#### 2" and text["text"] == []
    assert ask("holding", ref="e0:test-0", text="3") == [0]


def test_a_problem_that_training_met_at_two_steps_is_among_them(tmp_path):
    folder = write_small_run(tmp_path)
    save_trees(folder, 20, [worked_record(5)])
    save_trees(folder, 21, [worked_record(5), worked_record(6)])
    (found,) = RunReader(folder).problems()[:1]
    by_problem = {problem.problem: problem.refs for problem in RunReader(folder).problems()}
    assert by_problem["train-5"][-2:] == ("20:5", "21:5") and not found.is_evaluation
    assert "train-0" not in by_problem


def test_what_training_fixed_is_told_with_how_it_was_sampled(ask, tmp_path):
    change = ask("change")
    assert (change["steps"], change["num_answers"]) == ([0, 12], [2, 2])
    # test-0 went from 1/2, which is no mistake, to 1; test-1 from 1 to 0.
    assert (change["num_problems"], change["num_fixed"], change["num_broken"]) == (2, 0, 1)
    run = RunFolder(write_small_run(tmp_path))
    assert RunReader(run.place).change() is None
    for step, answers in ((0, [["1"] * 4, ["1", "#### 4"]]), (6, [["#### 2"]]), (12, [["#### 2"]])):
        run.publish_table(*answers_to(PROBLEMS[: len(answers)], step, answers))
    change = RunReader(run.place).change()
    assert (change.steps, change.num_answers, change.num_problems) == ((0, 12), (4, 1), 1)
    assert [problem.refs for problem in change.fixed] == [("e0:test-0", "e12:test-0")]
    assert (change.num_fixed, change.num_broken) == (1, 0)
    shown = write_page(RunReader(run.place), [], tmp_path / "page.html")
    assert sorted(shown[:-2]) == [f"12:{ticket}" for ticket in SAVED[12]]
    assert shown[-2:] == ["e0:test-0", "e12:test-0"]
