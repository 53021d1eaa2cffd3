"""Targets: the layers of a model that get adapters, also of one without memory for its weights."""

from torch import nn
from transformers import PreTrainedModel

from treerpo_ray.config.lora import LoraConfig


def adapted_layers(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Linear]:
    """The layers that get adapters, by their names in the model.

    Raises:
        ValueError: there is none of a name that is asked for.
    """
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    kinds = {name.rpartition(".")[2] for name in layers}
    for name in lora.target_modules:
        if name not in kinds:
            raise ValueError(
                f"lora.target_modules: {type(model).__name__} has no linear layer {name} but the "
                f"head; it has {', '.join(sorted(kinds))}"
            )
    targets = set(lora.target_modules) or kinds
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets}


def num_adapter_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Numbers in the adapters that a model would get; raises as `adapted_layers` does."""
    layers = adapted_layers(model, lora).values()
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)
