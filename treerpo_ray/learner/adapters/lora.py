"""Adapters: LoRA by PEFT; a model whose linear layers have small matrices that alone are trained.

A layer gives W x + (alpha / rank) B A x: W stays, B is zero at first. Without them the model is the
one that the run started from, so that a reference model is no second one.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from treerpo_ray.config.lora import LoraConfig
from treerpo_ray.learner.adapters.targets import adapted_layers
from treerpo_ray.learner.shards.sharding import whole

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Before the names of weights in files of PEFT's."""
ADAPTER = "default"
"""PEFT's name of the one adapter of each layer."""
BASE = ".base_layer."
"""In the names of what PEFT has put an adapter beside."""
SEED = 0
"""Of A's first values: those of all workers of all starts must be the same."""


class Adapters:
    """The adapters of a model, which are put into it.

    Args:
        model: On any device, before it is sharded; of its weights none is trained any more.
        settings: Rank above 0.
        folder: With adapters that `save` has left, to go on from; None: new ones.

    Raises:
        ValueError: the model has no such layers, or the folder other adapters.
    """

    def __init__(
        self, model: PreTrainedModel, *, settings: LoraConfig, folder: Path | None = None
    ) -> None:
        names = {name.rpartition(".")[2] for name in adapted_layers(model, settings)}
        config = PeftConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # it is only divided
            target_modules=sorted(names),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            made = get_peft_model(model, config)  # in float32, whatever the model's own weights are
        assert isinstance(made, PeftModel)
        self._peft, self._model = made, model
        nn.Module.eval(model)
        if folder is not None:
            self._restore(folder)

    def _restore(self, folder: Path) -> None:
        stored = load_file(folder / ADAPTER_FILE)
        own = dict(self.named())
        if {name: each.shape for name, each in stored.items()} != {
            name: each.shape for name, each in own.items()
        }:
            raise ValueError(f"{folder} has adapters of other layers or of another rank")
        for name, weight in own.items():
            weight.copy_(stored[name])

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Their weights under PEFT's names, by which they are sorted; sharded ones as they are."""
        yield from sorted(
            (PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."), weight.detach())
            for name, weight in self._model.named_parameters()
            if weight.requires_grad
        )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Meanwhile the model is the one that it was without them; for passes without gradient."""
        layers = [each for each in self._model.modules() if isinstance(each, LoraLayer)]
        # PEFT's own call also has adapters need no gradient, which a sharded weight cannot change.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def merged(self, state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What `state` (names and values of the model's own) is of a model without adapters that
        computes the same: W + (alpha / rank) B A, in the type of W.

        Sharded weights are gathered as they are asked for, by all workers.
        """
        for name, value in state:
            place, is_adapted, end = name.rpartition(BASE)
            if is_adapted and end == "weight":
                layer = self._model.get_submodule(place)
                assert isinstance(layer, LoraLayer)
                matrices = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
                down, up = (whole(cast(nn.Linear, each).weight.detach()) for each in matrices)
                added = layer.scaling[ADAPTER] * (up.float() @ down.float())
                value = whole(value)
                yield f"{place}.{end}", (value.float() + added).to(value.dtype)
            elif is_adapted:
                yield f"{place}.{end}", value
            elif ".lora_" not in name:
                yield name, value

    def save(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write configuration and whole `weights`, those of `named`, as PEFT loads them.

        Raises:
            OSError, SafetensorError: the disk refuses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._peft.peft_config[ADAPTER].save_pretrained(str(folder))
        held = {name: weight.to("cpu").contiguous() for name, weight in weights}
        save_file(held, folder / ADAPTER_FILE, metadata={"format": "pt"})
