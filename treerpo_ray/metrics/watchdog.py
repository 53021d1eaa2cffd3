"""Watchdog: knows when each stage of a run last moved, and ends a run that hangs, loudly.

What is repaired elsewhere comes first: the pool replaces a hung engine after
`engine.request_timeout_s`, the verifier kills a hung worker after `verifier.timeout_s`, Ray Train
starts the workers anew when one dies. What still stands after `run.stall_timeout_s` is a hang that
nobody repairs: the watchdog writes down what each stage waits for and stops the run, which the same
command takes up from its last checkpoint.
"""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import ray

from treerpo_ray.actor import actor_method
from treerpo_ray.config import Config
from treerpo_ray.metrics.stage_status import IdleTimes, StackDump, StageApi, StageStatus, stalled
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import BackgroundWriter

log = logging.getLogger(__name__)

CHECKS = 20
"""Looks at the stages within one time limit."""
ANSWER_S = 5.0
"""Time that the stages get to answer one look."""


class HeartbeatsApi(Protocol):
    """Actor of `Heartbeats`."""

    @actor_method
    def moved(self, status: StageStatus) -> None:
        """See `Heartbeats`, as for all that follow."""

    @actor_method
    def forget(self, prefix: str) -> None: ...

    @actor_method
    def statuses(self) -> list[StageStatus]: ...

    @actor_method
    def idle(self) -> IdleTimes: ...


class Heartbeats:
    """Collects what the stages report; an actor, whose clock is the only one that counts."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._moved: dict[str, tuple[float, StageStatus]] = {}
        self._idle: dict[str, float] = {}
        """Seconds that each stage was idle until it last moved."""

    def __repr__(self) -> str:
        return "heartbeats"

    def moved(self, status: StageStatus) -> None:
        """The stage has moved just now."""
        now = self._clock()
        self._idle[status.stage] = self._idle_until(now, status.stage)
        self._moved[status.stage] = now, status

    def forget(self, prefix: str) -> None:
        """Stages of that kind begin anew, and there may be fewer of them."""
        self._moved = {
            stage: last for stage, last in self._moved.items() if not stage.startswith(prefix)
        }
        self._idle = {stage: idle for stage, idle in self._idle.items() if stage in self._moved}

    def statuses(self) -> list[StageStatus]:
        """The latest of each stage."""
        now = self._clock()
        return [replace(status, age_s=now - at) for at, status in self._moved.values()]

    def idle(self) -> IdleTimes:
        """For how long each stage has waited for others, since it was first heard of."""
        now = self._clock()
        return IdleTimes(
            at_s=now, idle_s={stage: self._idle_until(now, stage) for stage in self._moved}
        )

    def _idle_until(self, now: float, stage: str) -> float:
        if stage not in self._moved:
            return 0.0
        at, last = self._moved[stage]
        return self._idle[stage] + (now - at) * (not last.is_busy)


class Heartbeat:
    """What a stage tells of itself: it reports its statuses, and has this process write its stacks
    if it stays busy too long.

    Args:
        heartbeats: Actor of `Heartbeats`.
        stage: Name of the stage.
        folder: Run folder.
        limit_s: `run.stall_timeout_s`.
    """

    def __init__(
        self, *, heartbeats: HeartbeatsApi, stage: str, folder: str, limit_s: float
    ) -> None:
        self._heartbeats, self._stage = heartbeats, stage
        self._where = f", {socket.gethostname()} process {os.getpid()}"
        self._stacks = StackDump(stage=stage, folder=folder, limit_s=limit_s)

    def at(self, doing: str, *, is_busy: bool = True) -> None:
        """The stage begins something, or is further with it."""
        status = StageStatus(stage=self._stage, doing=doing, is_busy=is_busy, where=self._where)
        self._heartbeats.moved.remote(status)
        if is_busy:
            self._stacks.arm()
        else:
            self._stacks.disarm()

    def close(self) -> None:
        """The stage has ended its work in this process."""
        self.at("ended", is_busy=False)


class Watchdog:
    """Looks at the stages from a thread; `failure` says so once the run hangs.

    Args:
        limit_s: Time for which a stage may stand still.
        look: Latest statuses of all stages.
        folder: Run folder, in whose logs the report goes.
        report_s: Time that the run folder gets to take it.
    """

    def __init__(
        self,
        *,
        limit_s: float,
        look: Callable[[], list[StageStatus]],
        folder: RunFolder,
        report_s: float = 60.0,
    ) -> None:
        self._limit_s, self._look, self._folder = limit_s, look, folder
        self._report_s = report_s
        self.failure: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking; returns once the last look is over."""
        self._ended.set()
        self._thread.join(2 * ANSWER_S)

    def _work(self) -> None:
        while self.failure is None and not self._ended.wait(self._limit_s / CHECKS):
            try:
                statuses = self._look()
            except Exception as error:  # whatever a look runs into is no hang
                log.warning("the watchdog cannot look: %s", error)
                continue
            if found := stalled(statuses, self._limit_s):
                where = self._report(statuses, found)
                first = replace(found[0], where="")  # ids stand in the report
                self.failure = f"nothing moved for {first.age_s:.0f} s: {first}; see {where}"

    def _report(self, statuses: list[StageStatus], found: list[StageStatus]) -> str:
        """Write what each stage waits for and this process's stacks; returns where."""
        lines = [f"stalled: {status}" for status in found]
        lines += [str(status) for status in statuses if status not in found]
        place = "stacks-*.txt" if self._folder.is_local else "Ray's logs"
        lines.append(f"stacks of the stages are in {place}, those of the driver are:")
        name = time.strftime("logs/stall-%Y%m%d-%H%M%S.txt")
        report = "\n".join(lines) + "\n"
        faults: list[str] = []
        writer = BackgroundWriter(
            warn=lambda *why: faults.append(": ".join(why)),
            name="stall report",
            close_s=self._report_s,
        )
        own = self._folder
        writer.put(name, lambda: own.publish_file(name, report.encode() + _own_stacks()))
        writer.close()  # a disk or store that hangs must not keep the run from its end
        if not faults:
            return f"{self._folder}/{name}"
        print(report, *faults, sep="\n", file=sys.__stderr__)
        return "standard error"


def _own_stacks() -> bytes:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


class Stages:
    """Asks the stages of a run for their latest statuses; one that does not answer is busy.

    Args:
        actors: Actor of each stage that can be asked, by the stage's name.
        heartbeats: Actor of `Heartbeats`, for the stages that cannot be asked.
        folder: Run folder, for the stacks of those that can.
        limit_s: `run.stall_timeout_s`.
    """

    def __init__(
        self,
        *,
        actors: dict[str, StageApi],
        heartbeats: HeartbeatsApi,
        folder: str,
        limit_s: float,
    ) -> None:
        self._actors, self._heartbeats = actors, heartbeats
        self._stacks = {
            stage: StackDump(stage=stage, folder=folder, limit_s=limit_s) for stage in actors
        }
        self._asked: dict[str, ray.ObjectRef] = {}
        self._answered: dict[str, tuple[float, list[StageStatus]]] = {}

    def __call__(self) -> list[StageStatus]:
        """The latest statuses."""
        for stage, actor in self._actors.items():
            if stage not in self._asked:
                actor.arm.remote(self._stacks[stage])
                self._asked[stage] = actor.status.remote()
        if "heartbeats" not in self._asked:
            self._asked["heartbeats"] = self._heartbeats.statuses.remote()
        ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=ANSWER_S)
        statuses: list[StageStatus] = []
        for stage in [*self._actors, "heartbeats"]:
            statuses += self._latest(stage)
        return statuses

    def _latest(self, stage: str) -> list[StageStatus]:
        now = time.monotonic()
        at, statuses = self._answered.setdefault(stage, (now, []))
        try:
            answer = ray.get(self._asked[stage], timeout=0)
        except ray.exceptions.RayError as error:  # late, or dead
            if not isinstance(error, ray.exceptions.GetTimeoutError):
                del self._asked[stage]
            kind = type(error).__name__
            silence = StageStatus(
                stage=stage, doing=f"does not answer ({kind})", is_busy=True, age_s=now - at
            )
            return [*(replace(each, age_s=each.age_s + now - at) for each in statuses), silence]
        del self._asked[stage]
        statuses = answer if isinstance(answer, list) else [answer]
        self._answered[stage] = now, statuses
        return statuses


def watch_over(config: Config, actors: dict[str, StageApi], heartbeats: HeartbeatsApi) -> Watchdog:
    """The watchdog of a run; `actors` and `heartbeats` are those of `Stages`."""
    limit_s = config.run.stall_timeout_s
    return Watchdog(
        limit_s=limit_s,
        look=Stages(actors=actors, heartbeats=heartbeats, folder=config.folder, limit_s=limit_s),
        folder=RunFolder(config.folder),
    )
