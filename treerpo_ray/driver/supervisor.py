"""Supervisor: waits for the parts of a run in the driver, shows what happens, ends what hangs."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

import ray

from treerpo_ray.actor import root_cause
from treerpo_ray.config import Config
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.events import FATAL, RunLogApi
from treerpo_ray.metrics.watchdog import Heartbeat, HeartbeatsApi, Watchdog

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_S = 0.5
"""Time between looks at the run's log, each of which may take as long."""
LAST_LOOK_S = 60.0
"""Time that the log has to tell what was noted until some work ended; its disk may be late."""
SHUT_DOWN_S = 180
"""Time for engines to stop, and for the run's log to reach disk, store and W&B."""


class Supervisor:
    """Shows what the run's log says from now on.

    Args:
        run_log: Actor of `RunLog`.
        console: Where it is shown.
        watchdog: Knows whether the run hangs.
        poll_s: Time between looks at the log.
    """

    def __init__(
        self, *, run_log: RunLogApi, console: Console, watchdog: Watchdog, poll_s: float = POLL_S
    ) -> None:
        self.run_log, self.console, self.watchdog = run_log, console, watchdog
        self._poll_s = poll_s
        self._num_notices = 0
        self._fatal: str | None = None
        """Why a stage cannot go on."""
        self._num_rows = len(ray.get(run_log.rows_since.remote(0)))

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread of its own and show meanwhile what is new; returns its result.

        Raises:
            RuntimeError: the run hangs, or a stage says that it cannot go on, whatever `work` came
                to.
        """
        results: list[T] = []
        failures: list[BaseException] = []

        def do() -> None:
            try:
                results.append(work())
            except BaseException as error:  # raised again below, in the thread that waits
                failures.append(error)

        thread = threading.Thread(target=do, name="supervised", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(self._poll_s)
            if self.watchdog.failure is not None:
                raise RuntimeError(self.watchdog.failure)
            self._show_news(self._poll_s)
            self._raise_fatal()
        self.show_last()
        self._raise_fatal()
        if failures:
            raise failures[0]
        return results[0]

    def show_last(self) -> None:
        """Show all that was noted until now, or say that the log does not tell."""
        try:
            if not self._show_news(LAST_LOOK_S):
                self.console.warn(
                    f"the run's log has not answered for {LAST_LOOK_S:.0f} s; what is not shown "
                    "here stands in its files"
                )
        except ray.exceptions.RayError as error:
            log.warning("the run's log is gone: %s", root_cause(error))

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise RuntimeError(self._fatal)

    def _show_news(self, limit_s: float) -> bool:
        """Show what is new; whether the log has told it in time."""
        asked_notices = self.run_log.notices_since.remote(self._num_notices)
        asked_rows = self.run_log.rows_since.remote(self._num_rows)
        if len(ray.wait([asked_notices, asked_rows], num_returns=2, timeout=limit_s)[0]) < 2:
            return False
        notices, rows = ray.get(asked_notices), ray.get(asked_rows)
        self._num_rows += len(rows)
        self._num_notices += len(notices)
        for notice in notices:
            if notice.kind == FATAL:
                self._fatal = str(notice.fields["reason"])
            else:
                self.console.print_event(notice)
        for row in rows:
            self.console.print_step(row)
        if self.console.is_live:
            self._show_growth(limit_s)
        return True

    def _show_growth(self, limit_s: float) -> None:
        """How far the trees of the next learner step are, if the log tells in time."""
        asked = self.run_log.growth.remote()
        if ray.wait([asked], timeout=limit_s)[0]:
            step, num_finished = ray.get(asked)
            self.console.show_growth(step, num_finished)


@contextmanager
def evaluation_progress(
    config: Config, console: Console, heartbeats: HeartbeatsApi, title: str, num_problems: int
) -> Iterator[Callable[[int], None]]:
    """Progress of an evaluation in the driver, on the console and for the watchdog that asks
    `heartbeats`; yields its `advance`."""
    heartbeat = Heartbeat(
        heartbeats=heartbeats,
        stage="evaluation",
        folder=config.folder,
        limit_s=config.run.stall_timeout_s,
    )
    with closing(heartbeat), console.progress(title, num_problems) as show:

        def advance(num_done: int) -> None:
            heartbeat.at(title)
            show(num_done)

        heartbeat.at(title)
        yield advance


def stop_actor(
    stop: "Callable[[], ray.ObjectRef[None]]", name: str, console: Console | None = None
) -> None:
    """Have an actor end its work; what fails or takes too long is told, not raised."""
    try:
        ray.get(stop(), timeout=SHUT_DOWN_S)
    except ray.exceptions.RayError as error:
        log.warning("%s did not end well: %s", name, error)
        if console is not None:
            console.warn(f"{name} did not end well: {root_cause(error)}")
