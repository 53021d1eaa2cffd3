"""Lock: a run folder has one writer at a time."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treerpo_ray.run_folder.files import RunFolder

log = logging.getLogger(__name__)

FILE = "lock"


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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another job writes {folder}; wait for it or choose another run.name"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("nothing keeps other jobs from writing %s: %s", folder, error)
        yield
