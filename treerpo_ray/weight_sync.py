"""Weight sync: brings the learner's weights to the engines, which prove what they received.

On the learner's node engines read the file that the learner packed into; the bytes are copied
once, to the parameters. What other nodes need goes through Ray's store, to one file on each.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import ray

from treerpo_ray.actor import actor_method
from treerpo_ray.metrics.events import RunLogApi, write_done, write_waits
from treerpo_ray.metrics.stage_status import StageStatus, WatchedStage
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.patience import DiskRefused, Patience, PatienceTimes
from treerpo_ray.weights.files import FilePlace, WeightsLost
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.rounds import Poll, Round, Rounds
from treerpo_ray.weights.source import (
    DevicePlace,
    FilesOnNodes,
    FromGroup,
    Group,
    OnDevice,
    OutgoingPlace,
    PlacesApi,
    Receiver,
    SenderPlace,
    WeightSource,
)
from treerpo_ray.weights.store import WeightStoreApi, put, store_on

if TYPE_CHECKING:
    from treerpo_ray.task import GateApi


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A sequence with the learner's log-probabilities (nats, temperature 1) of its tokens."""

    token_ids: list[int]
    logprobs: list[float]
    """Of each token after the first."""

    def distance(self, found: list[float]) -> float:
        """Mean absolute difference (nats a token) of an engine's log-probabilities from these."""
        pairs = zip(found, self.logprobs, strict=True)
        return statistics.fmean(abs(ours - theirs) for ours, theirs in pairs)


class EnginesApi(Protocol):
    """Actor of the pool whose engines serve the weights."""

    @actor_method
    def serve(
        self, manifest: Manifest, source: WeightSource, probe: Probe, should_probe: bool
    ) -> None:
        """Have the engines serve a version; see `EnginePool.serve`."""


@dataclass(slots=True, kw_only=True)
class _Publication:
    """A version on its way."""

    version: int
    place: OutgoingPlace
    node: str
    """Of the learner."""
    chunks: list[ray.ObjectRef] = field(default_factory=list)
    """In Ray's store, as far as they were put there for other nodes."""
    putting: asyncio.Lock = field(default_factory=asyncio.Lock)
    at: set[str] = field(default_factory=set)
    """Nodes that asked for it, and that of the learner."""
    refused: DiskRefused | None = None
    """Why it was not put there."""

    def __post_init__(self) -> None:
        self.at.add(self.node)

    def file(self) -> FilePlace:
        """Where it lies, if that is a file."""
        if not isinstance(self.place, FilePlace):
            raise TypeError(f"version {self.version} lies in no file, but as {self.place}")
        return self.place


def _own_handle() -> PlacesApi:
    return cast(PlacesApi, ray.get_runtime_context().current_actor)


class WeightSync(WatchedStage):
    """Takes weights from the learner's first worker and returns once every engine proved them.

    The bytes go from that worker's node to those of the engines and nowhere else, once to each,
    when an engine there first asks. When the learner's node is lost they are, too: engines go on
    with the version that they have, and one that starts waits for the version that the learner
    publishes from its last checkpoint.

    Room in Ray's store is waited for, as `Patience` does: the weights are the learner's newest, and
    who fails here would have it train its steps again.

    Args:
        pool: Actor of `TreePool`; keeps what is handed on for engines that come up later.
        gate: Actor of `Gate`; knows whether the run is told to stop.
        run_log: Actor of `RunLog`; told of what waits.
        folder: Run folder.
        probe_every: Syncs between comparisons of log-probabilities; the first is compared.
        fetch_limit_s: Time for weights to come from one node to another, and for the learner to
            turn to engines that are to receive in a group.
        times: How long each part of a wait lasts.
        make_store: Makes a store on a node.
        handle: Gives the handle of this actor.
    """

    def __init__(
        self,
        *,
        pool: EnginesApi,
        gate: "GateApi",
        run_log: RunLogApi,
        folder: str,
        probe_every: int,
        fetch_limit_s: float,
        times: PatienceTimes | None = None,
        make_store: Callable[[str], WeightStoreApi] = store_on,
        handle: Callable[[], PlacesApi] = _own_handle,
    ) -> None:
        self.pool, self.probe_every = pool, probe_every
        self._fetch_limit_s = fetch_limit_s
        self._make_store, self._handle = make_store, handle
        self._patience = Patience(
            folder=RunFolder(folder),
            waits=lambda what, reason: run_log.event.remote(write_waits(what, reason)),
            written=lambda what, seconds: run_log.event.remote(write_done(what, seconds)),
            is_told_to_stop=lambda: gate.is_told_to_stop.remote().future().result(),
            moves=self._move,
            times=times,
        )
        self._num_syncs = 0
        self._newest: _Publication | None = None
        self._rounds = Rounds()
        self._stores: dict[str, WeightStoreApi] = {}
        """By their nodes: those of the learner and of the engines that asked since it published."""
        self._serves = ""
        """What it does while something is published."""
        self._doing = ""
        self._moved_at = time.monotonic()

    def __repr__(self) -> str:
        return "weight sync"

    async def publish(
        self, manifest: Manifest, place: OutgoingPlace, probe: Probe, node: str
    ) -> None:
        """Have the engines serve `manifest`; returns once they have proved it.

        Args:
            manifest: What the version consists of.
            place: Where its bytes lie, which stay there until this returns.
            probe: What the engines are compared with.
            node: Ray's id of the node where they lie.

        Raises:
            RayError, RuntimeError: no engine could take it over, or the bytes are lost.
            DiskRefused: the run was told to stop while there was no room for them.
        """
        self._serves = f"having the engines serve version {manifest.version}"
        self._move(self._serves)
        should_probe = self._num_syncs % self.probe_every == 0
        self._num_syncs += 1
        try:
            try:
                await self._serve(manifest, place, probe, node, should_probe)
            except (ray.exceptions.RayActorError, WeightsLost):
                if self._newest is not None and self._newest.refused is not None:
                    raise self._newest.refused from None
                # The store was killed; the learner may still have what it packed.
                self._stores.pop(node, None)
                await self._serve(manifest, place, probe, node, should_probe)
        finally:
            self._serves = ""
            self._move("")

    async def _serve(
        self, manifest: Manifest, place: OutgoingPlace, probe: Probe, node: str, should_probe: bool
    ) -> None:
        if isinstance(place, FilePlace):
            # What the learner packed dies with its worker; what its node's store holds lives on.
            await self._store(node).hold.remote(place)
        self._newest = newest = _Publication(version=manifest.version, place=place, node=node)
        source = self._source(place, node)
        await self.pool.serve.remote(manifest, source, probe, should_probe)
        if newest is self._newest:  # a store would keep a node whose engines have left
            self._stores = {name: self._stores[name] for name in self._stores if name in newest.at}

    def _source(self, place: OutgoingPlace, node: str) -> WeightSource:
        if isinstance(place, SenderPlace):
            return FromGroup(sync=self._handle(), stamp=place.stamp, sizes=place.sizes)
        if isinstance(place, DevicePlace):
            return OnDevice(place=place, node=node)
        return FilesOnNodes(sync=self._handle(), stamp=place.stamp)

    async def open_group(self, stamp: bytes, engines: Sequence[Receiver]) -> Group:
        """The group in which engines receive the newest publication.

        Raises:
            WeightsLost: it is not the newest any more, or the learner does not come to send it.
        """
        place = self._current(stamp).place
        if not isinstance(place, SenderPlace):
            raise TypeError(f"no group is sent {place}")
        return await self._rounds.open(place.sender, stamp, engines, self._fetch_limit_s)

    async def next_round(self, poll: Poll) -> Round | None:
        """What a learner is to send next; see `Rounds.next`."""
        return await self._rounds.next(poll)

    def _current(self, stamp: bytes) -> _Publication:
        newest = self._newest
        if newest is None or newest.place.stamp != stamp:
            raise WeightsLost("other weights were published meanwhile")
        return newest

    async def place(self, stamp: bytes, node: str) -> FilePlace:
        """Where the newest publication lies on a node, once it is there.

        Raises:
            WeightsLost: it is not the newest any more, or its bytes are gone, or the run was told
                to stop while there was no room for them.
            TimeoutError: they do not come.
            RayError: the node is lost.
        """
        newest = self._current(stamp)
        newest.at.add(node)
        chunks = [] if node == newest.node else await self._chunks(newest)
        for _ in range(2):
            store = self._store(node)
            try:
                async with asyncio.timeout(self._fetch_limit_s):
                    return await store.place.remote(stamp, chunks)
            except ray.exceptions.RayActorError:  # it was killed
                if self._stores.get(node) is store:
                    del self._stores[node]
        raise WeightsLost(f"no store stays alive on node {node}")

    def _store(self, node: str) -> WeightStoreApi:
        if node not in self._stores:
            self._stores[node] = self._make_store(node)
        return self._stores[node]

    async def _chunks(self, newest: _Publication) -> list[ray.ObjectRef]:
        """The chunks in Ray's store of the learner's node, put there once."""
        async with newest.putting:
            place = newest.file()
            for part in range(len(newest.chunks), len(place.parts)):
                work = partial(put, self._store(newest.node), place.stamp, part)
                what = f"weights of version {newest.version}"
                try:
                    # In a thread: meanwhile this actor is asked for its status.
                    chunk = await asyncio.to_thread(self._patience.until_written, what, work)
                except ray.exceptions.RayActorError:
                    raise WeightsLost("weights are gone with their store") from None
                except DiskRefused as error:
                    newest.refused = error
                    raise WeightsLost(str(error)) from None
                finally:  # for an engine that came up later it puts while nothing is published
                    self._move(self._serves)
                newest.chunks.append(chunk)
            return newest.chunks

    def _move(self, doing: str) -> None:
        self._doing, self._moved_at = doing, time.monotonic()

    async def status(self) -> StageStatus:
        """What is published, and since when."""
        return StageStatus(
            stage="weight sync",
            doing=self._doing or "waiting for a version",
            is_busy=bool(self._doing),
            age_s=time.monotonic() - self._moved_at,
        )
