"""Checkpoints, each whole or passed over for the one before.

One is written beside its place, listed with a digest of each file, checked and renamed (on an
object store: uploaded, its list last, and compared).
"""

import hashlib
import json
import logging
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from treerpo_ray.errors import one_line
from treerpo_ray.run_folder.files import RunFolder, Write, names_below, sync, sync_all
from treerpo_ray.run_folder.patience import DiskRefused, Patience
from treerpo_ray.run_folder.writer import BackgroundWriter, OnFailure, Warn

log = logging.getLogger(__name__)

T = TypeVar("T")
BYTES_A_PARAMETER = 12
"""Of each parameter in a checkpoint: its weight and both of its moments, in float32."""
FOLDER = "checkpoints"
LIST_FILE = "files.json"
"""Digest of every file of a checkpoint; there last, so that its presence means it is whole."""


class Checkpoints:
    """The checkpoints of a run folder, the newest `keep` of them."""

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder, self.keep = folder, keep
        self.passed_over: dict[int, str] = {}
        """What is wrong with each checkpoint that `newest` passed over, by its step."""

    def steps(self) -> list[int]:
        """Learner steps of which there is a complete-looking checkpoint, ascending.

        Raises:
            OSError: the disk or the store does not say what there is.
        """
        found = []
        for name in self._folder.names(FOLDER):
            number = name.removeprefix("step=")
            if number.isdecimal() and LIST_FILE in self._folder.names(f"{FOLDER}/{name}"):
                found.append(int(number))
        return sorted(found)

    def stage(self, write: Write) -> Path:
        """Have `write` fill a folder on this machine, which `place` is to have.

        Raises:
            OSError: the disk is full.
        """
        return self._folder.stage(FOLDER, write)

    def place(self, step: int, staging: Path) -> None:
        """Make a staged folder the checkpoint of `step`.

        Raises:
            OSError: the disk or the store refuses, or does not hold what was written; older
                checkpoints are untouched.
        """
        try:
            files = _list_files(staging)
            if self._folder.is_local:
                for path in Path(self._folder.root).glob("*.jsonl"):
                    sync(path)  # what tells of the steps before is not to be lost where this stays
            self._folder.place_staged(staging, [*files, LIST_FILE], name_of(step))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        try:
            self._remove_old(step)
        except OSError as error:  # it is in its place all the same
            log.warning("older checkpoints of %s stay: %s", self._folder, error)

    def save(self, step: int, write: Write) -> None:
        """Stage what `write` writes and place it, both at once."""
        self.place(step, self.stage(write))

    def rescue(self, step: int, write: Write) -> str:
        """Write the checkpoint of `step` to this machine's folder of temporary files, where its
        place takes nothing; returns what to do with it, or why there is none.
        """
        folder = Path(tempfile.mkdtemp(prefix="treerpo-rescued-"))
        try:
            write(folder)
            _list_files(folder)
        except Exception as error:  # whatever this disk says
            shutil.rmtree(folder, ignore_errors=True)
            return f"nor is there room for it in {folder.parent} ({one_line(error)})"
        place = f"{self._folder}/{name_of(step)}"
        return f"it is in {folder} on {socket.gethostname()}: move it to {place} to go on from it"

    def _remove_old(self, step: int) -> None:
        steps = self.steps()
        # A later one was passed over when this session began: it must not push out what is whole.
        later = [old for old in steps if old > step]
        for old in [*later, *[old for old in steps if old <= step][: -self.keep]]:
            self._folder.remove(name_of(old))

    @contextmanager
    def newest(self) -> Iterator[tuple[int, Path] | None]:
        """Step and local folder of the newest checkpoint that is whole; None if there is none.

        Raises:
            RuntimeError: there are some, but none is whole. To start anew would remove the trees
                of all their steps, which is the user's to decide.
        """
        with tempfile.TemporaryDirectory(prefix="treerpo-checkpoint-") as local:
            steps = self.steps()
            for step in reversed(steps):
                folder = self._folder.fetch(name_of(step), Path(local))
                if (fault := _fault(folder)) is None:
                    yield step, folder
                    return
                self.passed_over[step] = fault
                log.warning("checkpoint of step %d is passed over: %s", step, fault)
            if steps:
                told = "; ".join(f"step {step}: {self.passed_over[step]}" for step in steps)
                raise RuntimeError(
                    f"all {len(steps)} checkpoints in {self._folder}/{FOLDER} are unreadable: "
                    f"{told}; remove them to start anew"
                )
            yield None


def name_of(step: int) -> str:
    """Folder of the checkpoint of a learner step, in the run folder."""
    return f"{FOLDER}/step={step:06d}"


def _list_files(folder: Path) -> dict[str, str]:
    """List the files of a new checkpoint, and check that the disk holds them; returns the list.

    Raises:
        OSError: it does not.
    """
    files = {name: _digest(folder / name) for name in names_below(folder) if name != LIST_FILE}
    (folder / LIST_FILE).write_text(json.dumps(files, indent=1))
    sync_all(folder)
    if fault := _fault(folder):
        raise OSError(f"{folder}: {fault}")
    return files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / LIST_FILE).read_text())
    except (OSError, ValueError) as error:
        return f"{LIST_FILE} cannot be read ({error})"
    if not isinstance(files, dict) or not files:
        return f"{LIST_FILE} is no list of files"
    for name, digest in files.items():
        try:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _digest(folder / name) != digest:
                return f"{name} is corrupt"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTimes:
    """Seconds that training or its checkpoints wait."""

    slow: float = 60.0
    """After which a disk that is still at a checkpoint, while training waits, is told."""
    place: float = 60.0
    """That the next checkpoint waits for one that is not in its place yet."""
    settle: float = 15.0
    """That what comes before a checkpoint gets to be in the run folder."""
    poll: float = 0.2
    """Between looks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContents:
    """What goes into a checkpoint, and what it waits for."""

    write: Write
    """Fills its folder; is called again where the disk does not take it all."""
    before_place: Callable[[Path], object]
    """Fills the folder with the rest and returns when it may be put in its place, awaited in the
    background for however long it takes; the checkpoint is left out if it raises."""
    is_settled: Callable[[], bool]
    """Whether the run folder holds what comes before the checkpoint; that is awaited for a limited
    time, in the background."""
    placed: Callable[[], object]
    """Told, in the background, that the checkpoint is in its place."""
    num_bytes: int
    """Its size, about."""


class CheckpointSaver:
    """Saves checkpoints while training goes on: they are placed in the background.

    While the disk does not take one, training waits: else there would be ever more steps to do
    again. One that cannot be placed is told, and due again at once; so is one that is left out, for
    the one before it is still on its way. The last one is waited for whatever it fails of.

    Args:
        checkpoints: Where they go.
        every: Learner steps between two.
        step: Learner step that training begins at; it needs none.
        warn: Told what is not as it should be, and the reason.
        patience: Waits for the disk.
        times: How long each part is waited for.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        every: int,
        step: int,
        warn: Warn,
        patience: Patience,
        times: SaveTimes | None = None,
    ) -> None:
        self._checkpoints, self._every, self._warn = checkpoints, every, warn
        self._patience = patience
        self._times = times or SaveTimes()
        self._saved = self._before = step
        """The newest one, and the one before, which is the newest again where this one fails."""
        self._error: Exception | None = None
        self._writer = BackgroundWriter(warn=warn, name="checkpoints", on_failure=OnFailure.DROP)

    def is_due(self, step: int) -> bool:
        """Whether it is time for the checkpoint of `step`."""
        return step - self._saved >= self._every

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` is in its place, where training began with it or once
        one that is on its way is there."""
        self.settle()
        return self._saved == step

    def save(self, step: int, contents: CheckpointContents, *, is_last: bool) -> None:
        """Save the checkpoint of `step`; returns once it is written here, if it is not the last.

        Args:
            step: Learner steps done.
            contents: What goes into it, and what it waits for.
            is_last: Whether none comes after it, so that it is waited for.

        Raises:
            DiskRefused: the disk did not take it; the message says where it is instead.
            Exception: the last one failed for another reason.
        """
        name, limit_s = f"checkpoint of step {step}", None if is_last else self._times.place

        def left_out(before: str) -> None:
            self._warn(name, f"left out: {before} is not in its place within {limit_s:g} s")

        if not self._writer.settle(limit_s, left_out):
            return
        self._before, self._saved, self._error = self._saved, step, None
        is_written = threading.Event()
        self._writer.put(name, lambda: self._work(contents, is_last, is_written))
        if not is_written.wait(self._times.slow):
            self._warn(name, f"the disk has not taken it within {self._times.slow:g} s")
            is_written.wait()
        if is_last:
            self._writer.settle()
        if self._error is not None and (is_last or isinstance(self._error, DiskRefused)):
            raise self._error

    def _work(
        self, contents: CheckpointContents, is_last: bool, is_written: threading.Event
    ) -> None:
        """Write and place the checkpoint that is due; sets `is_written` in any case."""

        def stage() -> Path:
            return self._checkpoints.stage(contents.write)

        try:
            if is_last:
                self._until_written(contents, lambda: self._place(contents, stage()))
            else:
                staging = self._until_written(contents, stage)
                is_written.set()
                self._place(contents, staging)
            contents.placed()
        except Exception as error:  # any store's own
            self._saved, self._error = self._before, error
            if not isinstance(error, DiskRefused):  # the caller raises it
                raise
        finally:
            is_written.set()

    def _place(self, contents: CheckpointContents, staging: Path) -> None:
        try:
            contents.before_place(staging)
            self._await_settled(contents)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._checkpoints.place(self._saved, staging)

    def _until_written(self, contents: CheckpointContents, attempt: Callable[[], T]) -> T:
        def fill(folder: Path) -> None:
            contents.write(folder)
            contents.before_place(folder)

        name = f"checkpoint of step {self._saved}"
        try:
            return self._patience.until_written(name, attempt, contents.num_bytes)
        except DiskRefused as refused:
            told = f"{refused}; {self._checkpoints.rescue(self._saved, fill)}"
            raise DiskRefused(told) from None

    def settle(self) -> None:
        """Wait until no checkpoint is on its way any more."""
        self._writer.settle()

    def _await_settled(self, contents: CheckpointContents) -> None:
        end = time.monotonic() + self._times.settle
        while not contents.is_settled():
            if time.monotonic() > end:
                why = f"not in the run folder within {self._times.settle:g} s"
                self._warn(f"what comes before the checkpoint of step {self._saved}", why)
                return
            time.sleep(self._times.poll)
