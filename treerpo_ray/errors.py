"""Errors: on one line, of a run that failed, and what a command makes of them."""

import importlib.util
import os
import re
import select
import signal
import sys
from collections.abc import Callable

from treerpo_ray.stop import STOPPED, ended_at_once

UNREAD = 128 + signal.SIGPIPE
"""Exit status where the reader of stdout has gone: what a shell makes of the signal for it."""


def one_line(error: BaseException) -> str:
    """Text of an error on one line, of bounded length, that any terminal can print."""
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 400 else f"{text[:400]}..."


RAY_IDS = re.compile(
    r"(?:,? ?\b(?:pid|(?:node|actor|worker|object|job|task)[ _]?id)\s?[=:]\s?| )?"
    r"(?<![\w/.@-])[0-9a-f]{16,}(?![\w/.@-])|,? ?\bpid\s?[=:]\s?\d+",
    re.I,
)
"""What Ray's messages name nodes, actors, objects and processes by; no part of a path."""


def without_ids(text: str) -> str:
    """A message for a person; the logs have it with its ids.

    >>> without_ids("the actor died, node_id=0123456789abcdef0123456789abcdef, pid=17: no memory")
    'the actor died: no memory'
    """
    return RAY_IDS.sub("", text)


class RunFailed(Exception):
    """A run ended for good; one line with the cause and where to look."""


class NodeDiffers(ValueError):
    """A node has other versions than the rest of the run: one line with the node and the fix."""


class UserCodeError(ValueError):
    """The user's own code cannot be used: one line that says why, and the user's traceback."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.message, self.trace = message, trace

    def __str__(self) -> str:
        return f"{self.message}\n{self.trace}" if self.trace else self.message


def _remedy(error: BaseException) -> str:
    """What helps where a package is missing because this Python is not that of the project."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    # Its name is known to any Python that is started in the checkout, once that was set up.
    if all(importlib.util.find_spec(name) for name in ("numpy", "ray", "torch")):
        return ""
    return (
        f": {sys.executable} has not what the project needs; bash jobs/quickstart.sh makes "
        ".venv, and `source .venv/bin/activate` takes it"
    )


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
        run that failed, STOPPED for an interrupt, UNREAD if nobody reads stdout any more.
    """
    try:
        try:
            return _status(command, arguments, stopped)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes
        return UNREAD


def _is_unread() -> bool:
    """Whether the reader of stdout has gone, as in `--help | head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _status(command: Callable[[list[str]], int], arguments: list[str], stopped: str) -> int:
    try:
        with ended_at_once():
            return command(arguments)
    except (ValueError, ImportError) as error:
        print(f"error: {error}{_remedy(error)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(without_ids(f"failed: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
