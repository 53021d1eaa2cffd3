"""Weight source: what engines ask for the bytes of a publication, and where they find them."""

import asyncio
import itertools
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from treerpo_ray.actor import actor_method
from treerpo_ray.weights.files import FilePlace, WeightsLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """An engine, as one that receives weights."""

    start: str
    """Which start of which engine it is; no other has the same."""
    node: str
    """Ray's id."""
    num_workers: int
    """Of the engine; each receives all bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlace:
    """Where the chunks of a version lie on a GPU."""

    stamp: bytes
    """Of this publication."""
    handles: tuple[str, ...]
    """Of each chunk, for other processes on the GPU; see `device.shared`."""
    sizes: tuple[int, ...]
    """Bytes of each chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderPlace:
    """A version on the learner's device, which its process sends to groups."""

    stamp: bytes
    """Of this publication."""
    sender: str
    """Which start of which learner it is; see `Poll`."""
    sizes: tuple[int, ...]
    """Bytes of each chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group of processes, of which the learner's is number 0 and sends to the others."""

    name: str
    """No other group has the same."""
    address: str
    """Of the learner's machine."""
    port: int
    """Where the others find it."""
    world_size: int
    """Processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlace:
    """What an engine is to receive."""

    group: Group
    first_rank: int
    """Number of its first worker in the group; the others follow."""
    sizes: tuple[int, ...]
    """Bytes of each chunk, in the order in which they are sent."""


OutgoingPlace: TypeAlias = FilePlace | DevicePlace | SenderPlace
"""Where a version lies that the learner has packed."""
Place: TypeAlias = FilePlace | DevicePlace | GroupPlace
"""Where an engine finds a version: in a file of its node, in its GPU, or at what a group sends."""


class WeightSource(Protocol):
    """Gives engines the bytes of one publication."""

    def places(self, engines: Sequence[Receiver]) -> list[Awaitable[Place]]:
        """Where each of these engines finds them, once they are there; all are to be awaited, and
        those of one call receive together where a group sends.

        Each raises:
            WeightsLost: they cannot be had any more.
        """


class PlacesApi(Protocol):
    """Actor of `WeightSync`, as engines' pools need it."""

    @actor_method
    def place(self, stamp: bytes, node: str) -> FilePlace:
        """See `WeightSync`, as for all that follow."""

    @actor_method
    def open_group(self, stamp: bytes, engines: Sequence[Receiver]) -> Group: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesOnNodes:
    """A publication that is brought to a file of each node."""

    sync: PlacesApi
    stamp: bytes

    def places(self, engines: Sequence[Receiver]) -> list[Awaitable[Place]]:
        """See `WeightSource`; they wait for each other where they share a node."""
        return [self.sync.place.remote(self.stamp, engine.node) for engine in engines]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """A publication that stays on the learner's GPU, for engines that share it."""

    place: DevicePlace
    node: str
    """Of the learner."""

    def places(self, engines: Sequence[Receiver]) -> list[Awaitable[Place]]:
        """See `WeightSource`."""
        return [self._place(engine) for engine in engines]

    async def _place(self, engine: Receiver) -> Place:
        if engine.node != self.node:
            raise WeightsLost("sync.transport=ipc brings weights to the learner's node alone")
        return self.place


@dataclass(frozen=True, slots=True, kw_only=True)
class FromGroup:
    """A publication that the learner sends to all that receive it at a time."""

    sync: PlacesApi
    stamp: bytes
    sizes: tuple[int, ...]
    """Bytes of each chunk."""

    def places(self, engines: Sequence[Receiver]) -> list[Awaitable[Place]]:
        """See `WeightSource`."""
        if not engines:  # nobody would wait for the group
            return []
        group = asyncio.ensure_future(self._opened(engines))
        ends = itertools.accumulate((engine.num_workers for engine in engines), initial=1)
        return [self._place(group, first) for first, _ in zip(ends, engines, strict=False)]

    async def _place(self, group: asyncio.Future[Group], first_rank: int) -> Place:
        opened = await asyncio.shield(group)  # one that gives up leaves it to the others
        return GroupPlace(group=opened, first_rank=first_rank, sizes=self.sizes)

    async def _opened(self, engines: Sequence[Receiver]) -> Group:
        return await self.sync.open_group.remote(self.stamp, engines)
