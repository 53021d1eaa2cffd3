"""The script that shows a run, with the set-up and the notebook played."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.project import PROJECT

PLAYED = """#!/bin/sh
# A Python that has all that it needs, and notes what it is told.
case "$*" in
*requirements.py*) ;;
*nbconvert*) echo "$TREERPO_RUN $*" >> "$NOTES" ;;
*) echo "$NEWEST" ;;
esac
"""


def show(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    scripts, tools = tmp_path / "project/jobs", tmp_path / "venv/bin"
    for folder in (scripts, tools):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("setup.sh", "notebook.sh"):
        shutil.copy(PROJECT / "jobs" / name, scripts / name)
    (tools / "python").write_text(PLAYED)
    (tools / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "TREERPO_VENV": str(tmp_path / "venv")}
    environment |= {"NOTES": str(tmp_path / "notes"), "NEWEST": str(tmp_path / "runs/new")}
    return subprocess.run(
        ["bash", str(scripts / "notebook.sh")],
        cwd=tmp_path,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_page_of_a_run_lies_in_its_folder_the_newest_if_none_is_named(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    cases: list[tuple[str, dict[str, str]]] = [
        ("new", {}),
        ("old", {"TREERPO_RUN": str(tmp_path / "runs/old")}),
        ("old", {"TREERPO_RUN": "runs/old"}),  # from where the script is called
    ]
    for name, variables in cases:
        done = show(tmp_path, **variables)
        assert done.stdout == f"{tmp_path}/runs/{name}/read_a_run.html\n", done.stderr
        told = (tmp_path / "notes").read_text().splitlines()[-1]
        assert told.startswith(f"{tmp_path}/runs/{name} -m nbconvert ")
        assert f"--output-dir {tmp_path}/runs/{name} " in told


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = show(tmp_path, TREERPO_RUN=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (f"error: TREERPO_RUN={tmp_path} is no run: it has no config.yaml\n")


def test_the_notebook_that_the_script_runs_is_there() -> None:
    script = (PROJECT / "jobs/notebook.sh").read_text()
    [named] = {word for word in script.split() if word.endswith(".ipynb") and "/" in word}
    assert (PROJECT / named).is_file()
