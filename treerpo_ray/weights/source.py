"""Weight source: what engines ask for the bytes of a publication."""

from dataclasses import dataclass
from typing import Protocol

from treerpo_ray.actor import actor_method
from treerpo_ray.weights.files import FilePlace


class WeightSource(Protocol):
    """Gives engines the bytes of one publication."""

    async def place(self, node: str) -> FilePlace:
        """Where they lie on a node (Ray's id), to which they are brought if they are not there.

        Raises:
            WeightsLost: they cannot be had any more.
        """


class PlacesApi(Protocol):
    """Actor of `WeightSync`, as engines' pools need it."""

    @actor_method
    def place(self, stamp: bytes, node: str) -> FilePlace:
        """See `WeightSync`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """A publication of a weight sync, as a `WeightSource`."""

    sync: PlacesApi
    stamp: bytes

    async def place(self, node: str) -> FilePlace:
        """Where it lies on a node; see `WeightSync.place`."""
        return await self.sync.place.remote(self.stamp, node)
