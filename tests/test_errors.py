"""What a command makes of an error."""

import importlib.util
import subprocess
import sys

import pytest

from tests.support.project import PROJECT
from treerpo_ray.errors import STOPPED, UNREAD, RunFailed, run_command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("no such key"), 2, "error: no such key\n"),
        (ImportError("No module named 's3fs'"), 2, "error: No module named 's3fs'\n"),
        (RunFailed("no engine is left"), 1, "failed: no engine is left\n"),
        (KeyboardInterrupt(), STOPPED, "it goes on\n"),
    ],
)
def test_an_error_becomes_a_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str]) -> int:
        raise error

    assert run_command(command, [], stopped="it goes on") == status
    assert capsys.readouterr() == ("", line)


def test_a_command_gets_its_arguments_and_gives_its_own_status() -> None:
    assert run_command(len, ["a", "b"]) == 2


UNREAD_COMMAND = """
import sys
from treerpo_ray.errors import run_command
def say(arguments):
    for number in range(100_000):
        print(number)
    return 0
sys.exit(run_command(say, []))
"""


def test_a_command_whose_reader_has_gone_ends_without_a_word() -> None:
    """As in `--help | head`."""
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD_COMMAND],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None and command.stderr is not None
        assert command.stdout.readline() == "0\n"
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.returncode == UNREAD


def test_what_nobody_foresaw_keeps_its_trace() -> None:
    def command(arguments: list[str]) -> int:
        raise LookupError("a mistake in the code")

    with pytest.raises(LookupError):
        run_command(command, [])


def test_a_python_without_the_project_is_told_where_one_is(capsys, monkeypatch) -> None:
    def command(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "error: No module named 'rich'\n"

    # Not by whether the project is known: any Python that is started in a checkout that was set up
    # finds its name there.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_command(command, []) == 2
    assert "has not what the project needs; bash jobs/quickstart.sh" in capsys.readouterr().err
