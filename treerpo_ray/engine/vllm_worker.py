"""What runs inside vLLM's own worker process: the `treerpo_store` weight-transfer backend.

vLLM imports this module in every worker (`worker_extension_cls`), before the model is loaded.
Chunks of weights lie in a file in memory, which is mapped; they are digested and loaded tensor by
tensor. Ray is not known here.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
import xxhash
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

from treerpo_ray.weights.files import FileMaps

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


@dataclass
class StoreInit(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class StoreUpdate(WeightTransferUpdateInfo):
    """One chunk: where it lies in a file, and where each tensor lies in it."""

    path: str = ""
    offset: int = 0
    num_bytes: int = 0
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class StoreTransfer(WeightTransferEngine):
    """Loads chunks from files into the running model."""

    init_info_cls = StoreInit
    update_info_cls = StoreUpdate
    digests: tuple[str, ...] = ()

    def init_transfer_engine(self, init_info: StoreInit) -> None:
        """Before the first update."""
        self._maps = FileMaps()

    def start_weight_update(self) -> None:
        """Move the parameters away and wrap their loaders."""
        self.digests = ()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdate) -> None:
        """Load the tensors of one chunk, and note the digest of what was received."""
        # The engine has the file open until the update has ended, so that nobody writes it.
        chunk = self._maps.read(update_info.path, update_info.offset, update_info.num_bytes)
        digest = xxhash.xxh3_128()

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
                digest.update(chunk[start:end].data)
                kind = getattr(torch, dtype)
                size = int(np.prod(shape)) * kind.itemsize
                yield name, torch.from_numpy(chunk[start : start + size]).view(kind).view(shape)

        received = tensors()
        self.model.load_weights(received)  # type: ignore[operator]  # torch: any name is a tensor
        for _ in received:  # a model may end at the last one that it knows
            pass
        self.digests += (digest.hexdigest(),)

    def finish_weight_update(self) -> None:
        """Put the parameters back in place, and refresh what was packed from them."""
        finalize_layerwise_reload(self.model, self.model_config)
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
