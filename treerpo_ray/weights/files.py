"""Weight files: a version of the weights as one file in memory, which all processes of a node map.

    maker: begin ──► part ... part ──► seal ──► release          reader: HeldFile ──► close

A file counts as memory of its maker and not against a size of /dev/shm, which containers keep
small; it is gone with the last process that has it open or mapped. The first touch of a page costs
more than a copy of it, so that files and maps of them are used again. The kernel's locks tell when
that may be: they are let go with the process that had them, however it ended.
"""

import fcntl
import mmap
import os
import uuid
import weakref
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

KEPT = 2
"""Files that a maker uses in turns, and whose maps readers keep: one is served, one written."""


class WeightsLost(RuntimeError):
    """The bytes of a version are gone, with the node or the process that held them; whoever was to
    load them still has what it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlace:
    """Where the chunks of a version lie on a node."""

    path: str
    """Of the file, for other processes of the node."""
    stamp: bytes
    """Of this publication; it stands at the start of the file."""
    parts: tuple[tuple[int, int], ...]
    """Offset and size (bytes) of each chunk."""


class WeightFile:
    """A file that is written from its start again and again, when nobody reads it."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("treerpo-weights")
        weakref.finalize(self, os.close, self._descriptor)
        self._size = 0
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        """By offset and size of the part."""
        self._parts: list[tuple[int, int]] = []
        self._is_sealed = False

    def begin(self) -> bool:
        """Begin to write it, unless somebody reads it or is to read it: then it is let be."""
        if self._is_sealed:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._parts = []
        return True

    def part(self, num_bytes: int) -> UInt8[np.ndarray, " num_bytes"]:
        """The next part, to be written; what is in it is undefined.

        Raises:
            OSError: there is no memory for it.
        """
        offset = sum(self._parts[-1]) if self._parts else len(uuid.uuid4().bytes)
        offset += -offset % mmap.PAGESIZE
        if (end := offset + num_bytes) > self._size:
            # Now, since a page that cannot be had later ends the process.
            os.posix_fallocate(self._descriptor, self._size, end - self._size)
            self._size = end
        where = offset, num_bytes
        if where not in self._maps:
            self._maps[where] = mmap.mmap(self._descriptor, num_bytes, offset=offset)
        self._parts.append(where)
        return np.frombuffer(self._maps[where], np.uint8)

    def seal(self, stamp: bytes | None = None) -> FilePlace:
        """All is written; it stays as it is until `release`, and while somebody has it open.

        Args:
            stamp: That of the publication, if it has one already.
        """
        stamp = stamp or uuid.uuid4().bytes
        os.pwrite(self._descriptor, stamp, 0)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._is_sealed = True
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return FilePlace(path=path, stamp=stamp, parts=tuple(self._parts))

    def release(self) -> None:
        """Whoever is to read it has it open."""
        self._is_sealed = False


class WeightFiles:
    """The files of one maker, which uses one after the other."""

    def __init__(self) -> None:
        self._files: list[WeightFile] = []

    def begin(self) -> WeightFile:
        """One that nobody reads, begun; a new one if there is none."""
        for file in self._files:
            if file.begin():
                return file
        made = WeightFile()
        made.begin()
        self._files = [*self._files, made][-KEPT:]
        return made


class HeldFile:
    """A version's file, which is not written again while this is open.

    Raises:
        WeightsLost: it is not there any more, or holds another version.
    """

    def __init__(self, place: FilePlace) -> None:
        try:
            # Its number may be that of anything by now, and is not waited for.
            descriptor = os.open(place.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise WeightsLost(f"weights are gone: {error.strerror}") from None
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            stamp = os.pread(descriptor, len(place.stamp), 0)
        except OSError as error:
            self.close()
            raise WeightsLost(f"weights are gone: {error.strerror}") from None
        if stamp != place.stamp:
            self.close()
            raise WeightsLost("weights are gone: others lie in their file")
        self.place = replace(place, path=f"/proc/{os.getpid()}/fd/{descriptor}")
        """Where other processes of the node find it, while this is open."""


class FileMaps:
    """Maps of the files that were read last; they are kept, since pages cost to be found."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int, int], mmap.mmap] = {}
        """By device, inode and size; the file that was read last is the last one."""

    def read(self, path: str, offset: int, num_bytes: int) -> UInt8[np.ndarray, " num_bytes"]:
        """What lies in a file now, without a copy.

        Who writes in it changes what this process sees of the file, and nothing else.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            same = status.st_dev, status.st_ino, status.st_size
            memory = self._maps.pop(same, None) or mmap.mmap(
                descriptor,
                status.st_size,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,  # torch wants memory that can be written
            )
        finally:
            os.close(descriptor)
        self._maps[same] = memory
        for old in list(self._maps)[:-KEPT]:
            del self._maps[old]
        return np.frombuffer(memory, np.uint8, num_bytes, offset)
