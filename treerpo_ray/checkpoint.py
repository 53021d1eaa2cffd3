"""Checkpoints, and whatever else of a run is whole or not there.

A checkpoint is written beside its place, listed with a digest of each file, checked and renamed (on
an object store: uploaded, its list last, and compared). One that is torn or corrupt is passed over
for the one before.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger(__name__)

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


def publish_folder(folder: str, name: str, write: Callable[[Path], None]) -> str:
    """Have `write` fill a folder and put it at `folder/name` (path or URI); returns where it is.

    A model is whole where its `config.json` is, which comes last.

    Raises:
        OSError: the disk is full or the store refuses; what was there is untouched by a failing
            `write`.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    staging = _stage(fs, root, write)
    try:
        _sync_all(staging)
        files = sorted(_names(staging), key=lambda file: file == "config.json")
        _place(fs, staging, files, f"{root}/{name}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{folder}/{name}"


def withdraw_folder(folder: str, name: str) -> None:
    """Remove what `publish_folder` put there, if it did; first what tells that it is whole.

    Raises:
        OSError: the disk or the store refuses.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    for path in (f"{root}/{name}/config.json", f"{root}/{name}"):
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def publish_file(folder: str, name: str, content: bytes) -> None:
    """Put a file at `folder/name` (path or URI).

    Raises:
        OSError: the disk is full or the store refuses; what was there is untouched.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(f"{root}/{name}", content)  # there once it is whole
        return
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.writing")
    try:
        beside.write_bytes(content)
        _sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync(path.parent)


def publish_table(folder: str, name: str, table: pa.Table) -> None:
    """Put a Parquet file at `folder/name`, as `publish_file` does."""
    content = io.BytesIO()
    pq.write_table(table, content)
    publish_file(folder, name, content.getvalue())


def _stage(fs: AbstractFileSystem, root: str, write: Callable[[Path], None]) -> Path:
    """A folder that `write` filled: beside its place, or here for an object store."""
    beside: Path | None = None
    if isinstance(fs, LocalFileSystem):
        beside = Path(root)
        beside.mkdir(parents=True, exist_ok=True)
        for left in beside.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=beside))
    staging.chmod(0o755)
    try:
        write(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def _place(fs: AbstractFileSystem, staging: Path, files: list[str], target: str) -> None:
    """Put a written folder in its place: renamed, or its `files` uploaded in that order."""
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        _sync(Path(target).parent)
        return
    if fs.exists(target):
        fs.rm(target, recursive=True)
    for name in files:
        fs.put_file(str(staging / name), f"{target}/{name}")
        written, arrived = (staging / name).stat().st_size, fs.size(f"{target}/{name}")
        if arrived != written:
            raise OSError(f"{arrived} of the {written} bytes of {name} arrived at {target}")


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Have the disk hold a file or, as far as its file system can, the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
        if hasattr(os, "posix_fadvise"):  # who reads it next is to see what the disk holds
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


def _names(folder: Path) -> list[str]:
    """Files of a folder, those of its folders too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


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
