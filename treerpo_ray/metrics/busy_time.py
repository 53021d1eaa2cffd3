"""Busy time: how long an engine has had something to do, how long it has been there, and what its
processes took of CPUs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil


class BusyTime:
    """Time in which at least one piece of work was under way, from now on.

    Args:
        clock: Seconds since any time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._num_works, self._changed, self._busy = 0, self._began, 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        """One piece of work, among any number at a time."""
        self._settle()
        self._num_works += 1
        try:
            yield
        finally:
            self._settle()
            self._num_works -= 1

    @property
    def busy_s(self) -> float:
        """Seconds with work."""
        self._settle()
        return self._busy

    @property
    def total_s(self) -> float:
        """Seconds altogether."""
        return self._clock() - self._began

    def _settle(self) -> None:
        now = self._clock()
        self._busy += (now - self._changed) * (self._num_works > 0)
        self._changed = now


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started, such as vLLM's core."""
    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            times = process.cpu_times()
            total += times.user + times.system
    return total
