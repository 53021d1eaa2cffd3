import ast
import json

import pytest

from tests.support.notebooks import NOTEBOOK, execute, outputs
from tests.support.small_run import write_small_run


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run over a small run folder; a cell that fails is an error."""
    return execute(write_small_run(tmp_path_factory.mktemp("runs")))


def test_the_notebook_shows_four_figures_and_two_tables(executed):
    kinds = [set(output.get("data", {})) for output in outputs(executed)]
    assert len([kind for kind in kinds if "image/png" in kind]) == 4
    assert len([kind for kind in kinds if "text/html" in kind]) == 2


def test_the_notebook_writes_nothing_to_stderr(executed):
    assert [output for output in outputs(executed) if output.get("name") == "stderr"] == []


def test_the_notebook_defines_no_functions_and_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    source = "\n".join("".join(cell["source"]).replace("%", "# ") for cell in code)
    defined = (ast.FunctionDef, ast.Lambda, ast.ClassDef)
    assert not [found for found in ast.walk(ast.parse(source)) if isinstance(found, defined)]
