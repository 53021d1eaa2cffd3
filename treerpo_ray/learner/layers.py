"""Layers: what is done to each layer of a transformer, whatever its architecture calls them, and to
the positions that they see."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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


def fix_rotary(model: PreTrainedModel, max_tokens: int) -> None:
    """Take LongRoPE's factors by the longest path of a run, for good, as its engines do.

    Transformers takes them by the largest position of each input, vLLM by the room that an engine
    has, which is one token more than the longest path.

    Args:
        model: Is changed.
        max_tokens: Of the longest prompt with its answer.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == "longrope":
            _fix(module, max_tokens, None)
            setattr(module, "rope_type", "fixed")  # noqa: B010  # torch: any name is a tensor
        elif isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if kind == "longrope"]:
                _fix(module, max_tokens, layer_type)
                kinds[layer_type] = "fixed"


def _fix(module: nn.Module, max_tokens: int, layer_type: str | None) -> None:
    """Give a rotary embedding, or its part for a type of layers, the frequencies of engines.

    Raises:
        ValueError: its class would not take them.
    """
    config = cast(PreTrainedConfig, module.config)
    original = (config.rope_parameters or {}).get("original_max_position_embeddings", max_tokens)
    if config.model_type == "phimoe" and max_tokens >= original:
        raise ValueError(
            f"transformers computes phimoe with the factors for short texts at any length, and "
            f"engines with those for long ones from {original} tokens on: the longest prompt with "
            f"its answer has {max_tokens}, make it shorter than {original}"
        )
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    device = cast(Tensor, getattr(module, name)).device
    compute = ROPE_INIT_FUNCTIONS["longrope"]
    frequencies, _ = compute(config, device, seq_len=max_tokens + 1, layer_type=layer_type)
    setattr(module, name, frequencies)
