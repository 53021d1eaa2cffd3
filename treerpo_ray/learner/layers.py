"""Layers: what is done to each layer of a transformer, whatever its architecture calls them."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from treerpo_ray.learner.tree_attention import TREE_ATTENTION, tree_attention


def layers_of(model: PreTrainedModel, asked_by: str) -> list[GradientCheckpointingLayer]:
    """The layers of a model, in order.

    Args:
        model: The model; one without memory for its weights will do.
        asked_by: Key of the configuration that needs them.

    Raises:
        ValueError: the model does not say what its layers are.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{asked_by}=true needs a model that says what its layers are, which "
            f"{type(model).__name__} does not: set {asked_by}=false"
        )
    return layers


def compile_layers(model: PreTrainedModel) -> None:
    """Have torch compile what is computed in each layer, whose attention stays as it is.

    Forests differ in everything that a compiler could know of their attention, so that it would
    compile anew for each. One program serves forests of any number of tokens.

    Raises:
        ValueError: the model does not say what its layers are.
    """
    AttentionInterface.register(TREE_ATTENTION, torch.compiler.disable(tree_attention))
    for layer in layers_of(model, "learner.compile"):
        forward = torch.compile(layer.forward, dynamic=True)
        layer.forward = forward  # type: ignore[method-assign]


def recompute_layers(model: PreTrainedModel) -> None:
    """Have each layer compute its activations again in the backward pass.

    The layers stay in eval mode, where those of transformers would turn dropout on. What is
    compiled is compiled before: attention breaks a layer in two, and a compiler takes no
    recomputation of what is not whole.

    Raises:
        ValueError: the model does not say what its layers are.
    """
    for layer in layers_of(model, "learner.gradient_checkpointing"):
        forward = partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = forward  # type: ignore[method-assign]
