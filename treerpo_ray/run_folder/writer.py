"""Background writer: does in a thread what a sink that is slow or gone must not hold up.

Each sink has its own: files, checkpoints, lines, an object store, Weights & Biases.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from treerpo_ray.run_folder.disk import explain

Work = Callable[[], object]
"""Writes something; whatever it raises counts as a failure."""
Warn = Callable[[str, str], object]
"""Told the name of what cannot be written, and the reason."""


class OnFailure(Enum):
    """What becomes of something that cannot be written."""

    RETRY = "retry"
    """It is tried until it succeeds; what comes after it waits."""
    DROP = "drop"
    """It is left out."""
    STOP = "stop"
    """It is left out, and so is all that comes after it."""


@dataclass(slots=True, kw_only=True)
class _Job:
    name: str
    work: Work
    is_late: bool = False
    """Whether it has failed, or was waited for in vain."""


class BackgroundWriter:
    """Does what it is handed, one after the other in this order.

    Args:
        warn: Told of a failure, of one that is tried again only the first time; and of whatever is
            left out. It may hand over something to this writer.
        name: Of the thread.
        on_failure: What becomes of something that fails.
        caught_up: Called when something that was late is done.
        max_waiting: How much may wait; what comes on top is left out.
        retry_s: Time between attempts.
        pause_s: Time between one that is done and the next.
        close_s: Time that is left for what waits at the end.
        place: Where it writes, if it is on this machine; a failure for want of room tells of it.
    """

    def __init__(
        self,
        *,
        warn: Warn,
        name: str = "files",
        on_failure: OnFailure = OnFailure.RETRY,
        caught_up: Callable[[], object] = lambda: None,
        max_waiting: int = 8,
        retry_s: float = 5.0,
        pause_s: float = 0.0,
        close_s: float = 60.0,
        place: Path | None = None,
    ) -> None:
        self._warn, self._caught_up, self._on_failure = warn, caught_up, on_failure
        self._max_waiting, self._close_s = max_waiting, close_s
        self._retry_s, self._pause_s, self._place = retry_s, pause_s, place
        self._error: Exception | None = None
        """What the first job failed of."""
        # Held by the one that changes or tells something, never over the work itself.
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()  # the first one may be in work
        self._is_working = self._is_closing = self._is_stopped = False
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, name: str, work: Work, *, unless_waiting: bool = False) -> None:
        """Hand over something to do; never blocks. It is left out, untold, after the end and once
        something has failed at the end.

        Args:
            name: What is written.
            work: Writes it.
            unless_waiting: Whether one of this name that is not begun yet will do.
        """
        with self._changed:
            num_waiting = len(self._jobs) - self._is_working
            names = [job.name for job in self._jobs][self._is_working :] if unless_waiting else []
            has_given_up = self._is_stopped or (self._is_closing and self._fault is not None)
            if has_given_up or name in names:
                return
            if num_waiting >= self._max_waiting:
                self._leave_out(name, f"left out: {num_waiting} before it still wait")
                return
            self._jobs.append(_Job(name=name, work=work))
            self._changed.notify_all()

    def settle(
        self, limit_s: float | None = None, late: Callable[[str], object] = lambda name: None
    ) -> bool:
        """Wait until all is done; returns whether it is.

        Args:
            limit_s: For how long, and not at all for something that is known to be late; None
                waits however long it takes.
            late: Told what is in the way, once, when it becomes late in this wait.
        """
        with self._changed:
            is_over = lambda: not self._jobs or (limit_s is not None and self._jobs[0].is_late)  # noqa: E731
            if not self._changed.wait_for(is_over, limit_s):
                self._jobs[0].is_late = True
                late(self._jobs[0].name)
                self._changed.notify_all()
            return not self._jobs

    def make_room(self, limit_s: float = 1.0) -> None:
        """Wait until one more may wait, for so long; raises what the first in line fails of."""
        with self._changed:
            has_room = lambda: len(self._jobs) - self._is_working < self._max_waiting  # noqa: E731
            self._changed.wait_for(lambda: has_room() or self._error is not None, limit_s)
            if not has_room() and self._error is not None:
                raise self._error

    def flush(self, limit_s: float) -> None:
        """Wait until all is done, for so long; raises what the first in line fails of."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._error is not None, limit_s)
            if self._jobs and self._error is not None:
                raise self._error

    def close(self, last: Work | None = None) -> str | None:
        """Do what waits and then `last`, within a limited time; what fails now is left out.

        Returns:
            Why something was left out; None if nothing was.
        """
        with self._changed:
            if self._is_stopped:
                return self._fault
            if last is not None:
                self._jobs.append(_Job(name="the end", work=last))
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(self._close_s)
        with self._changed:
            if self._jobs:
                names = ", ".join(job.name for job in self._jobs)
                self._is_stopped = True
                self._leave_out(names, f"left out: not written within {self._close_s:g} s")
            return self._fault

    def _run(self) -> None:
        while (job := self._next()) is not None:
            fault = None
            try:
                job.work()
                self._error = None
            except Exception as error:  # any sink's own
                self._error, fault = error, explain(error, self._place)
            with self._changed:
                self._is_working = False
                wait_s = self._pause_s
                if self._is_stopped:
                    return
                if fault is None:
                    self._finish(job)
                elif self._fail(job, fault):
                    wait_s = self._retry_s
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_closing, wait_s)

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing or self._is_stopped)
            if not self._jobs:
                self._is_stopped = True
                return None
            self._is_working = True
            return self._jobs[0]

    def _finish(self, job: _Job) -> None:
        self._jobs.popleft()
        if job.is_late:
            self._caught_up()

    def _fail(self, job: _Job, fault: str) -> bool:
        """Tell of a failure; returns whether it is tried again."""
        is_retried = self._on_failure is OnFailure.RETRY
        if is_retried and not self._is_closing:
            if not job.is_late:
                self._warn(job.name, fault)
            job.is_late = True
            return True
        self._jobs.popleft()
        if is_retried and job.is_late:
            self._fault = fault  # it was told when it began to fail
        else:
            self._leave_out(job.name, fault)
        return False

    def _leave_out(self, name: str, reason: str) -> None:
        self._fault = reason
        if self._on_failure is OnFailure.STOP:
            self._is_stopped = True
            self._jobs.clear()
            self._changed.notify_all()
        self._warn(name, reason)
