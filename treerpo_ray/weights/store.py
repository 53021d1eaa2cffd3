"""Weight store: the actor that keeps a run's newest weights on a node, as one file."""

import asyncio
from typing import Protocol

import numpy as np
import ray

from treerpo_ray.actor import actor_method, make_actor
from treerpo_ray.weights.files import FileMaps, FilePlace, HeldFile, WeightFiles, WeightsLost

NO_ROOM = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)
"""What Ray raises where neither its memory nor the disk that it spills to has room."""
GONE = "weights are gone with the store of the learner's node"


class WeightStore:
    """Keeps the newest weights on its node as one file, whatever becomes of who packed or loads
    them."""

    def __init__(self) -> None:
        self._files, self._maps = WeightFiles(), FileMaps()
        self._held: HeldFile | None = None
        self._fetching = asyncio.Lock()

    def __repr__(self) -> str:
        return "weight store"

    async def hold(self, place: FilePlace) -> FilePlace:
        """Keep what lies in a file of this node, instead of what was kept until now; returns where
        it lies from then on.

        Raises:
            WeightsLost: it is not there any more.
        """
        held = HeldFile(place)
        if self._held is not None:
            self._held.close()
        self._held = held
        return held.place

    async def put(self, stamp: bytes, part: int) -> ray.ObjectRef:
        """A chunk of a publication that is kept, in Ray's store.

        Raises:
            WeightsLost: it is not kept any more.
            OutOfDiskError, ObjectStoreFullError: there is no room; NO_ROOM.
        """
        place = self._kept(stamp)
        if place is None:
            raise WeightsLost(GONE)
        return ray.put(self._maps.read(place.path, *place.parts[part]))

    async def place(self, stamp: bytes, chunks: list[ray.ObjectRef]) -> FilePlace:
        """Where a publication lies here; fetched, as `chunks`, if it is not what is kept.

        Raises:
            WeightsLost: it cannot be had any more.
        """
        async with self._fetching:
            return self._kept(stamp) or await self._fetch(stamp, chunks)

    def _kept(self, stamp: bytes) -> FilePlace | None:
        held = self._held
        return held.place if held is not None and held.place.stamp == stamp else None

    async def _fetch(self, stamp: bytes, chunks: list[ray.ObjectRef]) -> FilePlace:
        if not chunks:
            raise WeightsLost(GONE)
        file = self._files.begin()
        try:
            for chunk in chunks:
                fetched = await chunk
                np.copyto(file.part(len(fetched)), fetched)
        except ray.exceptions.ObjectLostError as error:
            raise WeightsLost(f"weights are gone: {type(error).__name__}") from None
        place = await self.hold(file.seal(stamp))
        file.release()
        return place


class WeightStoreApi(Protocol):
    """Actor of `WeightStore`."""

    @actor_method
    def hold(self, place: FilePlace) -> FilePlace:
        """See `WeightStore`, as for all that follow."""

    @actor_method
    def put(self, stamp: bytes, part: int) -> ray.ObjectRef: ...

    @actor_method
    def place(self, stamp: bytes, chunks: list[ray.ObjectRef]) -> FilePlace: ...


def store_on(node: str) -> WeightStoreApi:
    """A new store on a node (Ray's id)."""
    return make_actor(WeightStore, name="weight store", node=node)()


def put(store: WeightStoreApi, stamp: bytes, part: int) -> ray.ObjectRef:
    """What a store puts; see `WeightStore.put`. Blocks."""
    try:
        return store.put.remote(stamp, part).future().result()
    except NO_ROOM as error:  # without the stack of the other process
        raise (error.cause if isinstance(error, ray.exceptions.RayTaskError) else error) from None
