"""Logs: what a process prints, in the run folder."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from treerpo_ray.run_folder.files import RunFolder


@contextmanager
def output_to_log(folder: RunFolder) -> Iterator[None]:
    """Send what libraries print in this process to `logs/driver.log` of a local run folder.

    The console keeps the terminal that it was made for, and errors are raised, not printed.
    """
    if not folder.is_local:
        yield
        return
    path = Path(folder.root) / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file, redirect_stderr(file), redirect_stdout(file):
        yield
