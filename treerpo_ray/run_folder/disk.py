"""Disk: why one refuses, or a store, and what room it has.

Libraries wrap what the operating system says: PyTorch in an error of its own, which it raises while
it closes the file, and those in Rust in its text. What stands behind an error counts, too.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path

from treerpo_ray.errors import one_line

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
AWAY = frozenset(
    {
        *(errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO),
        *(errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY, errno.ENOMEM),
        *(errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EPIPE),
    }
)
"""Of a disk or a network that may come back as it was."""
RAY_FULL = ("OutOfDiskError", "ObjectStoreFullError")
"""What Ray raises where neither its memory nor the disk that it spills to has room."""
RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust, such as safetensors, name the operating system's error."""
MISTAKES = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
"""What no store raises for want of anything that would come back."""


class Refusal(Enum):
    """Why something is not taken."""

    FULL = auto()
    """There is no room: people have to make some."""
    AWAY = auto()
    """It does not work now, and may again."""


def refusal_of(error: BaseException, *, is_local: bool = True) -> Refusal | None:
    """Why a disk, or a store if it is not local, refuses; None for what has another cause."""
    for each in _chain(error):
        number = _number(each)
        if number in FULL or type(each).__name__ in RAY_FULL:
            return Refusal.FULL
        if type(each).__module__.partition(".")[0] == "ray":  # of another process, not of this disk
            return None
        if number in AWAY or isinstance(each, ConnectionError | TimeoutError):
            return Refusal.AWAY
    if isinstance(error, OSError) and error.errno is None:  # it does not hold what was written
        return Refusal.AWAY
    if not is_local and isinstance(error, Exception) and not isinstance(error, MISTAKES):
        return Refusal.AWAY
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that stand behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error, if it tells one."""
    if isinstance(error, OSError):
        return error.errno
    told = RUST_NUMBER.search(str(error))
    return int(told[1]) if told else None


def disk_of(place: Path) -> Path:
    """Where the disk of a file or folder, which need not be there yet, is mounted."""
    place = nearest(place).resolve()
    return next(each for each in (place, *place.parents) if os.path.ismount(each))


def nearest(place: Path) -> Path:
    """The file or folder itself or the first of those above it that is there."""
    place = place.absolute()
    return next(each for each in (place, *place.parents) if each.exists())


def free_bytes(place: Path) -> int:
    """Room that is left on the disk of a file or folder, which need not be there yet.

    Raises:
        OSError: it does not say.
    """
    return shutil.disk_usage(nearest(place)).free


def size(num_bytes: float) -> str:
    """A number of bytes for people.

    >>> size(10_600_000)
    '10.6 MB'
    """
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while num_bytes >= 999.5 and power + 1 < len(units):
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.3g} {units[power]}"


def explain(error: BaseException, place: Path | None = None, num_bytes: int = 0) -> str:
    """What is wrong in one line, with the disk of `place` and its room if that is full.

    Args:
        error: What was raised.
        place: Where something was written.
        num_bytes: What it needs, about; 0 if nobody knows.
    """
    if place is None or refusal_of(error) is not Refusal.FULL:
        return f"{type(error).__name__}: {one_line(error)}"
    if type(error).__name__ in RAY_FULL:
        return f"Ray's object store and the disk that it spills to are full ({one_line(error)})"
    needs = f"{size(num_bytes)} needed, " if num_bytes else ""
    try:
        free, disk = size(free_bytes(place)), f"the disk {disk_of(place)} of {place}"
    except OSError as fault:
        return f"the disk of {place} is full: {needs}what is free is unknown ({one_line(fault)})"
    if errno.EDQUOT in map(_number, _chain(error)):
        return f"the quota on {disk} is used up: {needs}{free} free but for the quota"
    return f"{disk} is full: {needs}{free} free"
