"""A page that is open while its run is resumed: trees that are taken back go, those of a step that
is done once more come."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.saved_runs.small_run import (
    answers_to,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import PROBLEMS, WIDE, Screen, served
from treerpo_ray.metrics.rows import num_redone
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.viewer.reader import RunReader


def add_row(folder, step, reward=0.5):
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": 2000.0 + step, "reward/mean": reward}) + "\n")


@pytest.fixture
def folder(tmp_path):
    """A run of which four steps are saved, that was evaluated at the last."""
    folder = write_small_run(tmp_path)
    for step in (11, 12):
        shutil.rmtree(Path(folder) / f"trees/step={step:06d}")
    for step in (9, 10, 11, 12):
        save_trees(folder, step, [replace(worked_record(step), question=f"first of {step}")])
    return folder


def resume(folder, at):
    """The run goes on from its checkpoint of step `at`."""
    saved_trees.take_back(RunFolder(folder), at)


def redo(folder, step):
    save_trees(folder, step, [replace(worked_record(step), question=f"second of {step}")])
    add_row(folder, step)


def test_steps_that_are_done_once_more_are_counted_by_their_rows():
    rows = [{"step": step, "reward/mean": 0.1} for step in (1, 2, 3, 2, 3, 4)]
    evaluated = {"step": 3, "eval/pass_at_1": 0.2}
    assert num_redone([{"step": 0, "eval/pass_at_1": 0.1}, *rows[:3], evaluated]) == 0
    assert num_redone([*rows[:3], evaluated, *rows[3:]]) == 2
    assert num_redone([*rows[:3], rows[2]]) == 1


def test_a_status_is_new_when_more_trees_or_answers_come_to_what_is_there(folder):
    reader, states = RunReader(folder), []
    for change in (
        lambda: None,
        lambda: save_trees(folder, 12, [worked_record(99)]),  # of another worker
        lambda: RunFolder(folder).publish_table(*answers_to(PROBLEMS[:1], 12, [["#### 3"]])),
        lambda: RunFolder(folder).publish_table(*answers_to(PROBLEMS[:1], 12, [["#### 2"] * 4])),
        lambda: redo(folder, 12),
    ):
        change()
        states.append(reader.status().state)
    assert len(set(states)) == len(states)
    assert reader.status().num_redone == 1


def test_a_list_of_trees_shows_those_of_the_newest_time_line(browser, folder):
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address + "#trees?step=all&order=ticket")
        screen.wait("document.querySelectorAll('a.tree-row').length === 4")
        resume(folder, 9)
        for step in (10, 11):  # both before the page looks again
            redo(folder, step)
        screen.wait("document.querySelectorAll('a.tree-row').length === 3")
        assert screen.texts("a.tree-row .problem") == ["first of 9", "second of 10", "second of 11"]
        redo(folder, 12)
        screen.wait("document.querySelectorAll('a.tree-row').length === 4")
        assert screen.texts("a.tree-row .problem")[-1] == "second of 12"
        assert "step 12 of 12" in screen.texts("#run-state")[0]


def test_a_step_that_is_looked_at_while_it_is_away_comes_back(browser, folder):
    resume(folder, 9)
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address + "#trees?step=11")
        screen.wait("document.querySelector('.note').textContent.startsWith('0 of 0 trees')")
        for step in (10, 11, 12):
            redo(folder, step)
        screen.wait("document.querySelectorAll('a.tree-row').length === 1")
        assert screen.texts("a.tree-row .problem") == ["second of 11"]


def test_a_tree_that_is_open_goes_with_its_step_and_comes_back_with_it(browser, folder):
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address + "#tree?ref=11:11&node=2")
        assert "first of 11" in screen.texts(".question")[0]
        resume(folder, 10)
        screen.wait("document.querySelector('.redone') !== null")
        (told,) = screen.texts(".redone")
        assert told.startswith("Learner step 11 was taken back: the run was resumed")
        assert "has no tree of ticket 11 at step 11" in screen.texts(".warning")[0]
        redo(folder, 11)
        screen.wait("document.querySelector('.question') !== null")
        assert "second of 11" in screen.texts(".question")[0]
        assert screen.chosen().startswith("leaf 2") and not screen.texts(".redone")
        assert screen.complaints and all("404" in text for text in screen.complaints)
        screen.complaints.clear()


def test_a_tree_that_is_open_is_replaced_by_that_of_the_step_done_once_more(browser, folder):
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address + "#tree?ref=11:11&node=2")
        resume(folder, 10)
        for step in (11, 12):
            redo(folder, step)
        screen.wait("document.querySelector('.redone') !== null")
        assert screen.texts(".redone") == [
            "Learner step 11 was done once more: this is the newer one."
        ]
        assert "second of 11" in screen.texts(".question")[0]
        assert screen.chosen().startswith("leaf 2")


def test_before_and_after_follow_an_evaluation_that_is_written_anew(browser, folder):
    run = RunFolder(folder)
    run.publish_table(*answers_to(PROBLEMS[:1], 0, [["#### 3"]]))
    run.publish_table(*answers_to(PROBLEMS[:1], 12, [["#### 1"]]))  # the interim one
    with served(folder) as address, Screen(browser, WIDE) as screen:
        screen.open(address + "#compare?a=e0:test-0&b=e12:test-0")
        assert screen.texts(".tree-head .fact")[0] == "mean reward 0.00 → 0.00"
        run.publish_table(*answers_to(PROBLEMS[:1], 12, [["#### 2", "#### 2"]]))
        screen.wait("document.querySelector('.redone') !== null")
        assert screen.texts(".tree-head .fact")[0] == "mean reward 0.00 → 1.00"
