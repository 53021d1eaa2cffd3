"""The notebook that reads a run, as a user runs it."""

import os

import nbformat
from nbclient import NotebookClient

from tests.support.project import ROOT

NOTEBOOK = ROOT / "notebooks/read_a_run.ipynb"


def execute(folder: str) -> nbformat.NotebookNode:
    """The notebook after a run over a run folder; a cell that fails is an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = os.environ | {"TREERPO_RUN": folder, "PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=600).execute(env=env)
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """What its cells show, one after the other."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]
