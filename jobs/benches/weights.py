"""Weights: from the learner's parameters to an engine's, against copies of the same bytes."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import ray
import torch

from jobs.benches.sides import Row, compared_rounds
from treerpo_ray.actor import actor_method
from treerpo_ray.config import Config
from treerpo_ray.weights.files import HeldFile, WeightFiles
from treerpo_ray.weights.store import WeightStore

SIZES = {"10 M": 10**7, "100 M": 10**8, "500 M": 5 * 10**8}
"""Parameters."""
WIDTH = 1024
MAX_COPIES, MAX_PAUSED_COPIES = 3.0, 1.5
"""What a sync is to cost in all, and of it while engines are paused: copies of the same bytes."""
STORE_BYTES = 5 * 2**29
ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """CPU seconds of the parts of a sync, of all threads: other work of the machine is not in."""

    pack: float
    """Cast and digest."""
    hand_on: float
    """Have the node's store keep the file, and an engine find it."""
    receive: float
    """Digest it and write the parameters, while the engine is paused."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.pack + self.hand_on + self.receive


PARTS: tuple[tuple[str, float, Callable[[Times], float]], ...] = (
    ("packed to proved", MAX_COPIES, lambda times: times.total),
    ("packed", 1.0, lambda times: times.pack),
    ("handed on", 1.0, lambda times: times.hand_on),
    ("received, while paused", MAX_PAUSED_COPIES, lambda times: times.receive),
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
    """All that a sync does with bytes where learner and engine share a node, in one process.

    Args:
        num_parameters: About so many, of float32.
        sent_as: Type that they are sent in.
        chunk_bytes: Size of a chunk.
    """

    def __init__(self, num_parameters: int, sent_as: torch.dtype, chunk_bytes: int) -> None:
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
        names = dict(zip(self.weights, loaded, strict=True))
        self.transfer = StoreTransfer.__new__(StoreTransfer)  # there is no engine to make it for
        self.transfer.model = Parameters(names)
        self.transfer.init_transfer_engine(StoreInit())
        self.files, self.store = WeightFiles(), WeightStore()

    def copy(self) -> float:
        """CPU seconds of one copy of the bytes of a version, between pages that are there."""
        start = time.process_time()
        np.copyto(self.target, self.source)
        return time.process_time() - start

    async def sync(self) -> Times:
        """Bring a version from `weights` to `parameters`; raises unless it is proved."""
        from treerpo_ray.engine.vllm_worker import StoreUpdate
        from treerpo_ray.weight_sync import LoadProof, pack_weights

        clock = [time.process_time()]
        file = self.files.begin()
        manifest, _ = pack_weights(
            self.weights.items(),
            version=1,
            dtype=self.sent_as,
            chunk_bytes=self.chunk_bytes,
            allocate=file.part,
        )
        packed = file.seal()
        clock.append(time.process_time())
        await self.store.hold(packed)
        file.release()
        with closing(HeldFile(await self.store.place(packed.stamp, []))) as held:
            clock.append(time.process_time())
            self.transfer.digests = ()
            for number, (offset, num_bytes) in enumerate(held.place.parts):
                info = manifest.update_info(number)
                update = StoreUpdate(
                    path=held.place.path,
                    offset=offset,
                    num_bytes=num_bytes,
                    **info,  # type: ignore[arg-type]
                )
                self.transfer.receive_weights(update)
            clock.append(time.process_time())
        LoadProof(version=1, digests=(self.transfer.digests,)).check(manifest)
        pack, hand_on, receive = np.diff(clock).tolist()
        return Times(pack=pack, hand_on=hand_on, receive=receive)


class SyncPathApi(Protocol):
    """Actor of `SyncPath`."""

    @actor_method
    def copy(self) -> float:
        """See `SyncPath`, as for `sync`."""

    @actor_method
    def sync(self) -> Times: ...


def bench_weights(config: Config) -> list[Row]:
    """A sync with its proof, and its pause, against copies of what is sent: CPU time."""
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
    path = cast(SyncPathApi, made.remote(SIZES[size], sent_as, chunk_bytes))
    rounds = [(ray.get(path.copy.remote()), ray.get(path.sync.remote())) for _ in range(ROUNDS + 1)]
    del rounds[0]  # warm-up
    kind = str(sent_as).removeprefix("torch.")
    return [
        compared_rounds(
            f"weights: {size} parameters as {kind}, {what} (CPU time)",
            ("our path", [cost(times) for _, times in rounds]),
            (f"{most:g} copies of the bytes", [most * copy for copy, _ in rounds]),
        )
        for what, most, cost in PARTS
    ]
