"""Run log: the rows and events of a run, in its folder and on Weights & Biases.

`metrics.jsonl` has one row for each learner step and evaluation, `events.jsonl` what happened
in between. Both only ever grow, by whole lines. A row's `step` counts the finished updates, so
0 is the untrained model. After a resume the rows of the steps that are done once more come
again; `rows.latest_rows` leaves out those that they replace.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from treerpo_ray.metrics.diagnosis import Diagnosis, Limits
from treerpo_ray.metrics.events import EVENTS_FILE, NOTICES, Event
from treerpo_ray.metrics.rows import METRICS_FILE, Row, latest, parse_rows
from treerpo_ray.metrics.stage_metrics import FINISHED, StageMetrics
from treerpo_ray.metrics.stage_status import StageStatus, WatchedStage
from treerpo_ray.metrics.wandb.run import ID_FILE, SENT_FILE, WandbRun, WandbSettings
from treerpo_ray.run_folder.files import RunFolder, Scalar, parse_lines
from treerpo_ray.run_folder.lines import AppendLog, LogTimes
from treerpo_ray.run_folder.writer import Warn

if TYPE_CHECKING:
    from treerpo_ray.config import Config


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLogSetup:
    """What is written down, and where."""

    name: str
    """Of the run."""
    folder: str
    """Of the run."""
    trees_per_step: int
    limits: Limits
    wandb: WandbSettings | None
    """None: there is no copy on W&B."""

    @classmethod
    def of(cls, config: "Config", *, commit: str) -> Self:
        """Of a run, by sources of that version."""
        return cls(
            name=config.run.name,
            folder=config.folder,
            trees_per_step=config.gate.trees_per_step,
            limits=Limits.of(config),
            wandb=WandbSettings.of(config, commit=commit),
        )


class MakeWandb(Protocol):
    """As `WandbRun` itself, whose arguments these are."""

    def __call__(
        self, *, settings: WandbSettings, folder: Path, rows: Sequence[Row], warn: Warn
    ) -> WandbRun: ...


class RunLog(WatchedStage):
    """Writes the metrics and events of a run.

    A row is on disk before anything else sees it, unless the disk is late: then it waits in memory
    and the run goes on. W&B can neither stop nor delay the run. For an object store the files lie
    in a local folder that is uploaded every few seconds and on `close`. A run folder has one
    writer at a time (`lock`).

    Args:
        setup: What is written, and where.
        times: How long disk and store are waited for.
        make_wandb: Makes the copy on W&B, if there is to be one.
        stage_metrics: Told of all for Ray's metrics endpoint; those of the Ray that this process
            is connected to if not given.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        *,
        setup: RunLogSetup,
        times: LogTimes | None = None,
        make_wandb: MakeWandb = WandbRun,
        stage_metrics: StageMetrics | None = None,
    ) -> None:
        self._stage_metrics = stage_metrics or StageMetrics(run=setup.name)
        self._notices: list[Event] = []
        self._moved_at = time.monotonic()
        self._log = AppendLog(
            folder=RunFolder(setup.folder),
            names=(METRICS_FILE, EVENTS_FILE, ID_FILE, SENT_FILE),
            warn=self._warn,
            times=times,
        )
        self._rows = parse_rows(parse_lines(self._log.read(METRICS_FILE)))
        self._diagnosis = Diagnosis(setup.limits, past=latest(self._rows))
        self._trees_per_step = setup.trees_per_step
        self._finished: set[int] = set()
        """Tickets of the trees that are finished and not consumed yet, in this session."""
        self._wandb: WandbRun | None = None
        if setup.wandb is not None:
            self._wandb = make_wandb(
                settings=setup.wandb, folder=self._log.path, rows=list(self._rows), warn=self._warn
            )

    def __repr__(self) -> str:
        return "run log"

    def step(self, row: Row) -> None:
        """Append a row; it needs `step`, and gets the Unix `time` unless it has one."""
        row = {"step": row["step"], "time": time.time()} | row
        self._log.append(METRICS_FILE, {name: _finite(value) for name, value in row.items()})
        self._log.settle()
        self._rows.append(row)
        self._moved_at = time.monotonic()
        consumed = row["step"] * self._trees_per_step
        self._finished = {ticket for ticket in self._finished if ticket >= consumed}
        self._stage_metrics.row(row)
        self._stage_metrics.value(FINISHED, len(self._finished))
        for finding in self._diagnosis.look(row):
            self.event(Event(kind=finding.kind, fields=finding.fields()))
        if self._wandb is not None:
            self._wandb.put(row)

    def event(self, event: Event) -> None:
        """Append an event."""
        self._append(event)
        self._log.settle()
        if event.kind == "tree_finished":
            ticket = event.fields["ticket"]
            assert isinstance(ticket, int)  # that of a `Ticket`
            self._finished.add(ticket)
            self._stage_metrics.value(FINISHED, len(self._finished))
        if event.kind in NOTICES:
            self._notices.append(event)

    def _append(self, event: Event) -> None:
        scalars = {name: _finite(value) for name, value in event.fields.items()}
        self._log.append(EVENTS_FILE, {"time": event.time, "kind": event.kind, **scalars})
        self._stage_metrics.event(event.kind, event.fields)

    def _warn(self, kind: str, reason: str) -> None:
        """Tell of a sink that is late or gone; called by the threads that serve them too."""
        log.warning("%s: %s", kind, reason)
        event = Event(kind=kind, fields={"reason": reason})
        self._notices.append(event)
        self._append(event)

    def status(self) -> StageStatus:
        """Whether rows and events get where they should, and when the last row came."""
        return StageStatus(
            stage="metrics",
            doing=f"{len(self._rows)} rows; last notices: {[n.kind for n in self._notices[-3:]]}",
            is_busy=False,
            age_s=time.monotonic() - self._moved_at,
        )

    def rows_since(self, num_rows: int) -> list[Row]:
        """All rows of `metrics.jsonl`, those of earlier sessions too, but the first `num_rows`."""
        return self._rows[num_rows:]

    def notices_since(self, num_notices: int) -> list[Event]:
        """What there was to notice in this session but the first `num_notices` events."""
        return self._notices[num_notices:]

    def growth(self) -> tuple[int, int]:
        """The learner step that comes next, from 1, and how many of its trees are finished."""
        done = int(self._rows[-1]["step"]) if self._rows else 0
        size = self._trees_per_step
        own = range(done * size, (done + 1) * size)
        return done + 1, len(self._finished.intersection(own))

    def num_lines(self) -> tuple[int, int]:
        """Rows and events so far, and how many of them are in the run folder."""
        return self._log.num_lines()

    def close(self) -> None:
        """Finish W&B and uploads; nothing may be appended afterwards.

        Raises:
            OSError: the disk or an object store did not take all; the message says where it is.
        """
        if self._wandb is not None:
            self._wandb.close()
        self._log.close()


def _finite(value: Scalar) -> Scalar:
    """JSON has neither NaN nor infinity: both become null."""
    if isinstance(value, str | int | None):
        return value
    return float(value) if math.isfinite(value) else None
