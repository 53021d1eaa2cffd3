"""Metrics: the rows and events of a run, in its folder and on Weights & Biases.

`metrics.jsonl` has one row for each learner step and evaluation, `events.jsonl` what happened
in between. Both only ever grow, by whole lines. A row's `step` counts the finished updates, so
0 is the untrained model. After a resume the rows of the steps that are done once more come
again; `latest_rows` leaves out those that they replace.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
from fsspec.implementations.local import LocalFileSystem

from treerpo_ray.wandb_run import ID_FILE, WandbRun

if TYPE_CHECKING:
    from treerpo_ray.config import Config

log = logging.getLogger(__name__)

Row = dict[str, float]
"""Metrics of one step by their name `area/name`, and the `step`."""
Scalar = str | int | float | bool | None

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
NOTICES = {"engine_lost", "tree_moved", "waiting", "learner_started"}
"""Events that whoever follows the run should see."""
UPLOAD_EVERY_S = 5.0
"""Time between uploads of a grown file to an object store, which cannot append."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at a time, such as `Event(kind="engine_lost", fields={"engine": 1})`.

    Raises:
        ValueError: a field is called `kind` or `time`, as the event's own are.
    """

    kind: str
    fields: Mapping[str, Scalar] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    """Unix time in seconds."""

    def __post_init__(self) -> None:
        if taken := {"kind", "time"} & self.fields.keys():
            raise ValueError(f"event {self.kind}: the field name {min(taken)} is taken")


class RunLog:
    """Writes the metrics and events of the run that `config` describes.

    A row is on disk before anything else sees it: W&B is served by a thread of its own, so that
    it can neither stop nor delay the run. On an object store the files lie in a local spool that
    is uploaded every few seconds and on `close`. A folder has one writer at a time.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """

    def __init__(self, config: "Config") -> None:
        self._spool = _Spool(config.folder)
        self._rows = _parse_rows(self._spool.read(METRICS_FILE))
        self._notices: list[Event] = []
        self._wandb: WandbRun | None = None
        if config.metrics.wandb_project is not None:
            last_step = max((row["step"] for row in self._rows), default=-1)
            self._wandb = WandbRun(config, self._spool.path, last_step)

    def step(self, row: Row) -> None:
        """Append a row; it needs `step`, and gets the Unix `time` unless it has one."""
        row = {"step": row["step"], "time": time.time()} | row
        self._spool.append(METRICS_FILE, {name: _finite(value) for name, value in row.items()})
        self._rows.append(row)
        if self._wandb is not None:
            self._wandb.put(row)

    def event(self, event: Event) -> None:
        """Append an event."""
        scalars = {name: _finite(value) for name, value in event.fields.items()}
        self._spool.append(EVENTS_FILE, {"time": event.time, "kind": event.kind, **scalars})
        if event.kind in NOTICES:
            self._notices.append(event)

    def rows_since(self, num_rows: int) -> list[Row]:
        """All rows of `metrics.jsonl`, those of earlier sessions too, but the first `num_rows`."""
        return self._rows[num_rows:]

    def notices_since(self, num_notices: int) -> list[Event]:
        """The events of this session in NOTICES but the first `num_notices`."""
        return self._notices[num_notices:]

    def close(self) -> None:
        """Finish W&B and uploads; nothing may be appended afterwards.

        Raises:
            OSError: an object store did not take the files; the message names the spool.
        """
        if self._wandb is not None:
            self._wandb.close()
        self._spool.close()


def read_lines(folder: str, name: str) -> list[dict[str, Scalar]]:
    """Objects in a JSONL file of a run folder (path or URI); none if there is no such file."""
    fs, root = fsspec.core.url_to_fs(folder)
    path = f"{root}/{name}"
    return _parse(fs.cat_file(path).decode()) if fs.exists(path) else []


def latest_rows(folder: str) -> list[Row]:
    """The rows of a run folder by increasing step, one a step, as the last resume left them.

    Rows of one step are merged. A row of an earlier step than the one before it tells of a
    resume: what came after that step belongs to a timeline that was rolled back.
    """
    rows: list[Row] = []
    for row in _parse_rows(read_lines(folder, METRICS_FILE)):
        if rows and row["step"] < rows[-1]["step"]:
            rows = [kept for kept in rows if kept["step"] <= row["step"]]
        if rows and row["step"] == rows[-1]["step"]:
            rows[-1] = rows[-1] | row
        else:
            rows.append(row)
    return rows


class _Spool:
    """Files that grow by lines: in the run folder itself or, for an object store, beside it."""

    def __init__(self, folder: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(folder)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self.path = Path(self._root if self._is_local else tempfile.mkdtemp(prefix="treerpo_"))
        self.path.mkdir(parents=True, exist_ok=True)
        self._sizes: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._upload_loop, name="metrics-upload", daemon=True
        )
        for name in (METRICS_FILE, EVENTS_FILE, ID_FILE):
            self._take_up(name)
        if not self._is_local:
            self._thread.start()

    def _take_up(self, name: str) -> None:
        """Continue a file that is there, without a line that a crash left unfinished."""
        path, remote = self.path / name, f"{self._root}/{name}"
        if not self._is_local and self._fs.exists(remote):
            path.write_bytes(self._fs.cat_file(remote))
        if path.suffix == ".jsonl" and path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def read(self, name: str) -> list[dict[str, Scalar]]:
        path = self.path / name
        return _parse(path.read_text()) if path.exists() else []

    def append(self, name: str, line: Mapping[str, Scalar]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        if self._is_local:
            return
        self._stop.set()
        self._thread.join()
        try:
            self._upload([path for path in self.path.rglob("*") if path.is_file()])
        except Exception as error:
            raise OSError(f"upload to {self._root} failed, the files are in {self.path}") from error
        shutil.rmtree(self.path)

    def _upload_loop(self) -> None:
        has_warned = False
        while not self._stop.wait(UPLOAD_EVERY_S):
            try:
                self._upload([path for path in self.path.iterdir() if path.is_file()])
            except Exception as error:  # any store's own error: tried again, and raised by close
                if not has_warned:
                    log.warning("upload to %s failed, going on: %s", self._root, error)
                has_warned = True

    def _upload(self, paths: list[Path]) -> None:
        for path in paths:
            name, content = path.relative_to(self.path).as_posix(), path.read_bytes()
            if len(content) != self._sizes.get(name):
                self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(f"{self._root}/{name}", content)
                self._sizes[name] = len(content)


def _parse(text: str) -> list[dict[str, Scalar]]:
    """The objects of a JSONL text; a last line without its end is still being written."""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _parse_rows(lines: list[dict[str, Scalar]]) -> list[Row]:
    return [
        {name: math.nan if value is None else float(value) for name, value in line.items()}
        for line in lines
    ]


def _finite(value: Scalar) -> Scalar:
    """JSON has neither NaN nor infinity: both become null."""
    if isinstance(value, str | int | None):
        return value
    return float(value) if math.isfinite(value) else None
