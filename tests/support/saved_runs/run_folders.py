"""Run folders, what is written into them, and stores that lose some of it."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Write = Callable[[Path], None]


def contents(content: str) -> Write:
    def write(target: Path) -> None:
        (target / "state.pt").write_text(f"state {content}")
        (target / "model/shards").mkdir(parents=True)
        (target / "model/shards/0.safetensors").write_bytes(content.encode() * 1000)

    return write


def full_disk(target: Path) -> None:
    contents("half")(target)
    raise OSError(errno.ENOSPC, "No space left on device")


def files(folder: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(folder)
    return {path.removeprefix(root): fs.cat_file(path) for path in fs.find(root)}


class LossyStore(MemoryFileSystem):
    """An object store that keeps one byte less of the file `torn`."""

    protocol = "lossy"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    torn = "nothing"
    arrived: ClassVar[list[str]] = []

    def put_file(self, local: str, remote: str, **options: object) -> None:
        content = Path(local).read_bytes()
        self.pipe_file(remote, content[:-1] if remote.endswith(self.torn) else content)
        self.arrived.append(remote.rpartition("/")[2])

    @classmethod
    def register(cls) -> None:
        """Make it known, and empty."""
        fsspec.register_implementation("lossy", cls, clobber=True)
        cls.store.clear()
        cls.arrived.clear()


class HangingStore(MemoryFileSystem):
    """An object store that takes nothing before `hold` is set."""

    protocol = "hanging"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    hold = threading.Event()

    def pipe_file(self, path: str, value: bytes, **options: object) -> None:
        assert HangingStore.hold.wait(60)
        super().pipe_file(path, value)
