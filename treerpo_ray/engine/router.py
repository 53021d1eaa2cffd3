"""Router: which engine a tree goes to; those for which no engine has room wait in order."""

import asyncio
from collections import deque
from collections.abc import Sequence

from treerpo_ray.engine.replica import Replica


class Router:
    """Hands places on engines to trees, first come, first served.

    Args:
        replicas: The engines of the pool, which alone changes this list.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._waiting: deque[asyncio.Future[Replica]] = deque()

    @property
    def num_waiting(self) -> int:
        """Trees without a place."""
        return sum(not place.done() for place in self._waiting)

    async def take(self) -> Replica:
        """A place at the engine with the fewest trees, as soon as there is one."""
        place: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self.fill()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release(place.result())
            raise

    def release(self, replica: Replica) -> None:
        """Give a place back."""
        replica.give_place_back()
        self.fill()

    def fill(self) -> None:
        """Let trees in while there are places; to be called whenever there may be more."""
        while self._waiting:
            free = [replica for replica in self._replicas if replica.has_room]
            if not free:
                return
            place = self._waiting.popleft()
            if not place.done():
                replica = min(free, key=lambda each: each.num_trees)
                replica.take_place()
                place.set_result(replica)

    def fail(self, error: Exception) -> None:
        """Raise `error` in all who wait: no engine will serve any more."""
        while self._waiting:
            if not (place := self._waiting.popleft()).done():
                place.set_exception(error)
