"""Waits: what a pool waits for, each for a limited time, and one line that tells of them all."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Wait:
    """A wait under way, which is told of when it takes long."""

    name: str
    start: float
    due: float
    """When it is told of next."""
    gap_s: float
    """From then to the time after, ever longer: a wait of days is a few lines, not thousands."""


class Waits:
    """All waits of a pool: each has its limit, and one line tells of those that take long.

    Args:
        report: Takes the seconds of the longest wait that is due, and for what it and how many
            others are.
        report_every_s: Time after which a wait is told of, and between two reports, however many
            wait.
    """

    def __init__(self, *, report: Callable[[float, str], None], report_every_s: float) -> None:
        self._report, self._report_every_s = report, report_every_s
        self._told: dict[asyncio.Future, Wait] = {}
        """Those under way that are to be told of, the longest first."""
        self._reported_at = -math.inf

    async def wait(
        self,
        result: Awaitable[T],
        name: str,
        timeout_s: float,
        *,
        is_quiet: bool = False,
        moved_at: Callable[[], float] = lambda: -math.inf,
    ) -> T:
        """Await `result`, told of as `name` unless quiet.

        Raises:
            TimeoutError: after `timeout_s`, counted anew from each time of the event loop
                that `moved_at` tells: whoever is waited for was seen at work then.
        """
        start = asyncio.get_running_loop().time()
        task = asyncio.ensure_future(result)
        if not is_quiet:
            every_s = self._report_every_s
            self._told[task] = Wait(name=name, start=start, due=start + every_s, gap_s=every_s)
        try:
            while not task.done():
                left = max(start, moved_at()) + timeout_s - asyncio.get_running_loop().time()
                if left <= 0:
                    raise TimeoutError(f"waited {timeout_s:.0f} s for {name}")
                await asyncio.wait([task], timeout=min(self._report_every_s, left))
                self._tell()
            return task.result()
        finally:
            self._told.pop(task, None)
            task.cancel()

    def _tell(self) -> None:
        """Report, if one is due and the last report is old enough."""
        now = asyncio.get_running_loop().time()
        first = next((wait for wait in self._told.values() if wait.due <= now), None)
        if first is None or now - self._reported_at < self._report_every_s:
            return
        self._reported_at = now
        for wait in self._told.values():
            if wait.due <= now:
                wait.due, wait.gap_s = now + wait.gap_s, 2 * wait.gap_s
        others = len(self._told) - 1
        self._report(now - first.start, first.name + (f", and for {others} more" * (others > 0)))
