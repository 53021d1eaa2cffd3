import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.support.project import PROJECT
from tests.support.saved_runs.small_run import (
    NUM_STEPS,
    SAVED,
    grown_record,
    make_record,
    save_trees,
    text_step,
    worked_record,
    write_small_run,
)
from treerpo_ray.algo.tree import ROOT, StopReason
from treerpo_ray.config.files import load, to_yaml
from treerpo_ray.metrics.rows import BY_SET
from treerpo_ray.records import to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.analysis import (
    Run,
    is_mixed,
    most_mixed_tree,
    newest_run,
    path_changes,
    worst_leaf,
)
from treerpo_ray.study.panels import panels_of
from treerpo_ray.study.plots import plot_curves, plot_kept_by_depth, plot_pool
from treerpo_ray.study.tree_plots import MAX_LEAVES, NOT_MIXED, plot_tree, plot_value_along_path
from treerpo_ray.user_code import pack
from treerpo_ray.verifier.verdict import Verdict
from treerpo_ray.viewer.credit import credit_of

HALF_FORM = "def half(values):\n    return values / 2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(folder):
    return Run(folder)


def wide_record(num_children):
    """Depth 2; the first leaf is right."""
    shape = [(ROOT, "a", StopReason.BOUNDARY) for _ in range(num_children)]
    leaves = [(step, "b", StopReason.END_OF_TEXT) for step in range(num_children)] * num_children
    steps = [text_step(*step) for step in shape + leaves]
    answers = ["#### 2" if index == num_children else "" for index in range(len(steps))]
    return make_record(0, "1+1=?", "2", steps, answers)


def drawn_texts(figure):
    figure.draw_without_rendering()
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


def test_values_and_advantages_are_those_of_the_worked_tree(run):
    record = worked_record()
    assert run.values(record).root == 0.25
    np.testing.assert_array_equal(run.values(record).steps, [0.5, 1, 0, 0, 0, 0])
    # (0.5 - 0.25) / (0.25 * 0.75) and (1 - 0.5) / (0.5 * 0.5); the last group is pruned.
    expected = [4 / 3, 2, -2, -4 / 3, np.nan, np.nan]
    np.testing.assert_allclose(run.advantages(record), expected)


def test_advantages_follow_the_config_of_the_run(tmp_path):
    folder = write_small_run(tmp_path)
    config = Path(folder, "config.yaml")
    changed = config.read_text().replace("advantage: BERNOULLI", "advantage: difference")
    config.write_text(changed.replace("prune_threshold: 0.1", "prune_threshold: 0.6"))
    expected = [np.nan, 0.5, -0.5, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(Run(folder).advantages(worked_record()), expected)


def test_a_past_baseline_is_that_of_the_step_that_the_tree_was_trained_in(tmp_path):
    folder = write_small_run(tmp_path)
    config = Path(folder, "config.yaml")
    changed = config.read_text().replace("advantage: BERNOULLI", "advantage: past_baseline")
    config.write_text(changed.replace("trees_per_step: 128", "trees_per_step: 4"))
    with Path(folder, "metrics.jsonl").open("a") as metrics:
        print(json.dumps({"step": NUM_STEPS + 1, "learner/baseline": 0.2}), file=metrics)
    record = worked_record(ticket=4 * NUM_STEPS + 3)
    expected = [0.5 - 0.2, 1 - 0.2, 0 - 0.2, 0 - 0.2, np.nan, np.nan]
    np.testing.assert_allclose(Run(folder).advantages(record), expected)


def test_a_shrunk_baseline_is_that_of_the_metrics_and_the_share_of_the_configuration(tmp_path):
    """Values .5 and 0 of the prompt's children, 1 and 0 below; rho is 1/2: b is (.2 + 0) / 2 of
    step 0 and (.2 + .5) / 2 of the other. Of the second depth none is known: siblings alone."""
    folder = write_small_run(tmp_path)
    config = Path(folder, "config.yaml")
    changed = config.read_text().replace("advantage: BERNOULLI", "advantage: shrunk_baseline")
    changed = changed.replace("baseline_share: 1.0", "baseline_share: 0.5")
    config.write_text(changed.replace("trees_per_step: 128", "trees_per_step: 4"))
    row = {"learner/baseline": 0.2, "learner/correlation_depth_1": 0.5}
    with Path(folder, "metrics.jsonl").open("a") as metrics:
        print(json.dumps({"step": NUM_STEPS + 1} | row), file=metrics)
    run, record = Run(folder), worked_record(ticket=4 * NUM_STEPS + 3)
    expected = [0.5 - 0.05, 1 - 0.0, 0 - 0.5, 0 - 0.175, np.nan, np.nan]
    np.testing.assert_allclose(run.advantages(record), expected)
    assert np.isfinite(run.advantage_errors(record)[:4]).all()


def test_lengths_of_right_answers_count_as_the_configuration_says(tmp_path):
    """With 71 tokens at most and a weight of 7.1 a token costs 0.1."""
    folder = write_small_run(tmp_path)
    config = Path(folder, "config.yaml")
    config.write_text(config.read_text().replace("length_weight: 0.0", "length_weight: 7.1"))
    end = StopReason.END_OF_TEXT
    shape = [(ROOT, "#### 2", end), (ROOT, "2\n#### 2", end), (ROOT, "10", end)]
    steps = [text_step(*step) for step in shape]
    answers = [text for _, text, _ in shape]
    record = make_record(0, "1+1=?", "2", steps, answers)
    lengths = [len(step.token_ids) for step in steps]
    term = 0.1 * (lengths[1] - lengths[0])
    assert term > 0
    run = Run(folder)
    np.testing.assert_allclose(run.advantages(record), [1.5 + term, 1.5 - term, -3])
    plain = Run(write_small_run(tmp_path / "plain")).advantage_errors(record)
    # Two lengths, 0.1 of the difference apart: s^2 is half its square, of one sibling.
    np.testing.assert_allclose(
        run.advantage_errors(record), np.hypot(plain, [term / 2**0.5, term / 2**0.5, 0])
    )
    right = replace(record, verdicts=(Verdict.CORRECT,) * 3)
    credit = credit_of(run, right, run.values(right))
    assert credit.groups == {"kept": 1, "pruned": 0, "errored": 0}


def test_metrics_are_indexed_by_step_and_the_last_row_wins(run):
    metrics = run.metrics()
    assert metrics.index.tolist() == list(range(NUM_STEPS + 1))
    assert metrics["eval/pass_at_1"].notna().sum() == 3


def test_trees_come_back_by_learner_step_and_the_newest_without_one(run):
    assert run.tree_steps() == sorted(SAVED)
    assert [record.ticket for record in run.trees(11)] == list(SAVED[11])
    assert [record.ticket for record in run.trees()] == list(SAVED[12])
    saved, grown = run.trees(11)[0], grown_record(0)
    assert saved.leaf_texts == grown.leaf_texts and saved.verdicts == grown.verdicts


def test_a_ticket_trained_again_after_a_resume_has_its_last_tree(folder, tmp_path):
    again = write_small_run(tmp_path)
    save_trees(again, 20, [worked_record(7, finished_at_s=2.0)])
    save_trees(again, 20, [worked_record(7, finished_at_s=1.0), worked_record(3)])
    records = Run(again).trees(20)
    assert [(record.ticket, record.finished_at_s) for record in records] == [(3, 0.0), (7, 2.0)]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_trees_of_steps_that_were_rolled_back_are_not_those_of_the_run(place, tmp_path):
    folder = write_small_run(tmp_path)
    save_trees(folder, 13, [worked_record(3)])
    if place == "memory":
        uri = f"memory://{uuid.uuid4().hex}/small"
        fsspec.filesystem("memory").put(folder, uri, recursive=True)
        folder = uri
    saved_trees.take_back(RunFolder(folder), 11)
    assert Run(folder).tree_steps() == [11]
    saved_trees.take_back(RunFolder(folder), 0)
    saved_trees.take_back(RunFolder(folder), 0)  # there are none
    assert Run(folder).tree_steps() == []


def test_the_trees_of_a_step_are_there_once_those_of_all_workers_are(tmp_path):
    folder = RunFolder(str(tmp_path))
    for rank in (1, 0):
        assert not saved_trees.are_kept(folder, 7, num_workers=2)
        folder.publish_table(saved_trees.name(7, rank), to_table([worked_record(rank)]))
    assert saved_trees.are_kept(folder, 7, num_workers=2)
    beside = tmp_path / f"{saved_trees.name(7, 2)}.writing"
    beside.write_bytes(b"torn")  # by a worker that was killed over it
    (tmp_path / "config.yaml").touch()
    assert [record.ticket for record in Run(str(tmp_path)).trees(7)] == [0, 1]


def test_the_tree_table_has_a_row_a_step(tmp_path):
    folder = write_small_run(tmp_path)
    save_trees(folder, 20, [worked_record(5), worked_record(6)])
    table = Run(folder).tree_table(20)
    first = table[table["ticket"] == 5]
    assert len(table) == 12
    assert first["depth"].tolist() == [1, 2, 2, 1, 2, 2]
    assert first["parent"].tolist() == [-1, 0, 0, -1, 3, 3]
    assert first["value"].tolist() == [0.5, 1, 0, 0, 0, 0]
    assert first["value_se"].tolist() == [0.5, 0, 0, (5 / 36) ** 0.5, 0, 0]
    # S^2 is 1/16 for the prompt's children and 1/4 for step 0's; the Bernoulli variances are 3/16
    # and 1/4. Step 0 has e^2 = 1/4, step 3 has 5/36.
    errors = [(3 / 32) ** 0.5 * 16 / 3, 8**-0.5 * 4, 8**-0.5 * 4, (19 / 288) ** 0.5 * 16 / 3]
    assert first["advantage_se"].tolist()[:4] == pytest.approx(errors)
    assert first["advantage_se"].isna().tolist() == [False] * 4 + [True] * 2
    assert first["is_kept"].tolist() == [True, True, True, True, False, False]
    assert first["verdict"].dropna().tolist() == ["correct", "wrong", "wrong", "wrong"]
    assert first.loc[first["is_leaf"], "stop"].unique().tolist() == ["end_of_text"]


def test_events_and_evaluations_are_tables(run):
    assert run.events()["kind"].tolist() == ["run_started", "version_served"]
    assert run.events()["version"].dropna().tolist() == [1]
    assert run.evaluations().loc["step=000012", "pass_at_1"] == pytest.approx(0.5)


def test_step_texts_are_the_steps_own(run):
    record = grown_record(0)
    texts, tree = run.step_texts(record), record.tree
    for leaf, answer in zip(tree.leaves, record.leaf_texts, strict=True):
        assert "".join(texts[step] for step in tree.path(leaf)) == answer


def test_without_a_tokenizer_a_step_shows_its_length(tmp_path):
    folder = write_small_run(tmp_path)
    config = Path(folder, "config.yaml")
    config.write_text(config.read_text().replace("quickstart/model", "somewhere/else"))
    assert Run(folder).step_texts(worked_record())[0] == "(4 tokens)"


def test_value_is_lost_where_the_backed_up_value_drops_most(run):
    record = worked_record()
    assert path_changes(run, record, 2) == [0.25, -0.5]
    assert path_changes(run, record, 4) == [-0.25, 0]
    assert worst_leaf(run, record) == 2
    flat = replace(record, verdicts=(record.verdicts[1],) * 4)
    assert most_mixed_tree(run, [flat, record, flat]) is record


def test_a_run_on_an_object_store_reads_like_a_local_one(folder):
    uri = f"memory://{uuid.uuid4().hex}/small"
    fsspec.filesystem("memory").put(folder, uri, recursive=True)
    local, remote = Run(folder), Run(uri)
    assert remote.metrics().equals(local.metrics())
    assert remote.tree_table().equals(local.tree_table())
    assert remote.evaluations().equals(local.evaluations())
    assert remote.step_texts(worked_record()) == local.step_texts(worked_record())


def test_a_missing_folder_and_missing_parts_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no run: .* config\.yaml"):
        Run(str(tmp_path / "nowhere"))
    (tmp_path / "config.yaml").write_text("run: {name: empty}\n")
    empty = Run(str(tmp_path))
    for part in (empty.metrics, empty.events, empty.evaluations, empty.trees, empty.tree_table):
        with pytest.raises(ValueError, match=f"^{tmp_path} has no "):
            part()
    with pytest.raises(ValueError, match="no trees of step 3"):
        empty.trees(3)


def test_the_newest_run_is_the_one_written_last(tmp_path):
    with pytest.raises(ValueError, match="no run below"):
        newest_run(str(tmp_path))
    older, newer = write_small_run(tmp_path, "b"), write_small_run(tmp_path, "a")
    assert newest_run(str(tmp_path)) == newer != older


def test_rewards_by_data_set_have_a_panel_where_there_are_several():
    plain = {"reward/mean": [0.5], "loss/total": [0.1]}
    titles = [panel.title for panel in panels_of(plain)]
    assert titles == ["reward of the leaves", "loss"]
    names = [f"{BY_SET}hard", f"{BY_SET}easy"]
    mean, by_set, _ = panels_of(plain | {name: [0.5] for name in names})
    assert mean.title == "reward of the leaves"
    assert list(by_set.lines.items()) == [("easy", names[1]), ("hard", names[0])]


def test_curves_draw_what_the_run_has(run, tmp_path):
    figure = plot_curves(run)
    figure.draw_without_rendering()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Pass@1 on held-out problems" in titles
    assert "KL to the reference (nats a token)" not in titles
    pass_at_1 = figure.axes[titles.index("Pass@1 on held-out problems")]
    assert pass_at_1.lines[0].get_xdata().tolist() == [0, 6, 12]
    low, high = figure.axes[titles.index("answer length (tokens)")].get_ylim()
    assert high - low > 4  # half a token up and down, of 44, is noise


def test_kept_groups_by_depth_add_up_over_the_run(run):
    bars, lines = plot_kept_by_depth(run).axes
    metrics = run.metrics()
    heights = [bar.get_height() for bar in bars.patches]
    names = [f"groups/{state}_depth_{depth}" for state in ("kept", "pruned") for depth in (1, 2)]
    assert heights == metrics[names].sum().tolist()
    assert [line.get_label() for line in lines.lines] == ["depth 1", "depth 2"]


def test_a_depth_of_which_nothing_is_kept_has_a_share_of_zero_and_no_gap(tmp_path):
    """What is none was not written by earlier versions."""
    rows = [
        {"step": 0, "eval/pass_at_1": 0.1},
        {"step": 1, "groups/kept": 2, "groups/kept_depth_1": 2, "groups/pruned_depth_2": 4},
        {"step": 2, "groups/kept": 0, "groups/pruned_depth_1": 2, "groups/pruned_depth_2": 4},
        {"step": 3, "groups/kept": 3, "groups/kept_depth_1": 1, "groups/pruned_depth_1": 1}
        | {"groups/kept_depth_2": 2, "groups/pruned_depth_2": 6},
        {"step": 4, "groups/kept": 0},  # every group had an error: there is no share of nothing
    ]
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bars, lines = plot_kept_by_depth(Run(str(tmp_path))).axes
    shares = [line.get_ydata().tolist() for line in lines.lines]
    assert shares == [
        [1.0, 0.0, 0.5, pytest.approx(float("nan"), nan_ok=True)],
        [0.0, 0.0, 0.25, pytest.approx(float("nan"), nan_ok=True)],
    ]
    assert [bar.get_height() for bar in bars.patches] == [3, 2, 3, 14]


def test_the_pool_is_drawn_over_the_time_since_the_run_began(tmp_path):
    folder = write_small_run(tmp_path)
    with pytest.raises(ValueError, match="has no event pool in its events"):
        plot_pool(Run(folder))
    counts = {"nodes": 2, "serving": 1, "starting": 1, "draining": 0, "growing": 3, "waiting": 4}
    more = {"time": 1012.5, "kind": "pool", **counts}
    with (Path(folder) / "events.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    above, below = plot_pool(Run(folder)).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in (*above.lines, *below.lines)}
    assert drawn == {
        "nodes": [[12.5, 2]],
        "engines": [[12.5, 2]],
        "serving": [[12.5, 1]],
        "growing or waiting": [[12.5, 7]],
        "growing": [[12.5, 3]],
    }


def test_a_drawn_tree_has_every_step_with_text_value_advantage_and_verdict(run):
    texts = drawn_texts(plot_tree(run, worked_record()))
    assert {"prompt", "depth 1", "depth 2", "1+1=?\nv 0.25"} <= set(texts)
    assert "1+1=\nv 0.50  A +1.33" in texts
    assert "2\n#### 2\nv 1.00  A +2.00  correct" in texts
    assert texts.count("0\n#### 0\nv 0.00  wrong") == 2


def test_a_wide_tree_is_drawn_along_one_path(run):
    record = wide_record(num_children=8)
    assert len(record.tree.leaves) == 64 > MAX_LEAVES
    texts = drawn_texts(plot_tree(run, record))
    assert len([text for text in texts if text.endswith("… 8 leaves")]) == 7
    assert len([text for text in texts if text.endswith(("correct", "wrong"))]) == 8


def test_a_tree_that_is_not_mixed_is_told_as_such(run):
    record = worked_record()
    alike = replace(record, verdicts=(record.verdicts[1],) * 4)
    assert is_mixed(run, record) and not is_mixed(run, alike)
    for plot in (plot_tree, plot_value_along_path):
        told = [
            NOT_MIXED in plot(run, each).axes[0].get_title(loc="left") for each in (record, alike)
        ]
        assert told == [False, True]


def test_any_text_can_be_drawn(run):
    strange = "$\\frac{1}{ \x00\x1b 因此 \n\n" + 200 * "x "
    steps = [text_step(ROOT, strange, StopReason.BOUNDARY) for _ in range(2)]
    record = make_record(0, strange, "2", steps, ["#### 2", ""])
    assert any(
        text.endswith("…\nv 1.00  A +2.00  correct") for text in drawn_texts(plot_tree(run, record))
    )
    plot_value_along_path(run, record).draw_without_rendering()


def test_the_path_plot_marks_the_step_that_loses_most(run):
    figure = plot_value_along_path(run, worked_record())
    assert drawn_texts(figure) == ["\N{MINUS SIGN}0.50"]
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata().tolist() == [0.25, 0.5, 0]
    assert axes.get_title(loc="left").endswith("leaf 2: wrong")


def test_analysis_runs_without_ray_torch_and_vllm(folder):
    script = (
        "import sys; sys.modules |= dict.fromkeys(('ray', 'torch', 'vllm', 'transformers'));"
        "from treerpo_ray.study.analysis import Run, most_mixed_tree;"
        "from treerpo_ray.study.plots import plot_curves;"
        "from treerpo_ray.study.tree_plots import plot_tree;"
        "run = Run(sys.argv[1]); plot_curves(run);"
        "plot_tree(run, most_mixed_tree(run, run.trees())); print(len(run.tree_table()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(Run(folder).tree_table())


def test_a_form_of_the_users_is_run_from_the_source_in_the_folder(tmp_path):
    config = load(["learner.advantage=bernoulli", "learner.prune_threshold=0.6"])
    learner = replace(
        config.learner, advantage="gone.py:half", sources={"gone.py": pack(HALF_FORM)}
    )
    folder = write_small_run(tmp_path)
    Path(folder, "config.yaml").write_text(to_yaml(replace(config, learner=learner)))
    run = Run(folder, trusts_code=True)
    expected = [np.nan, 0.5, 0.0, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(run.advantages(worked_record()), expected)
