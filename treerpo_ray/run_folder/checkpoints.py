"""Checkpoints, and whatever else of a run is whole or not there.

A checkpoint is written beside its place, listed with a digest of each file, checked and renamed (on
an object store: uploaded, its list last, and compared). One that is torn or corrupt is passed over
for the one before.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from treerpo_ray.run_folder.files import _names, _place, _stage, _sync, _sync_all

log = logging.getLogger(__name__)

Warn = Callable[[str, str], object]
"""Told what cannot be written, and the reason."""


LIST_FILE = "files.json"
"""Digest of every file of a checkpoint; there last, so that its presence means it is whole."""


class Checkpoints:
    """The checkpoints of the run folder `folder` (path or URI), the newest `keep` of them."""

    def __init__(self, folder: str, keep: int) -> None:
        self._fs, root = fsspec.core.url_to_fs(folder)
        self._root, self.keep = f"{root}/checkpoints", keep
        self.passed_over: dict[int, str] = {}
        """What is wrong with each checkpoint that `newest` passed over, by its step."""

    def steps(self) -> list[int]:
        """Learner steps of which there is a complete-looking checkpoint, ascending.

        Raises:
            OSError: the disk or the store does not say what there is.
        """
        self._fs.invalidate_cache()
        found = []
        for folder in self._names_in(self._root):
            name = folder.rstrip("/").rpartition("/step=")[2]
            files = self._names_in(folder) if name.isdecimal() else []
            found += [int(name) for path in files if path.endswith(f"/{LIST_FILE}")]
        return sorted(found)

    def _names_in(self, folder: str) -> list[str]:
        try:  # not `glob`, which takes what cannot be listed for empty
            return self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []

    def stage(self, write: Callable[[Path], None]) -> Path:
        """Have `write` fill a folder on this machine, which `place` is to have.

        Raises:
            OSError: the disk is full.
        """
        return _stage(self._fs, self._root, write)

    def place(self, step: int, staging: Path) -> None:
        """Make a staged folder the checkpoint of `step`.

        Raises:
            OSError: the disk or the store refuses, or does not hold what was written; older
                checkpoints are untouched.
        """
        try:
            files = {name: _digest(staging / name) for name in _names(staging)}
            (staging / LIST_FILE).write_text(json.dumps(files, indent=1))
            _sync_all(staging)
            if fault := _fault(staging):
                raise OSError(f"{staging}: {fault}")
            if isinstance(self._fs, LocalFileSystem):
                for path in Path(self._root).parent.glob("*.jsonl"):
                    _sync(path)  # what tells of the steps before is not to be lost where this stays
            _place(self._fs, staging, [*files, LIST_FILE], f"{self._root}/step={step:06d}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        try:
            self._remove_old(step)
        except OSError as error:  # it is in its place all the same
            log.warning("older checkpoints of %s stay: %s", self._root, error)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Stage what `write` writes and place it, both at once."""
        self.place(step, self.stage(write))

    def _remove_old(self, step: int) -> None:
        steps = self.steps()
        # A later one was passed over when this session began: it must not push out what is whole.
        later = [old for old in steps if old > step]
        for old in [*later, *[old for old in steps if old <= step][: -self.keep]]:
            self._fs.rm(f"{self._root}/step={old:06d}", recursive=True)

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
                folder = self._local_copy(step, Path(local) / str(step))
                if (fault := _fault(folder)) is None:
                    yield step, folder
                    return
                self.passed_over[step] = fault
                log.warning("checkpoint of step %d is passed over: %s", step, fault)
            if steps:
                told = "; ".join(f"step {step}: {self.passed_over[step]}" for step in steps)
                raise RuntimeError(
                    f"all {len(steps)} checkpoints in {self._root} are unreadable: {told}; "
                    "remove them to start anew"
                )
            yield None

    def _local_copy(self, step: int, target: Path) -> Path:
        source = f"{self._root}/step={step:06d}"
        if isinstance(self._fs, LocalFileSystem):
            return Path(source)
        self._fs.get(f"{source}/", f"{target}/", recursive=True)
        return target


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


SLOW_S = 60.0
"""Time after which a disk that is still at a checkpoint, while training waits, is told."""


PLACE_S = 60.0
"""Time that the next checkpoint waits for one that is not in its place yet."""


SETTLE_S = 15.0
"""Time that what comes before a checkpoint gets to be in the run folder."""


POLL_S = 0.2
"""Time between looks for it."""


class Saver:
    """Saves checkpoints while training goes on: they are placed in a thread.

    One that fails is told, and due again at once; so is one that is left out, for the one before
    it is still on its way.

    Args:
        checkpoints: Where they go.
        every: Learner steps between two.
        step: Learner step that training begins at; it needs none.
        warn: Told what is not as it should be, and the reason.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, step: int, warn: Warn) -> None:
        self._checkpoints, self._every, self._warn = checkpoints, every, warn
        self._saved = step
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._is_late = False

    def is_due(self, step: int) -> bool:
        """Whether it is time for the checkpoint of `step`."""
        return step - self._saved >= self._every

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        is_settled: Callable[[], bool],
        placed: Callable[[], object],
        *,
        is_last: bool,
    ) -> None:
        """Save the checkpoint of `step`; returns once it is written here, if it is not the last.

        Args:
            step: Learner steps done.
            write: Fills its folder.
            is_settled: Whether the run folder holds what comes before the checkpoint; that is
                awaited for a limited time, in the thread.
            placed: Told, in the thread, that the checkpoint is in its place.
            is_last: Whether none comes after it, so that it is waited for.

        Raises:
            Exception: the last one failed; whatever the disk or the store raised.
        """
        name = f"checkpoint of step {step}"
        if not self._is_free(name, None if is_last else PLACE_S):
            return
        before, self._saved, self._error = self._saved, step, None
        is_written = threading.Event()

        def work() -> None:
            try:
                staging = self._checkpoints.stage(write)
                is_written.set()
                self._settle(name, is_settled)
                self._checkpoints.place(step, staging)
                placed()
            except Exception as error:  # any store's own
                self._saved, self._error = before, error
                self._warn(name, f"{type(error).__name__}: {error}")
            finally:
                is_written.set()

        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()
        if not is_written.wait(SLOW_S):
            self._warn(name, f"the disk has not taken it within {SLOW_S:g} s")
            is_written.wait()
        if is_last:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def _is_free(self, name: str, limit_s: float | None) -> bool:
        """Whether the last checkpoint is in its place, or has failed; awaited once for each."""
        if self._thread is not None:
            self._thread.join(0.0 if self._is_late and limit_s is not None else limit_s)
            if self._thread.is_alive():
                if not self._is_late:
                    why = f"{self._thread.name} is not in its place within {limit_s:g} s"
                    self._warn(name, f"left out: {why}")
                self._is_late = True
                return False
        self._is_late = False
        return True

    def _settle(self, name: str, is_settled: Callable[[], bool]) -> None:
        end = time.monotonic() + SETTLE_S
        while not is_settled():
            if time.monotonic() > end:
                why = f"not in the run folder within {SETTLE_S:g} s"
                self._warn(f"what comes before the {name}", why)
                return
            time.sleep(POLL_S)


MODEL_FOLDER = "model"
