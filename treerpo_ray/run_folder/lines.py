"""Append log: files of a run that grow by lines, in its folder or, for an object store, beside it.

A disk that is full, slow or gone and a store that does not answer delay lines but lose none: what
cannot be written waits in memory and is tried again, and whoever appends goes on.
"""

import json
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from treerpo_ray.run_folder.disk import size
from treerpo_ray.run_folder.files import RunFolder, Scalar
from treerpo_ray.run_folder.writer import BackgroundWriter, Warn


@dataclass(frozen=True, slots=True, kw_only=True)
class LogTimes:
    """Seconds that an append log waits for its sinks."""

    retry: float = 5.0
    """Between attempts to write to a disk that refused."""
    patience: float = 5.0
    """For the disk, before whoever appends goes on without."""
    upload_every: float = 5.0
    """Between uploads of grown files to an object store, which cannot append."""
    disk_close: float = 15.0
    """For the disk to take the rest when the run ends."""
    store_close: float = 60.0
    """For the store."""


class AppendLog:
    """Files of a run folder that only ever grow, by whole lines.

    Args:
        folder: The run folder; it has one writer at a time (`lock`).
        names: Files that are continued where an earlier session left them.
        warn: Told, with a kind and a reason, once when lines begin to wait or uploads to fail, and
            once when all is written.
        times: How long each sink is waited for.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        names: tuple[str, ...],
        warn: Warn,
        times: LogTimes | None = None,
    ) -> None:
        self._folder, self._warn, self._times = folder, warn, times or LogTimes()
        self.path = Path(folder.root if folder.is_local else tempfile.mkdtemp(prefix="treerpo_"))
        self.path.mkdir(parents=True, exist_ok=True)
        for name in names:
            self._take_up(name)
        self._counting = threading.Lock()
        self._lines: deque[tuple[str, bytes]] = deque()
        self._num_taken = self._num_written = self._num_uploaded = 0
        self._sizes: dict[str, int] = {}
        self._uploaded_sizes: dict[str, int] = {}
        self._is_uploaded = folder.is_local
        self._disk = BackgroundWriter(
            warn=lambda _, reason: warn("log_delayed", f"{reason}; {self._waiting()} wait"),
            name="lines",
            place=self.path,
            caught_up=lambda: warn("log_caught_up", str(self.path)),
            retry_s=self._times.retry,
            close_s=self._times.disk_close,
        )
        self._store: BackgroundWriter | None = None
        if not folder.is_local:
            self._store = BackgroundWriter(
                warn=lambda _, reason: warn("upload_delayed", reason),
                name="uploads",
                caught_up=lambda: warn("upload_caught_up", folder.root),
                retry_s=self._times.upload_every,
                pause_s=self._times.upload_every,
                close_s=self._times.store_close,
            )

    def _waiting(self) -> str:
        """The lines that wait, for people."""
        with self._counting:
            texts = [text for _, text in self._lines]
        return f"{len(texts)} lines ({size(sum(map(len, texts)))})"

    def _take_up(self, name: str) -> None:
        """Continue a file that is there, without a line that a crash left unfinished."""
        path = self.path / name
        if not self._folder.is_local and self._folder.exists(name):
            path.write_bytes(self._folder.read_bytes(name))
        if path.suffix == ".jsonl" and path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def read(self, name: str) -> str:
        """Text of a file; empty if there is none."""
        path = self.path / name
        return path.read_text() if path.exists() else ""

    def append(self, name: str, line: Mapping[str, Scalar]) -> None:
        """Hand over a line; it is written as soon as the disk takes it, in this order."""
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        with self._counting:
            self._lines.append((name, text))
            self._num_taken += 1
        self._disk.put("lines", self._write_lines, unless_waiting=True)

    def settle(self) -> None:
        """Wait until all lines are on disk, but not for a disk that is known to be late."""
        self._disk.settle(
            self._times.patience, lambda _: self._warn("log_delayed", "the disk does not answer")
        )

    def num_lines(self) -> tuple[int, int]:
        """Lines that were handed over, and how many of them are in the run folder by now."""
        with self._counting:
            return self._num_taken, (
                self._num_written if self._folder.is_local else self._num_uploaded
            )

    def close(self) -> None:
        """Write and upload the rest, within a limited time.

        Raises:
            OSError: the disk or the store did not take all; the message names where the rest is.
        """
        if not self._disk.settle(self._times.disk_close):
            self._disk.close()  # it tries once more
        # The disk goes on while the store ends: what the store tells of itself are lines, too.
        fault = None if self._store is None else self._store.close(self._upload_last)
        self._disk.close()
        rescued = self._rescue()
        if not self._is_uploaded:
            rest = f", the last lines in {rescued}" if rescued else ""
            raise OSError(
                f"upload to {self._folder.root} failed ({fault}), the files are in "
                f"{self.path}{rest}"
            )
        if rescued:
            raise OSError(f"{self.path} did not take the last lines; they are in {rescued}")
        if self._store is not None:
            shutil.rmtree(self.path)

    def _rescue(self) -> str | None:
        """Write what the disk of the run did not take elsewhere; returns where."""
        with self._counting:
            rest = list(self._lines)
        if not rest:
            return None
        rescue = Path(tempfile.mkdtemp(prefix="treerpo_rest_"))
        for name, line in rest:
            with (rescue / name).open("ab") as file:
                file.write(line)
        return str(rescue)

    def _write_lines(self) -> None:
        try:
            while self._lines:
                self._write(*self._lines[0])
                with self._counting:
                    self._lines.popleft()
                    self._num_written += 1
        finally:
            if self._store is not None:
                self._store.put("lines", self._upload_grown, unless_waiting=True)

    def _write(self, name: str, line: bytes) -> None:
        with (self.path / name).open("ab") as file:
            if file.tell() > self._sizes.get(name, file.tell()):
                file.truncate(self._sizes[name])  # part of a line, which a full disk left
            self._sizes[name] = file.seek(0, os.SEEK_END)
            file.write(line)
        self._sizes[name] += len(line)

    def _upload_last(self) -> None:
        """Upload all, with the files of folders and what was told until now."""
        self._disk.settle(self._times.disk_close)
        self._upload(self.path.rglob("*"))
        self._is_uploaded = True

    def _upload_grown(self) -> None:
        self._upload(self.path.iterdir())

    def _upload(self, paths: Iterable[Path]) -> None:
        """Upload those files that have grown."""
        num_written = self._num_written
        for path in sorted(paths):
            if not path.is_file():
                continue
            name, content = path.relative_to(self.path).as_posix(), path.read_bytes()
            if len(content) != self._uploaded_sizes.get(name):
                self._folder.publish_file(name, content)
                self._uploaded_sizes[name] = len(content)
        with self._counting:
            self._num_uploaded = num_written
