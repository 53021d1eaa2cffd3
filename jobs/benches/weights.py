"""Weights: from the learner's parameters to an engine's, against copies of the same bytes."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import ray
import torch

from jobs.benches.sides import ROUNDS, Row, compared_rounds
from treerpo_ray.actor import actor_method
from treerpo_ray.config import Config
from treerpo_ray.weights.files import FilePlace, HeldFile, WeightFiles
from treerpo_ray.weights.store import WeightStore

if TYPE_CHECKING:
    from treerpo_ray.weights.manifest import Manifest

SIZES = {"10 M": 10**7, "100 M": 10**8, "500 M": 5 * 10**8}
"""Parameters."""
WIDTH = 1024
MAX_COPIES, MAX_PAUSED_COPIES = 3.0, 1.5
"""What a sync is to cost in all, and of it while engines are paused: copies of the same bytes."""
STORE_BYTES = 5 * 2**29
WARM_UP = 3
"""Rounds after which all files are used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """CPU seconds of a sync and of a copy of the same bytes; other work of the machine is not in
    it, and more threads take as much."""

    copy: float
    """Between pages that are there."""
    pack: float
    """Cast and digest."""
    hand_on: float
    """Have the node's store keep the file, and an engine find it."""
    receive: float
    """Digest it and write the parameters, while the engine is paused."""
    bring: float
    """Through Ray's store to the file of another node, but for the network."""

    @property
    def total(self) -> float:
        """From the learner's parameters to an engine's on the same node."""
        return self.pack + self.hand_on + self.receive


PARTS: tuple[tuple[str, float, Callable[[Round], float]], ...] = (
    ("packed to proved", MAX_COPIES, lambda times: times.total),
    ("packed", 1.0, lambda times: times.pack),
    ("received, while paused", MAX_PAUSED_COPIES, lambda times: times.receive),
    ("brought to another node's file", 1.0, lambda times: times.bring),
)
"""Of a sync, with the copies that each is compared with."""


class Parameters(torch.nn.Module):
    """Stands in for vLLM's model, whose own work is another one each time: a copy, once."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.parameters_by_name = parameters

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As models of vLLM do."""
        for name, weight in weights:
            self.parameters_by_name[name].copy_(weight)


class SyncPath:
    """All that a sync does with bytes, in one process.

    Args:
        num_parameters: About so many, of float32.
        sent_as: Type that they are sent in.
        chunk_bytes: Size of a chunk.
    """

    def __init__(self, *, num_parameters: int, sent_as: torch.dtype, chunk_bytes: int) -> None:
        from treerpo_ray.engine.vllm_worker import StoreInit, StoreTransfer

        torch.set_num_threads(1)
        rows = 4 * WIDTH
        count = max(1, num_parameters // (rows * WIDTH))
        flat = torch.randn(count, rows, WIDTH)
        self.weights = {f"layer.{number}": flat[number] for number in range(count)}
        loaded = torch.zeros(count, rows, WIDTH, dtype=sent_as)
        self.target = loaded.view(torch.uint8).view(-1).numpy()
        self.source = flat.view(torch.uint8).view(-1).numpy()[: len(self.target)]
        self.sent_as, self.chunk_bytes = sent_as, chunk_bytes
        self.transfer = StoreTransfer.__new__(StoreTransfer)  # there is no engine to make it for
        self.transfer.model = Parameters(dict(zip(self.weights, loaded, strict=True)))
        self.transfer.device = torch.device("cpu")
        self.transfer.init_transfer_engine(StoreInit())
        self.files, self.store, self.other_store = WeightFiles(), WeightStore(), WeightStore()

    async def round(self) -> Round:
        """Copy the bytes of a version, and sync it; raises unless it is proved."""
        from treerpo_ray.weights.manifest import LoadProof, pack_weights

        at = [time.process_time()]
        np.copyto(self.target, self.source)
        at.append(time.process_time())
        file = self.files.begin()
        manifest, _ = pack_weights(
            self.weights.items(),
            version=1,
            dtype=self.sent_as,
            chunk_bytes=self.chunk_bytes,
            allocate=file.part,
        )
        packed = file.seal()
        at.append(time.process_time())
        await self.store.hold(packed)
        file.release()
        with closing(HeldFile(await self.store.place(packed.stamp, []))) as held:
            at.append(time.process_time())
            self._receive(manifest, held.place)
        at.append(time.process_time())
        LoadProof(version=1, digests=(self.transfer.digests,)).check(manifest)
        chunks = [await self.store.put(packed.stamp, n) for n in range(len(packed.parts))]
        await self.other_store.place(packed.stamp, chunks)
        at.append(time.process_time())
        copy, pack, hand_on, receive, bring = np.diff(at).tolist()
        return Round(copy=copy, pack=pack, hand_on=hand_on, receive=receive, bring=bring)

    def _receive(self, manifest: "Manifest", place: FilePlace) -> None:
        from treerpo_ray.engine.vllm_worker import StoreUpdate

        self.transfer.digests = ()
        for number, (offset, num_bytes) in enumerate(place.parts):
            where = {"path": place.path, "offset": offset, "num_bytes": num_bytes}
            update = StoreUpdate(**where, **manifest.update_info(number))  # type: ignore[arg-type]
            self.transfer.receive_weights(update)


class SyncPathApi(Protocol):
    """Actor of `SyncPath`."""

    @actor_method
    def round(self) -> Round:
        """See `SyncPath`."""


def bench_weights(config: Config) -> list[Row]:
    """A sync with its proof, and its pause, against copies of what is sent."""
    ray.init(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False)
    try:
        rows = [_rows(size, torch.bfloat16, config) for size in SIZES]
        rows.append(_rows("100 M", torch.float32, config))
        return [row for group in rows for row in group]
    finally:
        ray.shutdown()


def _rows(size: str, sent_as: torch.dtype, config: Config) -> list[Row]:
    made = ray.remote(SyncPath).options(num_cpus=0)
    chunk_bytes = config.sync.chunk_mib * 2**20
    path = cast(
        SyncPathApi,
        made.remote(num_parameters=SIZES[size], sent_as=sent_as, chunk_bytes=chunk_bytes),
    )
    rounds = [ray.get(path.round.remote()) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    kind = str(sent_as).removeprefix("torch.")
    return [
        compared_rounds(
            f"weights: {size} parameters as {kind}, {what} (CPU time)",
            ("our path", [cost(each) for each in rounds]),
            (f"{most:g} copies of the bytes", [most * each.copy for each in rounds]),
        )
        for what, most, cost in PARTS
    ]
