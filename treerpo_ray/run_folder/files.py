"""Run folder: the one place that knows where the files of a run lie and which file system they are
on.

What is published is whole or not there: it is written beside its place, synced and renamed, on an
object store uploaded with what tells of it last, and compared.
"""

import difflib
import glob
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from treerpo_ray.config.sections import RunConfig

Scalar = str | int | float | bool | None
"""Value of a field in a line."""
Write = Callable[[Path], object]
"""Fills the folder that it is given."""
CONFIG_FILE = "config.yaml"
"""The run's configuration, every key with its value."""
MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
"""In an exported model and, instead of the model, in checkpoints of a run that trains adapters."""
"""The exported model, in a run folder and in each checkpoint."""
WHOLE_MODEL = f"{MODEL_FOLDER}/config.json"
"""The model's file that comes last and goes first, so that its presence means it is whole."""

ROW_GROUP_BYTES = 2**20
"""Of a Parquet file, before compression: what is read for one row. A row that is larger has a
group of its own."""


class RunFolder:
    """A run folder, or any folder with files of runs.

    Args:
        place: Path or URI.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.fs, self.root = fsspec.core.url_to_fs(place)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.place

    def uri(self, name: str) -> str:
        """Where a file or folder of it is, with the protocol."""
        return self.fs.unstrip_protocol(self._path(name))

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder."""
        return self.fs.exists(self._path(name))

    def glob(self, pattern: str) -> list[str]:
        """Names, in order, of the files and folders that match; the store is asked anew."""
        self.fs.invalidate_cache()
        whole = f"{glob.escape(self.root)}/{pattern}"  # a run may be called `best[1]`
        paths = (path.rstrip("/") for path in self.fs.glob(whole))
        return sorted(path.removeprefix(f"{self.root}/") for path in paths)

    def names(self, name: str) -> list[str]:
        """What lies in a folder, which need not be there.

        Raises:
            OSError: the disk or the store does not say; `glob` takes that for nothing.
        """
        self.fs.invalidate_cache()
        try:
            paths = self.fs.ls(self._path(name), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def read_bytes(self, name: str) -> bytes:
        """Content of a file."""
        return self.fs.cat_file(self._path(name))

    def read_text(self, name: str) -> str:
        """Content of a text file."""
        return self.read_bytes(name).decode()

    def read_lines(self, name: str) -> list[dict[str, Scalar]]:
        """Objects in a JSONL file; none if there is no such file."""
        return parse_lines(self.read_text(name)) if self.exists(name) else []

    def read_table(self, name: str) -> pa.Table:
        """Content of a Parquet file."""
        with self.fs.open(self._path(name)) as file:
            # Not in threads of Arrow's own: a command that ends while one starts is aborted.
            return pq.ParquetFile(file).read(use_threads=False)

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file of which only the columns and row groups asked for are read."""
        with self.fs.open(self._path(name)) as file, pq.ParquetFile(file) as opened:
            yield opened

    def state(self, name: str) -> str:
        """A text that changes when the file does; empty if there is no such file."""
        try:
            return self.fs.ukey(self._path(name))
        except FileNotFoundError:
            return ""

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A file or folder on this machine: itself, or a copy for a while."""
        with tempfile.TemporaryDirectory(prefix="treerpo-copy-") as target:
            yield self.fetch(name, Path(target))

    def fetch(self, name: str, target: Path) -> Path:
        """Where a file or folder lies on this machine; copied into `target` from a store."""
        if self.is_local:
            return Path(self._path(name))
        copy = target / Path(name or self.root).name
        is_folder = self.fs.isdir(self._path(name))
        paths = (f"{self._path(name)}/", f"{copy}/") if is_folder else (self._path(name), str(copy))
        self.fs.get(*paths, recursive=is_folder)
        return copy

    def publish_file(self, name: str, content: bytes) -> None:
        """Put a file in its place.

        Raises:
            OSError: the disk is full or the store refuses; what was there is untouched.
        """
        if not self.is_local:
            path = self._path(name)
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, content)  # there once it is whole
            return
        place = Path(self._path(name))
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f"{place.name}.writing")
        try:
            beside.write_bytes(content)
            sync(beside)
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
        sync(place.parent)

    def publish_table(self, name: str, table: pa.Table) -> None:
        """Put a Parquet file in its place, as `publish_file` does; one row can be read of it
        without the others, as far as rows are large."""
        content = io.BytesIO()
        rows = max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))
        pq.write_table(table, content, row_group_size=rows)
        self.publish_file(name, content.getvalue())

    def publish_model(self, write: Write) -> str:
        """Have `write` fill a folder and make it the exported model; returns where that is.

        Raises:
            OSError: the disk is full or the store refuses; what was there is untouched by a
                failing `write`.
        """
        staging = self.stage("", write)
        try:
            sync_all(staging)
            last = Path(WHOLE_MODEL).name
            files = sorted(names_below(staging), key=lambda file: file == last)
            self.place_staged(staging, files, MODEL_FOLDER)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return f"{self.place}/{MODEL_FOLDER}"

    def withdraw_model(self) -> None:
        """Remove the exported model if there is one; first what tells that it is whole.

        Raises:
            OSError: the disk or the store refuses.
        """
        self.remove(WHOLE_MODEL)
        self.remove(MODEL_FOLDER)

    def remove(self, name: str) -> None:
        """Remove a file or folder, which need not be there."""
        with suppress(FileNotFoundError):
            self.fs.rm(self._path(name), recursive=True)

    def stage(self, parent: str, write: Write) -> Path:
        """A folder that `write` filled: beside its place in `parent`, or here for a store.

        Raises:
            OSError: the disk is full; nothing is left of it.
        """
        beside: Path | None = None
        if self.is_local:
            beside = Path(self._path(parent))
            beside.mkdir(parents=True, exist_ok=True)
            for left in beside.glob(".writing-*"):
                shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
        staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=beside))
        staging.chmod(0o755)
        try:
            write(staging)
            for path in staging.rglob("*"):
                if path.is_file():  # some that write weights leave them to their owner alone
                    path.chmod(0o644)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging

    def place_staged(self, staging: Path, files: list[str], name: str) -> None:
        """Put a staged folder in its place: renamed, or its `files` uploaded in that order.

        Raises:
            OSError: the disk or the store refuses, or does not hold what was written.
        """
        target = self._path(name)
        if self.is_local:
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
            sync(Path(target).parent)
            return
        if self.fs.exists(target):
            self.fs.rm(target, recursive=True)
        for file in files:
            self.fs.put_file(str(staging / file), f"{target}/{file}")
            written, arrived = (staging / file).stat().st_size, self.fs.size(f"{target}/{file}")
            if arrived != written:
                raise OSError(f"{arrived} of the {written} bytes of {file} arrived at {target}")

    def _path(self, name: str) -> str:
        """Of a file or folder, on its file system."""
        return f"{self.root}/{name}" if name else self.root


def named_folder(place: str, root: str | None = None) -> str:
    """The folder or URI that a user means: a name alone, if nothing here is called so, is that of
    a run in `root`, the folder of all runs unless another is given."""
    is_name = "/" not in place and not RunFolder(place).exists()
    return f"{root or RunConfig().root}/{place}" if is_name else place


def run_names(root: str) -> list[str]:
    """Names of the runs in a folder, in order."""
    found = RunFolder(root).glob(f"*/{CONFIG_FILE}")
    return [name.removesuffix(f"/{CONFIG_FILE}") for name in found]


def run_at(place: str) -> str:
    """The folder or URI of the run that is called so, or lies there.

    Raises:
        ValueError: there is none; with the names of those that there are.
    """
    folder, root = named_folder(place), RunConfig().root
    if RunFolder(folder).exists(CONFIG_FILE):
        return folder
    names = ", ".join(run_names(root))
    raise ValueError(
        f"{no_run(place)}; give a folder, a URI or the name of one of the runs in {root}: "
        f"{names or 'there are none'}{did_you_mean(place)}"
    )


def no_run(place: str) -> str:
    """What is said of a place without a run."""
    return f"{place} is no run: it has no {CONFIG_FILE}"


def did_you_mean(place: str, root: str | None = None) -> str:
    """What to add to a message about a place where no run is: the name that is most like it.

    Args:
        place: As of `named_folder`.
        root: The folder of all runs, unless that of the defaults.
    """
    names = run_names(root or RunConfig().root)
    near = difflib.get_close_matches(place.rstrip("/").rpartition("/")[2], names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse_lines(text: str) -> list[dict[str, Scalar]]:
    """The objects of a JSONL text; a last line without its end is still being written."""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def names_below(folder: Path) -> list[str]:
    """Files of a folder on this machine, those of its folders too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def sync_all(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
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
