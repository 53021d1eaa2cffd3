"""What trees and evaluations tell, by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.learning.records import some_training
from tests.support.saved_runs.fork_rows import measured_forks
from tests.support.saved_runs.small_run import (
    NUM_STEPS,
    answers_to,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import PROBLEMS
from treerpo_ray.records import Training
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.analysis import NotThere, Run
from treerpo_ray.study.finding_plots import (
    plot_advantages_by_depth,
    plot_before_after,
    plot_entropy_and_length,
    plot_losses,
    plot_mismatch_by_staleness,
    plot_pruned_groups,
)
from treerpo_ray.study.findings import (
    before_after,
    decided_by_depth,
    decisive_steps,
    group_table,
    mismatch_by_staleness,
    places_to_fork,
    steps_by_depth,
    worst_losses,
)
from treerpo_ray.verifier.verdict import Verdict

STEP = NUM_STEPS + 1


@pytest.fixture
def folder(tmp_path):
    return write_small_run(tmp_path)


@pytest.fixture
def run(folder):
    """Its newest tree is the worked one."""
    save_trees(folder, STEP, [worked_record(5)])
    return Run(folder)


def graded(ticket, *verdicts):
    return replace(worked_record(ticket), verdicts=verdicts)


def bars_of(axes):
    return [bar.get_height() for bar in axes.patches]


def test_the_variance_of_the_reward_is_what_all_steps_decide(run):
    """That of the worked tree is 1/4 times 3/4."""
    table = run.tree_table()
    assert table["before"].tolist() == [0.25, 0.5, 0.5, 0.25, 0, 0]
    assert table["change"].tolist() == [0.25, 0.5, -0.5, -0.25, 0, 0]
    assert table["weight"].tolist() == [0.5, 0.25, 0.25, 0.5, 0.25, 0.25]
    assert (table["weight"] * table["change"] ** 2).sum() == 3 / 16
    assert decided_by_depth(table).to_dict() == pytest.approx({1: 1 / 3, 2: 2 / 3})
    # f = 1/2: f (f e^2 + S^2), where S^2 is 1/16 above and 1/4 below, e^2 is 1/4 and 5/36.
    errors = [(3 / 32) ** 0.5, 8**-0.5, 8**-0.5, (19 / 288) ** 0.5]
    errors += [(5 / 72) ** 0.5] * 2  # S^2 is 5/36 where both are 0: two draws prove little
    assert table["change_se"].tolist() == pytest.approx(errors)


def test_nothing_is_decided_where_all_answers_are_alike(folder):
    save_trees(folder, STEP, [graded(5, *[Verdict.WRONG] * 4)])
    table = Run(folder).tree_table()
    assert decided_by_depth(table).isna().all()
    assert decisive_steps(Run(folder)).empty
    assert worst_losses(table)["depth"].tolist() == [0] * 4
    left, right = plot_losses(Run(folder)).axes
    assert bars_of(left) == [4, 0, 0] and bars_of(right) == [0, 0]


def test_a_tree_without_a_value_decides_nothing_and_its_other_half_is_told(folder):
    right, wrong, gone = Verdict.CORRECT, Verdict.WRONG, Verdict.ERRORED
    save_trees(folder, STEP, [worked_record(5), graded(6, right, wrong, wrong, gone)])
    table = Run(folder).tree_table()
    assert decided_by_depth(table).to_dict() == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert group_table(table)["outcome"].tolist() == [
        *("kept", "kept", "all wrong"),
        *("no verdict", "kept", "no verdict"),
    ]
    assert worst_losses(table)["ticket"].tolist() == [5] * 3
    for plot in (plot_losses, plot_advantages_by_depth, plot_pruned_groups):
        plot(Run(folder)).draw_without_rendering()


def test_the_decisive_steps_come_with_their_texts(run):
    found = decisive_steps(run, count=3)
    assert found["step"].tolist() == [1, 2, 0]
    assert found["decided"].tolist() == [1 / 16, 1 / 16, 1 / 32]
    assert found["text"].tolist() == ["2\n#### 2", "3\n#### 3", "1+1="]
    assert found["question"].tolist() == ["1+1=?"] * 3


def test_a_wrong_answer_lost_most_where_the_value_dropped_most(run):
    losses = worst_losses(run.tree_table())
    assert losses[["step", "depth"]].to_numpy().tolist() == [[2, 2], [4, 1], [5, 1]]
    assert losses["loss"].tolist() == [0.5, 0.25, 0.25]
    left, right = plot_losses(run).axes
    assert bars_of(left) == [0, 2, 1] and bars_of(right) == pytest.approx([1 / 3, 2 / 3])


def test_groups_are_told_by_what_becomes_of_them(folder):
    right, wrong = Verdict.CORRECT, Verdict.WRONG
    save_trees(folder, STEP, [graded(5, right, wrong, right, wrong), graded(6, *[right] * 4)])
    groups = group_table(Run(folder).tree_table())
    assert groups["outcome"].tolist() == ["alike", "kept", "kept", *["all right"] * 3]
    assert groups["value"].tolist() == [0.5] * 3 + [1] * 3
    assert groups["range"].tolist() == [0, 1, 1, 0, 0, 0]
    (axes,) = plot_pruned_groups(Run(folder)).axes
    drawn = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert drawn == {"kept": [0, 2], "all right": [1, 2], "alike": [1, 0]}


def test_advantages_are_those_that_the_learner_gave(folder):
    record = worked_record(5)
    save_trees(folder, STEP, [replace(record, training=some_training(record.tree))])
    left, right = plot_advantages_by_depth(Run(folder)).axes
    labels = [label.get_text() for label in left.get_xticklabels()]
    assert labels == ["1\n1 steps", "2\n2 steps"]  # steps 1, 3 and 5, of that advantage
    lengths = record.tree.lengths
    pull = np.array([3 * lengths[3], 1 * lengths[1] + 5 * lengths[5]])
    assert bars_of(right) == pytest.approx(pull / pull.sum())


def test_entropy_is_the_mean_surprise_of_the_tokens_and_answers_have_their_whole_length(run):
    table, tree = run.tree_table(), worked_record().tree
    assert table["surprisal"].tolist() == pytest.approx([0.1] * 6)
    assert table["end"].tolist() == tree.path_lengths.tolist()
    left, right = plot_entropy_and_length(run).axes
    assert bars_of(left) == pytest.approx([0.1] * 4)
    assert sum(bars_of(right)) == 4
    assert [text.get_text() for text in right.get_legend().texts] == ["right: 1", "wrong: 3"]
    assert steps_by_depth(run)["steps"].to_dict() == {1: 2, 2: 4}


def test_mismatch_is_told_by_the_versions_that_lie_between(folder):
    """The learner was at version 9 before the step; a token of version 7 is two behind."""
    record = worked_record(5)
    tree = replace(record.tree, versions=np.where(np.arange(len(record.tree.token_ids)), 9, 7))
    logprobs = np.full(len(tree.token_ids), np.nan, np.float32)
    logprobs[:3] = tree.logprobs[:3] - np.array([0.5, 0.25, -0.75], np.float32)
    training = Training(advantages=np.full(len(tree), 1.0), logprobs=logprobs)
    save_trees(folder, STEP, [replace(record, tree=tree, training=training)])
    RunFolder(folder).publish_file("metrics.jsonl", b'{"step": 12, "version": 9}\n')
    found = mismatch_by_staleness(Run(folder))
    assert found.index.tolist() == [0, 2] and found["tokens"].tolist() == [2, 1]
    assert found["mean"].tolist() == pytest.approx([0.5, 0.5])
    assert found["max"].tolist() == pytest.approx([0.75, 0.5])
    (axes,) = plot_mismatch_by_staleness(Run(folder)).axes
    assert bars_of(axes) == pytest.approx([0.5, 0.5])


def test_a_problem_is_shown_before_and_after(folder):
    run, files = Run(folder), RunFolder(folder)
    with pytest.raises(NotThere, match="no two evaluations with answers"):
        before_after(run)
    files.publish_table(*answers_to(PROBLEMS, 0, [["#### 2"], ["#### 0", "#### 1"], ["#### 6"]]))
    with pytest.raises(NotThere, match="no two evaluations with answers"):
        before_after(run)
    files.publish_table(*answers_to(PROBLEMS[:2], 12, [["#### 0"], ["#### 4", "$x #### 1"]]))
    found = before_after(run)
    assert (found.problem, found.question, found.steps) == ("test-1", "2+2=?", (0, 12))
    assert (found.num_problems, found.num_fixed, found.num_broken) == (2, 1, 1)
    assert [[answer.reward for answer in own] for own in found.answers] == [[0, 0], [1, 0]]
    figure = plot_before_after(run)
    figure.draw_without_rendering()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["step 0: 0 of 2 answers right", "step 12: 1 of 2 answers right"]
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[1] == ["[correct]\n#### 4", "[wrong]\n$x #### 1"]
    assert before_after(run, "test-0").answers[1][0].text == "#### 0"
    with pytest.raises(NotThere, match="no problem only-once in both"):
        before_after(run, "only-once")


def test_the_version_before_a_step_is_that_of_the_step_before(folder):
    rows = [{"step": 0}, {"step": 1, "version": 1}, {"step": 2, "version": 1}]
    lines = pd.DataFrame(rows).to_json(orient="records", lines=True)
    RunFolder(folder).publish_file("metrics.jsonl", lines.encode())
    assert [Run(folder).version_before(step) for step in (1, 2, 3)] == [0, 1, 1]


def test_places_to_fork_are_those_that_were_measured_last(run):
    with pytest.raises(NotThere, match="no metrics fork/"):
        places_to_fork(run)
    with (Path(run.folder) / "metrics.jsonl").open("a") as file:
        for step, shares in ((STEP, (0.9, 1.1)), (STEP + 1, (0.6,)), (STEP + 2, ())):
            print(
                json.dumps({"step": step, "reward/mean": 0.5} | measured_forks(*shares)), file=file
            )
    table = places_to_fork(run)
    assert table["token_share"].to_dict() == {1: 0.6, 2: 1.1}
    assert table["step"].to_dict() == {1: STEP + 1, 2: STEP}
    assert table["num_prefixes"].tolist() == [240, 240]
