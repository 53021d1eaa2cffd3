"""Lock: a run folder has one writer at a time."""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from treerpo_ray.run_folder.files import RunFolder

log = logging.getLogger(__name__)

FILE = "lock"
LOOK_S = 0.2
"""Longer than `check_unwritten` holds the lock."""


def check_unwritten(folder: RunFolder) -> None:
    """Refuse a folder that a job writes at the moment; nothing is made or held.

    Raises:
        ValueError: another process is its `only_writer`.
    """
    place = Path(folder.root, FILE)
    if not folder.is_local or not place.exists():
        return
    with suppress(OSError), place.open() as file:  # who may not read it, or lock it, cannot know
        _lock(file, fcntl.LOCK_SH, folder)


@contextmanager
def only_writer(folder: RunFolder) -> Iterator[None]:
    """Be the only one that writes a run folder; those that only read need no lock.

    It has to be a path, on this machine or shared: an object store (URI) knows no locks.

    Raises:
        ValueError: another process writes it.
    """
    if not folder.is_local:
        yield
        return
    Path(folder.root).mkdir(parents=True, exist_ok=True)
    with Path(folder.root, FILE).open("a") as file:
        try:
            # It ends with this process, however that ends, so that the file itself may stay.
            _lock(file, fcntl.LOCK_EX, folder)
        except OSError as error:  # a file system without locks
            log.warning("nothing keeps other jobs from writing %s: %s", folder, error)
        yield


def _lock(file: IO[str], kind: int, folder: RunFolder) -> None:
    """Take a lock of that kind, which ends with the file; raises ValueError if it is held, but for
    the moment in which another job only looks."""
    for wait_s in (LOOK_S, 0.0):
        with suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        time.sleep(wait_s)
    raise ValueError(f"another job writes {folder}; wait for it or choose another run.name")
