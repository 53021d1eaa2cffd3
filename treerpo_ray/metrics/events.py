"""Events: what happened in a run between its rows, and how the run log is told of it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from treerpo_ray.actor import actor_method
from treerpo_ray.metrics.rows import Row
from treerpo_ray.metrics.stage_status import StageApi
from treerpo_ray.run_folder.files import Scalar

EVENTS_FILE = "events.jsonl"
FATAL = "fatal"
"""Kind of an event that ends the run, with its `reason`."""
UNHEALTHY, HEALTHY_AGAIN = "unhealthy", "healthy_again"
"""Kinds of events."""
NOTICES = {
    *("engine_serving", "engine_lost", "engine_draining", "engine_left", "tree_moved"),
    *(FATAL, UNHEALTHY, "waiting", "learner_started", "learner_lost"),
    *("write_failed", "write_waits", "write_done"),
    *("checkpoint_passed_over", "engine_work_failed", "check_failed", "shape_chosen"),
}
"""Events that whoever follows the run should see; what the run log warns of comes with them."""


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


def write_failed(what: str, reason: str) -> Event:
    """Something of the run folder could not be written."""
    return Event(kind="write_failed", fields={"what": what, "reason": reason})


def write_waits(what: str, reason: str) -> Event:
    """Something of the run waits for a disk or a store."""
    return Event(kind="write_waits", fields={"what": what, "reason": reason})


def write_done(what: str, seconds: float) -> Event:
    """What waited is written, after so many seconds."""
    return Event(kind="write_done", fields={"what": what, "seconds": seconds})


def run_ends(error: Exception) -> Event:
    """Something failed that would fail again, whoever is started anew."""
    return Event(kind=FATAL, fields={"reason": str(error)})


def check_failed(reason: str) -> Event:
    """A check gave an answer no verdict, with the traceback."""
    return Event(kind="check_failed", fields={"reason": reason})


class RunLogApi(StageApi, Protocol):
    """Actor of `RunLog`."""

    @actor_method
    def step(self, row: Row) -> None:
        """See `RunLog`, as for all that follow."""

    @actor_method
    def event(self, event: Event) -> None: ...

    @actor_method
    def rows_since(self, num_rows: int) -> list[Row]: ...

    @actor_method
    def notices_since(self, num_notices: int) -> list[Event]: ...

    @actor_method
    def growth(self) -> tuple[int, int]: ...

    @actor_method
    def num_lines(self) -> tuple[int, int]: ...

    @actor_method
    def close(self) -> None: ...
