"""Weight sync: the learner's weights on their way to the engines, in flat chunks of
bytes, with a manifest that says what lies where, and proofs.

A manifest carries a digest of each chunk; an engine proves a version by echoing it together
with the digests of the bytes that its workers received.
"""

import asyncio
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import numpy as np
import ray
from jaxtyping import UInt8

from treerpo_ray.actor import Put, actor_method, make_actor
from treerpo_ray.metrics.events import RunLogApi, write_done, write_waits
from treerpo_ray.metrics.stage_status import StageStatus, WatchedStage
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.patience import Patience, PatienceTimes

if TYPE_CHECKING:  # manifests go through actors that have no use for it
    import torch

    from treerpo_ray.task import GateApi


T = TypeVar("T")
ALIGNMENT = 64
"""Offsets are multiples of this, so that every dtype can be viewed in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """One tensor in a chunk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a version of the weights consists of."""

    version: int
    tensors: tuple[TensorPlace, ...]
    digests: tuple[str, ...]
    """blake2b of each chunk."""

    def update_info(self, chunk: int) -> dict[str, list]:
        """The fields of `vllm_worker.StoreUpdate` for one chunk, but for its path."""
        tensors = [tensor for tensor in self.tensors if tensor.chunk == chunk]
        return {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "offsets": [tensor.offset for tensor in tensors],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProof:
    """An engine's word that it serves a version."""

    version: int
    digests: tuple[tuple[str, ...], ...]
    """Digests of the received chunks, from each worker of the engine."""

    def check(self, manifest: Manifest) -> None:
        """Raise a RuntimeError unless this proves `manifest`."""
        if self.version != manifest.version:
            raise RuntimeError(f"engine serves version {self.version}, not {manifest.version}")
        if not self.digests:
            raise RuntimeError(f"no worker of the engine received version {manifest.version}")
        for worker, digests in enumerate(self.digests):
            if digests != manifest.digests:
                raise RuntimeError(
                    f"worker {worker} received other bytes for version {manifest.version}"
                )


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


def pack_weights(
    weights: Iterable[tuple[str, "torch.Tensor"]],
    *,
    version: int,
    dtype: "torch.dtype",
    chunk_bytes: int,
) -> tuple[Manifest, list[UInt8[np.ndarray, " bytes"]]]:
    """Lay tensors out in chunks of about `chunk_bytes`; floating ones are sent as `dtype`.

    A tensor lies in one chunk whole; one that is larger than `chunk_bytes` gets its own.
    """
    import torch

    places: list[TensorPlace] = []
    chunks: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    size = 0

    def close_chunk() -> None:
        nonlocal size
        if parts:
            chunks.append(np.concatenate(parts))
        parts.clear()
        size = 0

    for name, weight in weights:
        sent = weight.to("cpu", dtype if weight.is_floating_point() else weight.dtype).contiguous()
        flat = sent.reshape(-1).view(torch.uint8).numpy()
        padding = -len(flat) % ALIGNMENT
        if size and size + len(flat) > chunk_bytes:
            close_chunk()
        kind = str(sent.dtype).removeprefix("torch.")
        places.append(
            TensorPlace(
                name=name, dtype=kind, shape=tuple(sent.shape), chunk=len(chunks), offset=size
            )
        )
        parts += [flat, np.zeros(padding, np.uint8)]
        size += len(flat) + padding
    close_chunk()
    digests = tuple(hashlib.blake2b(chunk.data, digest_size=16).hexdigest() for chunk in chunks)
    return Manifest(version=version, tensors=tuple(places), digests=digests), chunks


class WeightsLost(RuntimeError):
    """The bytes of a version are gone, with the node or the process that held them; whoever was to
    load them still has what it had."""


class ChunkFiles:
    """Chunks as files in memory, for worker processes of this machine; gone with their maker.

    They count as this process's memory and not against a size of /dev/shm, which containers
    keep small.
    """

    def __enter__(self) -> Self:
        self._descriptors: list[int] = []
        return self

    def write(self, chunk: UInt8[np.ndarray, " bytes"]) -> str:
        """Write one chunk and return a path that other processes can open."""
        descriptor = os.memfd_create("treerpo-weights")
        self._descriptors.append(descriptor)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        chunk.tofile(path)
        return path

    async def fetch(self, manifest: Manifest, chunks: list[ray.ObjectRef]) -> list[str]:
        """Write the chunks of a version as they come; returns their paths.

        Raises:
            WeightsLost: they cannot be had any more.
        """
        try:
            return [self.write(await chunk) for chunk in chunks]
        except ray.exceptions.ObjectLostError as error:
            lost = f"version {manifest.version} is lost: {type(error).__name__}"
            raise WeightsLost(lost) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


class EnginesApi(Protocol):
    """Actor of the pool whose engines serve the weights."""

    @actor_method
    def serve(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, should_probe: bool
    ) -> None:
        """Have the engines serve a version; see `EnginePool.serve`."""


NO_ROOM = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)
"""What Ray raises where neither its memory nor the disk that it spills to has room."""


class WeightStore:
    """Holds weights on the node where they were packed, whatever becomes of who packed them."""

    def __repr__(self) -> str:
        return "weight store"

    async def keep(self, chunk: list[ray.ObjectRef]) -> ray.ObjectRef:
        """The same chunk, the only one of the list, as this actor's own; raises one of NO_ROOM."""
        return ray.put(await chunk[0])


class WeightStoreApi(Protocol):
    """Actor of `WeightStore`."""

    @actor_method
    def keep(self, chunk: list[ray.ObjectRef]) -> ray.ObjectRef:
        """See `WeightStore`."""


def _store_on(node: str) -> WeightStoreApi:
    return make_actor(WeightStore, name="weight store", node=node)()


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStores:
    """Ray's stores of objects, one on each node, as a process reaches them."""

    here: str
    """Ray's id of the node of the process."""
    put: Put = ray.put
    """Puts a value in the store of that node."""
    on: Callable[[str], WeightStoreApi] = _store_on
    """Makes what puts in the store of another node."""


def _keep(store: WeightStoreApi, chunk: ray.ObjectRef) -> ray.ObjectRef:
    try:
        return store.keep.remote([chunk]).future().result()
    except NO_ROOM as error:  # without the stack of the other process
        raise (error.cause if isinstance(error, ray.exceptions.RayTaskError) else error) from None


class WeightSync(WatchedStage):
    """Takes weights from the learner's first worker and returns once every engine proved them.

    The bytes go from that worker's node to the engines and nowhere else. When that node is lost
    they are, too: engines go on with the version that they have, and one that starts waits for the
    version that the learner publishes from its last checkpoint.

    Room in Ray's store is waited for, as `Patience` does: the weights are the learner's newest, and
    who fails here would have it train its steps again.

    Args:
        pool: Actor of `TreePool`; keeps what is handed on for engines that come up later.
        gate: Actor of `Gate`; knows whether the run is told to stop.
        run_log: Actor of `RunLog`; told of what waits.
        folder: Run folder.
        probe_every: Syncs between comparisons of log-probabilities; the first is compared.
        times: How long each part of a wait lasts.
        object_stores: Where chunks are kept; those of the cluster that this actor is of.
    """

    def __init__(
        self,
        *,
        pool: EnginesApi,
        gate: "GateApi",
        run_log: RunLogApi,
        folder: str,
        probe_every: int,
        times: PatienceTimes | None = None,
        object_stores: ObjectStores | None = None,
    ) -> None:
        self.pool, self.probe_every = pool, probe_every
        self._object_stores = object_stores or ObjectStores(
            here=ray.get_runtime_context().get_node_id()
        )
        self._patience = Patience(
            folder=RunFolder(folder),
            waits=lambda what, reason: run_log.event.remote(write_waits(what, reason)),
            written=lambda what, seconds: run_log.event.remote(write_done(what, seconds)),
            is_told_to_stop=lambda: gate.is_told_to_stop.remote().future().result(),
            moves=self._move,
            times=times,
        )
        self._num_syncs = 0
        self._stores: dict[str, WeightStoreApi] = {}
        """By their nodes; only the one of the node that published last."""
        self._doing = ""
        self._moved_at = time.monotonic()

    def __repr__(self) -> str:
        return "weight sync"

    async def publish(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, node: str
    ) -> None:
        """Have the engines serve `manifest`; returns once they have proved it.

        Args:
            manifest: What the version consists of.
            chunks: Its bytes.
            probe: What the engines are compared with.
            node: Ray's id of the node where the chunks lie.

        Raises:
            RayError, RuntimeError: no engine could take it over, or the chunks are lost.
            DiskRefused: the run was told to stop while there was no room for them.
        """
        self._move(f"having the engines serve version {manifest.version}")
        should_probe = self._num_syncs % self.probe_every == 0
        self._num_syncs += 1
        try:
            try:
                await self._serve(manifest, chunks, probe, node, should_probe)
            except (ray.exceptions.RayActorError, WeightsLost):
                # The store was killed; the learner may still have what it put.
                self._stores.pop(node, None)
                await self._serve(manifest, chunks, probe, node, should_probe)
        finally:
            self._move("")

    async def _serve(
        self,
        manifest: Manifest,
        chunks: list[ray.ObjectRef],
        probe: Probe,
        node: str,
        should_probe: bool,
    ) -> None:
        # What the learner put dies with its worker; what is put here lives on.
        what = f"weights of version {manifest.version}"
        owned = [await self._own(chunk, node, what) for chunk in chunks]
        self._move(f"having the engines serve version {manifest.version}")
        await self.pool.serve.remote(manifest, owned, probe, should_probe)

    async def _own(self, chunk: ray.ObjectRef, node: str, what: str) -> ray.ObjectRef:
        """The same chunk, as one of this actor or of the weight store on its node."""
        if node == self._object_stores.here:
            put = partial(self._object_stores.put, await chunk)
        else:
            if node not in self._stores:
                self._stores = {node: self._object_stores.on(node)}
            put = partial(_keep, self._stores[node], chunk)
        # In a thread, where `ray.get` would warn: meanwhile this actor is asked for its status.
        return await asyncio.to_thread(self._patience.until_written, what, put)

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
