"""Lock: a run folder has one writer at a time."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger(__name__)


FILE = "lock"


@contextmanager
def only_writer(folder: str) -> Iterator[None]:
    """Be the only one that writes the run folder `folder`; those that only read need no lock.

    It has to be a path, on this machine or shared: an object store (URI) knows no locks.

    Raises:
        ValueError: another process writes it.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    if not isinstance(fs, LocalFileSystem):
        yield
        return
    Path(root).mkdir(parents=True, exist_ok=True)
    with Path(root, FILE).open("a") as file:
        try:
            # It ends with this process, however that ends, so that the file itself may stay.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another job writes {folder}; wait for it or choose another run.name"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("nothing keeps other jobs from writing %s: %s", folder, error)
        yield
