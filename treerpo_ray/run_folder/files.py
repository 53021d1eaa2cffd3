"""Checkpoints, and whatever else of a run is whole or not there.

A checkpoint is written beside its place, listed with a digest of each file, checked and renamed (on
an object store: uploaded, its list last, and compared). One that is torn or corrupt is passed over
for the one before.
"""

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger(__name__)


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
