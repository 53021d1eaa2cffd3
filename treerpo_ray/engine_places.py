"""Engine places: the engines of a pool, and the trees that wait for one to take them."""

import asyncio
import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle

from treerpo_ray.actor import Actor
from treerpo_ray.sampling import EngineStats


@dataclass(eq=False, slots=True)
class Member:
    """An engine of the pool."""

    index: int
    actor: Actor
    node: str = ""
    """Ray's id of its node; empty until it has one."""
    is_serving: bool = False
    version: int = -1
    """Newest version that it has proved; -1 before the first."""
    num_trees: int = 0
    moved_at: float = -math.inf
    """Monotonic time in seconds at which a sibling group of any tree last came from it."""
    num_starts: int = 1
    stats: EngineStats | None = None
    """Its last answer for its totals."""
    ends_at_s: float = math.inf
    """Unix time at which its node will be gone, once that is known."""

    def kill(self) -> None:
        """End its process at once; its trees move on."""
        ray.kill(cast(ActorHandle, self.actor))


class Places:
    """Hands the places of the engines to trees, first come, first served.

    Args:
        members: The engines that take trees once they serve; the caller changes this list.
        max_trees: Trees that one engine grows at a time; None: any number.
    """

    def __init__(self, members: list[Member], max_trees: int | None) -> None:
        self.members = members
        self.max_trees = math.inf if max_trees is None else max_trees
        self._waiting: deque[asyncio.Future[Member]] = deque()

    @property
    def num_waiting(self) -> int:
        """Trees without a place."""
        return sum(not place.done() for place in self._waiting)

    async def take(self) -> Member:
        """A place at the engine with the fewest trees, as soon as there is one."""
        place: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self.fill()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(place.result())
            raise

    def release(self, member: Member) -> None:
        """Give a place back."""
        member.num_trees -= 1
        self.fill()

    def fill(self) -> None:
        """Let trees in while there are places; to be called whenever there may be more."""
        while self._waiting:
            free = [m for m in self.members if m.is_serving and m.num_trees < self.max_trees]
            if not free:
                return
            place = self._waiting.popleft()
            if not place.done():
                member = min(free, key=lambda m: m.num_trees)
                member.num_trees += 1
                place.set_result(member)

    def fail(self, error: Exception) -> None:
        """Raise `error` in all who wait: no engine will serve any more."""
        while self._waiting:
            if not (place := self._waiting.popleft()).done():
                place.set_exception(error)


def first_to_leave(members: list[Member]) -> Member:
    """The engine that a pool loses least by: not yet serving, on a node that will be empty soonest.

    Among equals the one with the fewest trees, and of these the one that came last.
    """
    on_node = Counter(member.node for member in members)
    return min(
        members, key=lambda m: (m.is_serving, bool(m.node), on_node[m.node], m.num_trees, -m.index)
    )
