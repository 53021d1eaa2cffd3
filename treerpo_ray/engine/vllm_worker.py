"""What runs inside vLLM's own worker process: the `treerpo_store` weight-transfer backend.

vLLM imports this module in every worker (`worker_extension_cls`), before the model is loaded.
Chunks of weights arrive as files that the engine actor wrote; they are mapped, digested, and
loaded layer by layer. Ray is not known here.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
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
    """One chunk: a file, and where each tensor lies in it."""

    path: str = ""
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
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Move the parameters away and wrap their loaders."""
        self.digests = ()
        self._chunks: list[np.memmap] = []
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdate) -> None:
        """Map one chunk, note the digest of what was received, load its tensors."""
        # Copy-on-write mapping: torch wants writable memory and the file must not change. Layers
        # are loaded once they are complete, so each chunk stays mapped until the update ends.
        chunk = np.memmap(update_info.path, np.uint8, "c")
        self._chunks.append(chunk)
        self.digests += (hashlib.blake2b(chunk.data, digest_size=16).hexdigest(),)
        flat = torch.from_numpy(chunk)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape, offset in zip(
                update_info.names,
                update_info.dtypes,
                update_info.shapes,
                update_info.offsets,
                strict=True,
            ):
                kind = getattr(torch, dtype)
                size = int(np.prod(shape)) * kind.itemsize
                yield name, flat[offset : offset + size].view(kind).view(shape)

        self.model.load_weights(tensors())  # type: ignore[operator]  # torch: any name is a tensor

    def finish_weight_update(self) -> None:
        """Put the parameters back in place, and refresh what was packed from them."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._chunks = []
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
