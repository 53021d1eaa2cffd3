import ast
import json
from pathlib import Path

import pytest

from tests.support.notebooks import (
    BY_HAND,
    COMPARE,
    NOTEBOOKS,
    READ_A_RUN,
    complaints,
    execute,
    shown,
)
from tests.support.small_run import write_small_run


def test_a_run_is_shown_in_four_figures_and_two_tables(tmp_path: Path) -> None:
    executed = execute(READ_A_RUN, TREERPO_RUN=write_small_run(tmp_path))
    assert (shown(executed, "image/png"), shown(executed, "text/html")) == (4, 2)
    assert complaints(executed) == []


def test_a_tree_is_followed_by_hand_from_its_question_to_its_update() -> None:
    """Its cells hold what is computed by hand against the package."""
    executed = execute(BY_HAND)
    assert (shown(executed, "image/png"), shown(executed, "text/html")) == (2, 2)
    assert complaints(executed) == []


def test_the_committed_comparisons_are_shown_in_two_figures_and_two_tables() -> None:
    executed = execute(COMPARE)
    assert (shown(executed, "image/png"), shown(executed, "text/html")) == (2, 2)
    assert complaints(executed) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_no_functions_and_is_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    source = "\n".join("".join(cell["source"]).replace("%matplotlib", "# ") for cell in code)
    defined = (ast.FunctionDef, ast.Lambda, ast.ClassDef)
    assert not [found for found in ast.walk(ast.parse(source)) if isinstance(found, defined)]
