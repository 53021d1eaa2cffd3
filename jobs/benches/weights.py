"""Weights: from the learner's parameters to an engine's, against copies of the same bytes."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

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
SENT_AS = (torch.float32, torch.bfloat16)
"""What runs on CPUs send, which is what the learner has; and what runs on GPUs do, which is cast
here, and there by the GPU."""
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

    clone: float
    """A copy into new memory, as `torch.clone` makes it."""
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


Cost: TypeAlias = Callable[[Round], float]
"""CPU seconds of a part of a round."""
CLONES: tuple[str, Cost] = "clones", lambda times: times.clone
COPIES: tuple[str, Cost] = "copies in place", lambda times: times.copy
PARTS: tuple[tuple[str, Cost, float, tuple[str, Cost]], ...] = (
    ("packed to proved", lambda times: times.total, MAX_COPIES, CLONES),
    ("packed to proved", lambda times: times.total, MAX_COPIES, COPIES),
    ("packed", lambda times: times.pack, 1.0, COPIES),
    ("received, while paused", lambda times: times.receive, MAX_PAUSED_COPIES, CLONES),
    ("received, while paused", lambda times: times.receive, MAX_PAUSED_COPIES, COPIES),
    ("brought to another node's file", lambda times: times.bring, 1.0, COPIES),
)
"""Of a sync, with how many copies of which kind each is compared with."""


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
        self.loaded = loaded = torch.zeros(count, rows, WIDTH, dtype=sent_as)
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
        cloned = self.loaded.clone()
        at.append(time.process_time())
        del cloned  # to give its pages back is no part of a copy
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
        clone, copy, pack, hand_on, receive, bring = np.diff(at).tolist()
        return Round(
            clone=clone, copy=copy, pack=pack, hand_on=hand_on, receive=receive, bring=bring
        )

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
        return [row for kind in SENT_AS for size in SIZES for row in _rows(size, kind, config)]
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
            (f"{most:g} {kind_of_copy}", [most * copy(each) for each in rounds]),
        )
        for what, cost, most, (kind_of_copy, copy) in PARTS
    ]
