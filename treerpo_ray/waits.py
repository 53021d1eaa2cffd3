"""Waits: what a pool waits for, each for a limited time, and one line that tells of them all."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

REPORT_EVERY_S = 30.0
"""Time after which a wait is told of, and between two reports, however many wait."""


class Waits:
    """All of them.

    Args:
        report: Takes the seconds of the longest wait, and for what it and how many others are.
    """

    def __init__(self, report: Callable[[float, str], None]) -> None:
        self._report = report
        self._told: dict[asyncio.Future, tuple[float, str]] = {}
        """Start and name of those under way that are to be told of, the longest first."""
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
            self._told[task] = start, name
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
        """Report, if the longest wait has lasted long enough and the last report is old enough."""
        now = time.monotonic()
        start, name = next(iter(self._told.values()), (now, ""))
        if now - max(start, self._reported_at) >= REPORT_EVERY_S:
            self._reported_at = now
            others = len(self._told) - 1
            self._report(now - start, f"{name}, and for {others} more" if others else name)
