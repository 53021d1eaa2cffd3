"""What runs inside vLLM's own worker process: the `treerpo_store` weight-transfer backend.

vLLM imports this module in every worker (`worker_extension_cls`), before the model is loaded.
Chunks of weights are mapped from a file in memory or from the learner's part of the same GPU, or
received in a group; they are digested and loaded tensor by tensor. Ray is not known here.
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import torch
from jaxtyping import UInt8
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from treerpo_ray.weights.adapters import ServedAdapters
from treerpo_ray.weights.broadcast import Communicator, join
from treerpo_ray.weights.device import DeviceMaps
from treerpo_ray.weights.files import FileMaps
from treerpo_ray.weights.manifest import DeviceDigest, HostDigest
from treerpo_ray.weights.source import Group

BACKEND = "treerpo_store"
ACTOR_VARIABLE = "TREERPO_ENGINE_ACTOR"
"""Process id of the engine's actor, for the processes that vLLM starts in it."""
ACTOR_CHECK_S = 1.0
"""Time between looks at the engine's actor."""


class WorkerExtension:
    """Methods added to vLLM's worker, for `collective_rpc`."""

    weight_transfer_engine: "StoreTransfer"

    def treerpo_digests(self) -> list[str]:
        """Digests of the chunks that this worker received for the last update."""
        return list(self.weight_transfer_engine.digests)

    def treerpo_serve_adapters(self) -> None:
        """Serve what the last update has brought: at its end vLLM drops all adapters, taking it for
        one of the weights that they were trained beside."""
        adapters = self.weight_transfer_engine.adapters
        assert adapters is not None
        adapters.serve()

    def treerpo_join(self, group: dict[str, str | int], first_rank: int, limit_s: float) -> None:
        """Join a group, which sends the chunks from here on.

        Args:
            group: Fields of `Group`.
            first_rank: Number of the engine's first worker in it.
            limit_s: Time that the others get.
        """
        self.weight_transfer_engine.join(Group(**group), first_rank, limit_s)  # type: ignore[arg-type]


@dataclass
class StoreInit(WeightTransferInitInfo):
    """What versions consist of."""

    lora_rank: int = 0
    """Above 0 it is adapters alone."""
    lora_alpha: float = 0.0


@dataclass
class StoreUpdate(WeightTransferUpdateInfo):
    """One chunk: where it comes from, and where each tensor lies in it."""

    path: str = ""
    """Of the file in which it lies, if it does."""
    offset: int = 0
    """In that file."""
    handle: str = ""
    """Of the memory of this GPU in which it lies, if it does; else the group sends it."""
    num_bytes: int = 0
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class StoreTransfer(WeightTransferEngine):
    """Loads chunks into the running model."""

    init_info_cls = StoreInit
    update_info_cls = StoreUpdate
    digests: tuple[str, ...] = ()
    adapters: ServedAdapters | None = None
    """Where versions are adapters alone."""

    def init_transfer_engine(self, init_info: StoreInit) -> None:
        """Before the first update."""
        self._files, self._shared = FileMaps(), DeviceMaps(self.device)
        self._group: Communicator | None = None
        if init_info.lora_rank:
            self.adapters = ServedAdapters(
                self.model.lora_manager,  # type: ignore[arg-type]  # torch: any name is a tensor
                rank=init_info.lora_rank,
                alpha=init_info.lora_alpha,
            )

    def join(self, group: Group, first_rank: int, limit_s: float) -> None:
        """Join a group instead of the one before; see `WorkerExtension.treerpo_join`."""
        if self._group is not None:
            self._group.destroy()
            self._group = None
        rank = first_rank + self.parallel_config.rank
        self._group = join(group, rank=rank, device=self.device, limit_s=limit_s)

    def start_weight_update(self) -> None:
        """Move the parameters away and wrap their loaders."""
        self.digests = ()
        if self.adapters is None:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdate) -> None:
        """Load the tensors of one chunk, and note the digest of what was received."""
        chunk = self._chunk(update_info)
        digest = HostDigest() if update_info.path else DeviceDigest()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape, start, end in zip(
                update_info.names,
                update_info.dtypes,
                update_info.shapes,
                update_info.offsets,
                [*update_info.offsets[1:], update_info.num_bytes],
                strict=True,
            ):
                # With what is between it and the next one, and now, so that it is in the cache.
                digest.update(chunk[start:end])
                kind = getattr(torch, dtype)
                size = math.prod(shape) * kind.itemsize
                yield name, chunk[start : start + size].view(kind).view(shape)

        received = tensors()
        if self.adapters is not None:
            self.adapters.take(received)
        else:
            self.model.load_weights(received)  # type: ignore[operator]  # torch: any is a tensor
        for _ in received:  # a model may end at the last one that it knows
            pass
        self.digests += (digest.hexdigest(),)

    def _chunk(self, update: StoreUpdate) -> UInt8[torch.Tensor, " bytes"]:
        if update.path:
            # The engine has the file open until the update has ended, so that nobody writes it.
            found = self._files.read(update.path, update.offset, update.num_bytes)
            return torch.from_numpy(found)
        if update.handle:
            return self._shared.read(update.handle, update.num_bytes)
        if self._group is None:
            raise RuntimeError("this worker is in no group that sends weights")
        received = torch.empty(update.num_bytes, dtype=torch.uint8, device=self.device)
        self._group.broadcast(received, src=0)
        return received

    def finish_weight_update(self) -> None:
        """Put the parameters back in place, and refresh what was packed from them."""
        if self.adapters is None:
            self._put_back()
        self._shared.forget_others()

    def _put_back(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cuda":
            # vLLM waits after each chunk, and layers with padding are copied only now: from memory
            # that the learner may write again once it is told.
            torch.cuda.synchronize(self.device)
        # On CPU a tied head multiplies with a packed copy of the embedding. The reload sees no
        # weights of the head's own, so nobody else packs it anew, and logits would stay stale.
        head = getattr(self.model, "lm_head", None)
        if (
            head is not None
            and hasattr(head, "cpu_linear")
            and getattr(self.model.config, "tie_word_embeddings", False)
        ):
            head.quant_method.process_weights_after_loading(head)
        # Nor does vLLM pack experts anew on CPU, where their kernel wants them in a layout of its
        # own: it does so for the first weights, and copies later ones in as they come.
        if self.device.type == "cpu":
            for layer in self.model.modules():
                kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
                if kernel is not None:
                    kernel.fused_experts.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing to close."""


def _end_with(actor: int) -> None:
    """End this process once the engine's actor is gone: it would go on holding its memory.

    The kernel's own signal for this follows the thread that started a process, and tells only
    direct children: with tensor parallelism the workers are those of vLLM's core.
    """
    while psutil.pid_exists(actor):
        time.sleep(ACTOR_CHECK_S)
    os._exit(1)


if (_actor := int(os.environ.get(ACTOR_VARIABLE, os.getpid()))) != os.getpid():
    threading.Thread(target=_end_with, args=(_actor,), daemon=True).start()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, StoreTransfer)
