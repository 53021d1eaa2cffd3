"""The notebooks, as a user runs them."""

import ast
import json
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.support.project import PROJECT

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
BY_HAND, READ_A_RUN, COMPARE = NOTEBOOKS


def execute(path: Path, **environment: str) -> nbformat.NotebookNode:
    """A notebook after its run; a cell that fails is an error."""
    notebook = nbformat.read(path, as_version=4)
    env = os.environ | {"PYTHONPATH": str(PROJECT)} | environment
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, resources=where).execute(env=env)
    return notebook


def evaluate(path: Path) -> list[object]:
    """What the cells of a notebook end in, in this process and without a kernel."""
    names: dict[str, object] = {}
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = ast.parse("".join(cell["source"]).replace("%matplotlib", "# "))
            last = source.body.pop() if isinstance(source.body[-1], ast.Expr) else None
            exec(compile(source, path.name, "exec"), names)
            if isinstance(last, ast.Expr):
                found.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    return found


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What its cells show, one after the other."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def complaints(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What it wrote to stderr."""
    return [output for output in outputs(notebook) if output.get("name") == "stderr"]
