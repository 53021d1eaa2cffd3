"""An engine pool that hangs, as an actor of Ray: it lies where other processes can import it."""

import asyncio
from collections.abc import AsyncIterator

from treerpo_ray.metrics.events import Event
from treerpo_ray.metrics.stage_status import StageStatus


class PoolWithoutNodes:
    """An engine pool whose last node went when the evaluation had begun."""

    def __init__(self, **_: object) -> None:
        self.ended = asyncio.Event()

    async def begin(self, *, run_log, **_: object) -> None:
        self.run_log = run_log

    async def start(self) -> None:
        pass

    async def evaluate(self, *request: object) -> AsyncIterator[object]:
        await self.run_log.event.remote(Event(kind="engine_lost", fields={"engine": 0}))
        await self.ended.wait()
        raise RuntimeError("the pool gave this evaluation up")
        yield

    async def arm(self, stacks) -> None:
        pass

    async def status(self) -> StageStatus:
        # It never stands still for long enough itself: it is the evaluation that does, however late
        # the first word of it comes.
        return StageStatus(stage="engines", doing="waiting for a node", is_busy=False, age_s=0.0)

    async def stop(self) -> None:
        self.ended.set()
        raise RuntimeError("the nodes are gone")
