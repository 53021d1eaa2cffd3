"""Background: work that runs beside everything else in an actor, and a signal to whoever waits."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundTasks:
    """Tasks of one event loop, kept until they end.

    Args:
        failed: Told what a task of `spawn` has raised, once for each.
    """

    def __init__(self, *, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """Run `work`, of which the caller awaits the result, until `cancel` at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work`, for which nobody waits, until `cancel` at the latest."""
        self.start(work).add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def cancel(self) -> None:
        """Cancel all tasks; what is spawned from now on runs as before."""
        for task in list(self._tasks):
            task.cancel()


class Signal:
    """Tells the tasks of one event loop that what they wait for may have come."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Have all who wait look again."""
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        await self._next.wait()

    async def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait until `is_so`, looked at now and after each `notify`."""
        while not is_so():
            await self._next.wait()
