"""Adapters in vLLM's worker: the weights of a version as the one LoRA that all requests ask for.

The base weights stay as the engine has loaded them, and only what the learner trains travels. vLLM
copies the matrices into buffers of its own, where captured CUDA graphs find them.
"""

from collections.abc import Iterable
from typing import cast

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

ADAPTER_ID = 1
"""vLLM's number of the adapter; 0 is none."""


class ServedAdapters:
    """The adapters of the version that a worker serves; at first those that change nothing.

    Args:
        manager: vLLM's, of the worker's model.
        rank: Of the adapters.
        alpha: What they add is multiplied by alpha / rank.
    """

    def __init__(self, manager: LoRAModelManager, *, rank: int, alpha: float) -> None:
        self._manager = manager
        self._settings = PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[])  # type: ignore[arg-type]
        self._taken: dict[str, torch.Tensor] = {}
        embeddings = cast(dict[str, str], manager.model.embedding_modules)
        zeros = manager.create_dummy_lora(ADAPTER_ID, rank, embeddings)
        self._install(zeros)

    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights of the next version, under PEFT's names."""
        for name, weight in weights:
            self._taken[name] = weight.to(self._manager.device, copy=True)

    def serve(self) -> None:
        """Serve what was taken since the last time.

        Raises:
            RuntimeError: vLLM has no such layer; it would leave its adapter out.
        """
        manager = self._manager
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        made = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            self._taken,
            self._settings,
            device=str(manager.device),
            dtype=manager.lora_config.lora_dtype,  # type: ignore[arg-type]  # it has become one
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
        self._taken = {}
        parts = {part for packed in manager.packed_modules.values() for part in packed}
        if unknown := sorted(made.loras.keys() - manager.modules.keys() - parts):
            raise RuntimeError(f"lora.target_modules: vLLM serves no adapter of {unknown[0]}")
        self._install(made)

    def _install(self, made: LoRAModel) -> None:
        self._manager.remove_adapter(ADAPTER_ID)
        self._manager.add_adapter(made)
        self._manager.activate_adapter(ADAPTER_ID)
