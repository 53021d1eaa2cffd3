"""Process: what this one prints and how much CPU time it takes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import psutil


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started, vLLM's core among them."""
    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            times = process.cpu_times()
            total += times.user + times.system
    return total


def redirect_output(path: Path) -> None:
    """Send what this process and its children print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


@contextmanager
def output_to_log(folder: str) -> Iterator[None]:
    """Send what libraries print in this process to `logs/driver.log` of a local run folder.

    The console keeps the terminal that it was made for, and errors are raised, not printed.
    """
    if "://" in folder:
        yield
        return
    path = Path(folder) / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file, redirect_stderr(file), redirect_stdout(file):
        yield
