"""Tree attention: a transformers attention function that computes a packed forest exactly.

Each segment (a prompt or a step) attends to its ancestors' tokens and, causally, to its own. A
forest's layout says which those are, and computes them; importing this module registers the
function under the name `TREE_ATTENTION`, and a layout travels to it as the model's argument:

    model(input_ids=..., position_ids=..., layout=layout, use_cache=False)

Without a layout it is plain causal attention over one row.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from treerpo_ray.learner.forest_layout import ForestLayout

TREE_ATTENTION = "tree"
"""Name of the attention implementation, as in `from_pretrained(attn_implementation=...)`."""


LEFT_OUT = {
    "softcap": "softcap (attn_logit_softcapping)",
    "s_aux": "attention sinks",
    "position_bias": "biases of positions",
    "indices": "choice of keys (sparse attention)",
    "block_indices": "choice of keys (sparse attention)",
}
"""Arguments of the attention interface that are not computed here, and what they are."""


def tree_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Int64[Tensor, ""] | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: ForestLayout | None = None,
    **parts: object,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Attend along each segment's path (the transformers attention interface).

    Raises:
        ValueError: The model's attention has a part that is not computed here, or the input does
            not fit the layout.
    """
    num_tokens = query.shape[2]
    _refuse_unsupported(
        dropout=dropout,
        windows=[sliding_window, _reach(attention_mask)],
        parts=parts,
        longest_path=layout.longest_path if layout else num_tokens,
    )
    if query.shape[0] != 1 or key.shape[2] != num_tokens:
        raise ValueError("tree attention takes one row of tokens and no cache: use_cache=False")
    if layout is None:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    size = layout.num_tokens
    if size != num_tokens:
        raise ValueError(f"the layout is for {size} tokens, the input has {num_tokens}")
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return layout.attend(query, key, value, scaling)[None], None


def _refuse_unsupported(
    *,
    dropout: float,
    windows: list[int | None],
    parts: Mapping[str, object],
    longest_path: int,
) -> None:
    """Raise ValueError for parts of a model's attention that would silently be left out."""
    if dropout:
        raise ValueError(
            f"tree attention has no dropout, the model asks for {dropout}: put it in eval mode"
        )
    for name, what in LEFT_OUT.items():
        if parts.get(name) is not None:
            raise ValueError(f"tree attention has no {what}: use another model")
    for window in windows:
        if window is not None and window < longest_path:
            raise ValueError(
                f"a path of {longest_path} tokens is longer than the window of {window} that some "
                "layer's attention has: shorten prompts or steps"
            )


def tree_mask(
    *, local_size: int | None = None, use_vmap: bool = False, **_: object
) -> Int64[Tensor, ""] | None:
    """What stands for a mask (the transformers mask interface).

    The layout of a forest says what a causal mask would. A window or chunk goes on as its size,
    since only the attention knows how long the longest path is.

    Raises:
        ValueError: the model adds something of its own to the mask.
    """
    if use_vmap:  # transformers' word for a mask with functions of the model's own
        raise ValueError("tree attention has no masks of a model's own: use another model")
    return None if local_size is None else torch.tensor(local_size)


def _reach(mask: Tensor | None) -> int | None:
    """The size that `tree_mask` gave, or None.

    Raises:
        ValueError: the mask is the model's own.
    """
    if mask is None:
        return None
    if mask.dim():
        raise ValueError(
            f"the model masks its attention in a way of its own (a mask of {list(mask.shape)}), "
            "which tree attention does not have: use another model"
        )
    return int(mask)


AttentionInterface.register(TREE_ATTENTION, tree_attention)


AttentionMaskInterface.register(TREE_ATTENTION, tree_mask)
