import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.support.learning.records import some_training
from tests.support.saved_runs.fork_rows import measured_forks
from tests.support.saved_runs.notebooks import (
    BY_HAND,
    COMPARE,
    NOTEBOOKS,
    READ_A_RUN,
    evaluate,
)
from tests.support.saved_runs.small_run import (
    NUM_STEPS,
    answers_to,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import PROBLEMS
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.analysis import Missing

TREES, ANSWERS = "has no trees of any step", "has no two evaluations with answers"
FORKS = "has no metrics fork/"
TRAINING = "has trees without what the learner made of their tokens"


def test_a_run_is_shown_in_ten_figures_and_four_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel shows a real one in `tests/runs`."""
    folder = write_small_run(tmp_path)
    record = worked_record(8)
    save_trees(folder, NUM_STEPS + 1, [replace(record, training=some_training(record.tree))])
    for step, right in ((0, "#### 3"), (NUM_STEPS, "#### 2")):
        RunFolder(folder).publish_table(*answers_to(PROBLEMS[:1], step, [[right]]))
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": NUM_STEPS} | measured_forks(0.6)), file=file)
    monkeypatch.setenv("TREERPO_RUN", folder)
    assert kinds(evaluate(READ_A_RUN)) == (10, 4)


def bare_run(root: Path, lacking: str) -> str:
    """A run without a part of what a run has."""
    folder = Path(write_small_run(root))
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    match lacking:
        case "trees and evaluations":
            shutil.rmtree(folder / "trees")
            shutil.rmtree(folder / "eval")
            kept = [json.loads(row) for row in rows]
            kept = [{k: v for k, v in row.items() if "eval" not in k} for row in kept]
            rows = [json.dumps(row) + "\n" for row in kept]
        case "a second step":
            rows = rows[:2]
            shutil.rmtree(folder / "trees")
            save_trees(folder, 1, [worked_record()])
        case "any step":
            rows = []
            shutil.rmtree(folder / "trees")
    (folder / "metrics.jsonl").write_text("".join(rows))
    return str(folder)


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ("trees and evaluations", [*[TREES] * 9, ANSWERS, FORKS]),
        ("a second step", [TRAINING, ANSWERS, FORKS]),
        ("any step", [*["has no step in"] * 4, *[TREES] * 9, ANSWERS]),
    ],
)
def test_what_a_run_lacks_is_told_in_place_of_its_figure(
    lacking: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREERPO_RUN", bare_run(tmp_path, lacking))
    found = evaluate(READ_A_RUN)
    kinds(found)
    reasons = [repr(one) for one in found if isinstance(one, Missing)]
    assert len(found) == 14 and len(reasons) == len(told)
    for part in set(told):
        assert sum(part in reason for reason in reasons) == told.count(part)


def kinds(found: list[object]) -> tuple[int, int]:
    """How many figures, each of which is drawn, and how many tables."""
    figures = [one for one in found if isinstance(one, Figure)]
    for figure in figures:
        figure.draw_without_rendering()
    return len(figures), sum(isinstance(one, pd.DataFrame) for one in found)


@pytest.fixture
def beside_the_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder where a kernel begins."""
    monkeypatch.chdir(BY_HAND.parent)


def test_a_tree_is_followed_by_hand_from_its_question_to_its_update(
    beside_the_notebooks: None,
) -> None:
    """Its cells hold what is computed by hand against the package."""
    assert kinds(evaluate(BY_HAND)) == (2, 2)


def test_the_committed_comparisons_are_shown_in_two_figures_and_two_tables(
    beside_the_notebooks: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert kinds(evaluate(COMPARE)) == (2, 2)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_no_functions_and_is_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    source = "\n".join("".join(cell["source"]).replace("%matplotlib", "# ") for cell in code)
    defined = (ast.FunctionDef, ast.Lambda, ast.ClassDef)
    assert not [found for found in ast.walk(ast.parse(source)) if isinstance(found, defined)]
