"""Errors: on one line, of a run that failed, and what a command makes of them."""

import sys
from collections.abc import Callable

from treerpo_ray.stop import STOPPED, ended_at_once


def one_line(error: BaseException) -> str:
    """Text of an error on one line, of bounded length, that any terminal can print."""
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 400 else f"{text[:400]}..."


class RunFailed(Exception):
    """A run ended for good; one line with the cause and where to look."""


def run_command(
    command: Callable[[list[str]], int], arguments: list[str], *, stopped: str = "stopped"
) -> int:
    """Run a command; what it raises becomes a line on stderr and an exit status.

    Until it says otherwise (`Stop`), a signal ends it at once.

    Args:
        command: Takes the arguments and returns the exit status.
        arguments: Those of the command line.
        stopped: The line for one that is interrupted.

    Returns:
        The command's own status; 2 for wrong input or a package that is not installed, 1 for a
        run that failed, STOPPED for an interrupt.
    """
    try:
        with ended_at_once():
            return command(arguments)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
