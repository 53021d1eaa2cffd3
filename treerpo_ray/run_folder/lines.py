"""Spool: files of a run that grow by lines, in its folder or, for an object store, beside it.

A disk that is full, slow or gone and a store that does not answer delay lines but lose none: what
cannot be written waits in memory and is tried again, and whoever appends goes on.
"""

import json
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

Scalar = str | int | float | bool | None


Warn = Callable[[str, str], None]
"""Told the kind of something out of the ordinary, and the reason."""


UPLOAD_EVERY_S = 5.0
"""Time between uploads of a grown file to an object store, which cannot append."""


RETRY_S = 5.0
"""Time between attempts to write to a disk that refused."""


PATIENCE_S = 5.0
"""Time that an append waits for the disk before it goes on without."""


DISK_CLOSE_S = 15.0
"""Time that the disk gets to take the rest when the run ends."""


STORE_CLOSE_S = 60.0
"""Time that the store gets."""


class Spool:
    """Files of the run folder `folder` (path or URI) that only ever grow, by whole lines.

    Args:
        folder: The run folder; it has one writer at a time (`lock`).
        names: Files that are continued where an earlier session left them.
        warn: Told once when lines begin to wait or uploads to fail, and once when all is written.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: str, names: tuple[str, ...], warn: Warn) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(folder)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self.path = Path(self._root if self._is_local else tempfile.mkdtemp(prefix="treerpo_"))
        self.path.mkdir(parents=True, exist_ok=True)
        self._warn = warn
        for name in names:
            self._take_up(name)
        self._writer = _LineWriter(self.path, warn)
        self._sizes: dict[str, int] = {}
        self._num_uploaded = 0
        self._upload_fault: str | None = None
        self._stop = threading.Event()
        self._uploader = threading.Thread(
            target=self._upload_loop, name="metrics-upload", daemon=True
        )
        if not self._is_local:
            self._uploader.start()

    def _take_up(self, name: str) -> None:
        """Continue a file that is there, without a line that a crash left unfinished."""
        path, remote = self.path / name, f"{self._root}/{name}"
        if not self._is_local and self._fs.exists(remote):
            path.write_bytes(self._fs.cat_file(remote))
        if path.suffix == ".jsonl" and path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def read(self, name: str) -> str:
        """Text of a file; empty if there is none."""
        path = self.path / name
        return path.read_text() if path.exists() else ""

    def append(self, name: str, line: Mapping[str, Scalar]) -> None:
        """Hand over a line; it is written as soon as the disk takes it, in this order."""
        self._writer.append(name, json.dumps(line, allow_nan=False).encode() + b"\n")

    def settle(self) -> None:
        """Wait until all lines are on disk, but not for a disk that is known to be late."""
        self._writer.settle()

    def num_lines(self) -> tuple[int, int]:
        """Lines that were handed over, and how many of them are in the run folder by now."""
        taken, written = self._writer.num_taken, self._writer.num_written
        return taken, written if self._is_local else self._num_uploaded

    def close(self) -> None:
        """Write and upload the rest, within a limited time.

        Raises:
            OSError: the disk or the store did not take all; the message names where the rest is.
        """
        rescued = self._writer.close()
        if not self._is_local:
            self._stop.set()
            self._uploader.join(STORE_CLOSE_S)
            fault = "too slow" if self._uploader.is_alive() else self._upload_fault
            if fault:
                rest = f", the last lines in {rescued}" if rescued else ""
                raise OSError(
                    f"upload to {self._root} failed ({fault}), the files are in {self.path}{rest}"
                )
        if rescued:
            raise OSError(f"{self.path} did not take the last lines; they are in {rescued}")
        if not self._is_local:
            shutil.rmtree(self.path)

    def _upload_loop(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(UPLOAD_EVERY_S)
            found = self.path.rglob("*") if is_last else self.path.iterdir()
            num_written = self._writer.num_written
            try:
                self._upload([path for path in found if path.is_file()])
            except Exception as error:  # any store's own error: tried again, and raised by close
                if self._upload_fault is None:
                    self._warn("upload_delayed", f"{type(error).__name__}: {error}")
                self._upload_fault = f"{type(error).__name__}: {error}"
            else:
                if self._upload_fault is not None:
                    self._warn("upload_caught_up", str(self._root))
                self._upload_fault = None
                self._num_uploaded = num_written

    def _upload(self, paths: list[Path]) -> None:
        for path in paths:
            name, content = path.relative_to(self.path).as_posix(), path.read_bytes()
            if len(content) != self._sizes.get(name):
                self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(f"{self._root}/{name}", content)
                self._sizes[name] = len(content)


class _LineWriter:
    """Appends lines to the files of a folder in a thread, for as long as the disk needs."""

    def __init__(self, folder: Path, warn: Warn) -> None:
        self._folder, self._warn = folder, warn
        self._changed = threading.Condition()
        self._lines: deque[tuple[str, bytes]] = deque()
        self._sizes: dict[str, int] = {}
        self.num_taken = self.num_written = 0
        self._is_late = self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="metrics-write", daemon=True)
        self._thread.start()

    def append(self, name: str, line: bytes) -> None:
        with self._changed:
            self._lines.append((name, line))
            self.num_taken += 1
            self._changed.notify_all()

    def settle(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._lines or self._is_late, PATIENCE_S):
                self._delay("the disk does not answer")

    def close(self) -> str | None:
        """Write the rest; returns the folder that holds what the disk of the run did not take."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(DISK_CLOSE_S)
        with self._changed:
            rest = list(self._lines)
        if not rest:
            return None
        rescue = Path(tempfile.mkdtemp(prefix="treerpo_rest_"))
        for name, line in rest:
            with (rescue / name).open("ab") as file:
                file.write(line)
        return str(rescue)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closing)
                if not self._lines:
                    return
                name, line = self._lines[0]
            try:
                self._write(name, line)
            except OSError as error:
                with self._changed:
                    if self._is_closing:
                        return
                    self._delay(str(error))
                    self._changed.wait_for(lambda: self._is_closing, RETRY_S)
                continue
            with self._changed:
                self._lines.popleft()
                self.num_written += 1
                if not self._lines and self._is_late:
                    self._is_late = False
                    self._warn("log_caught_up", str(self._folder))
                self._changed.notify_all()

    def _write(self, name: str, line: bytes) -> None:
        with (self._folder / name).open("ab") as file:
            if file.tell() > self._sizes.get(name, file.tell()):
                file.truncate(self._sizes[name])  # part of a line, which a full disk left
            self._sizes[name] = file.seek(0, os.SEEK_END)
            file.write(line)
        self._sizes[name] += len(line)

    def _delay(self, reason: str) -> None:
        if not self._is_late:
            self._is_late = True
            self._warn("log_delayed", reason)
            self._changed.notify_all()
