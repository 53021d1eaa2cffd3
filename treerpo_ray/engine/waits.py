"""Waits: what a pool waits for, each for a limited time, and one line that tells of them all."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


REPORT_EVERY_S = 30.0
"""Time after which a wait is told of, and between two reports, however many wait."""


@dataclass(slots=True)
class Wait:
    """One that is to be told of."""

    name: str
    start: float
    due: float
    """When it is told of next."""
    gap_s: float
    """From then to the time after, ever longer: a wait of days is a few lines, not thousands."""


class Waits:
    """All of them.

    Args:
        report: Takes the seconds of the longest wait that is due, and for what it and how many
            others are.
    """

    def __init__(self, report: Callable[[float, str], None]) -> None:
        self._report = report
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
            TimeoutError: after `timeout_s`, counted anew from each monotonic time in seconds that
                `moved_at` tells: whoever is waited for was seen at work then.
        """
        start = time.monotonic()
        task = asyncio.ensure_future(result)
        if not is_quiet:
            self._told[task] = Wait(name, start, start + REPORT_EVERY_S, REPORT_EVERY_S)
        try:
            while not task.done():
                left = max(start, moved_at()) + timeout_s - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"waited {timeout_s:.0f} s for {name}")
                await asyncio.wait([task], timeout=min(REPORT_EVERY_S, left))
                self._tell()
            return task.result()
        finally:
            self._told.pop(task, None)
            task.cancel()

    def _tell(self) -> None:
        """Report, if one is due and the last report is old enough."""
        now = time.monotonic()
        first = next((wait for wait in self._told.values() if wait.due <= now), None)
        if first is None or now - self._reported_at < REPORT_EVERY_S:
            return
        self._reported_at = now
        for wait in self._told.values():
            if wait.due <= now:
                wait.due, wait.gap_s = now + wait.gap_s, 2 * wait.gap_s
        others = len(self._told) - 1
        self._report(now - first.start, first.name + (f", and for {others} more" * (others > 0)))
