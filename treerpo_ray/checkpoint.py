"""Checkpoints, and whatever else of a run is whole or not there.

A checkpoint is written beside its place, listed with a digest of each file, and renamed (on an
object store: uploaded, its list last). One that is torn or corrupt is passed over for the one
before.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        """Learner steps of which there is a complete-looking checkpoint, ascending."""
        found = self._fs.glob(f"{self._root}/step=*/{LIST_FILE}")
        names = [path.split("/")[-2].removeprefix("step=") for path in found]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Have `write` fill a folder and make it the checkpoint of `step`.

        Raises:
            OSError: the disk is full or the store refuses; older checkpoints are untouched.
        """
        with _staging(self._fs, self._root) as staging:
            write(staging)
            files = {str(p.relative_to(staging)): _digest(p) for p in _files(staging)}
            (staging / LIST_FILE).write_text(json.dumps(files, indent=1))
            _place(self._fs, staging, [*files, LIST_FILE], f"{self._root}/step={step:06d}")
        steps = self.steps()
        # A later one was passed over when this session began: it must not push out what is whole.
        later = [old for old in steps if old > step]
        for old in [*later, *[old for old in steps if old <= step][: -self.keep]]:
            self._fs.rm(f"{self._root}/step={old:06d}", recursive=True)

    @contextmanager
    def newest(self) -> Iterator[tuple[int, Path] | None]:
        """Step and local folder of the newest checkpoint that is whole; None if there is none."""
        with tempfile.TemporaryDirectory(prefix="treerpo-checkpoint-") as local:
            for step in reversed(self.steps()):
                folder = self._local_copy(step, Path(local) / str(step))
                if (fault := _fault(folder)) is None:
                    yield step, folder
                    return
                self.passed_over[step] = fault
                log.warning("checkpoint of step %d is passed over: %s", step, fault)
            yield None

    def _local_copy(self, step: int, target: Path) -> Path:
        source = f"{self._root}/step={step:06d}"
        if isinstance(self._fs, LocalFileSystem):
            return Path(source)
        self._fs.get(f"{source}/", f"{target}/", recursive=True)
        return target


def publish_folder(folder: str, name: str, write: Callable[[Path], None]) -> str:
    """Have `write` fill a folder and put it at `folder/name` (path or URI); returns where it is.

    Raises:
        OSError: the disk is full or the store refuses; what was there is untouched by a failing
            `write`.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    with _staging(fs, root) as staging:
        write(staging)
        files = [str(path.relative_to(staging)) for path in _files(staging)]
        _place(fs, staging, files, f"{root}/{name}")
    return f"{folder}/{name}"


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


@contextmanager
def _staging(fs: AbstractFileSystem, root: str) -> Iterator[Path]:
    """A folder to write in: beside its place, or here for an object store; gone afterwards."""
    fs.makedirs(root, exist_ok=True)
    is_local = isinstance(fs, LocalFileSystem)
    for left in Path(root).glob(".writing-*") if is_local else ():
        shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=root if is_local else None))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _place(fs: AbstractFileSystem, staging: Path, files: list[str], target: str) -> None:
    """Put a written folder in its place: renamed, or its `files` uploaded in that order."""
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        return
    for name in files:
        fs.put_file(str(staging / name), f"{target}/{name}")


def _sync(path: Path) -> None:
    """Have the disk hold a file or, as far as its file system can, the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is corrupt"
    return None
