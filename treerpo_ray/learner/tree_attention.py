"""Tree attention: a transformers attention function that computes a packed forest exactly.

Each segment (a prompt or a step) attends to its ancestors' tokens and, causally, to its own. No
mask over tokens x tokens exists: segments of like shape form a bucket, one padded batch of
queries against the gathered keys of their paths. Importing this module registers the function
under the name `TREE_ATTENTION`; a forest's layout travels to it as the model's `layout` argument:

    model(input_ids=..., position_ids=..., layout=layout, use_cache=False)

Without a layout it is plain causal attention over one row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from treerpo_ray.algo.packing import Forest

TREE_ATTENTION = "tree"
"""Name of the attention implementation, as in `from_pretrained(attn_implementation=...)`."""


BUCKET_COST = 2**14
"""Cost of one more bucket in query-key pairs: the calls it adds against the padding it saves."""


LEFT_OUT = {
    "softcap": "softcap (attn_logit_softcapping)",
    "s_aux": "attention sinks",
    "position_bias": "biases of positions",
    "indices": "choice of keys (sparse attention)",
    "block_indices": "choice of keys (sparse attention)",
}
"""Arguments of the attention interface that are not computed here, and what they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Segments of like shape as one padded batch.

    A padded query reads token 0 and its output is dropped; a padded key lies behind the causal
    limit of every real query. So neither needs a mask of its own.
    """

    query_index: Int64[Tensor, "segments queries"]
    key_index: Int64[Tensor, "segments keys"]
    """Tokens of the segment's path: its ancestors' and its own."""
    mask: Bool[Tensor, "#segments 1 queries keys"]
    """Causal limit; shared where all contexts in the bucket are equally long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestLayout:
    """Who attends to whom in a packed forest, on the model's device."""

    buckets: tuple[Bucket, ...]
    output_index: Int64[Tensor, " tokens"]
    """Row of each token in the buckets' padded outputs, one bucket after the other."""
    longest_path: int
    """Tokens from the start of a prompt to the end of its longest path."""

    @classmethod
    def from_forest(
        cls, forest: Forest, device: torch.device, bucket_cost: int | None = None
    ) -> "ForestLayout":
        """Lay out `forest`; the work is proportional to the tokens of all paths.

        Args:
            forest: Of trees to be trained on.
            device: Of the model.
            bucket_cost: In query-key pairs; by default `BUCKET_COST`.
        """
        paths: list[Int64[np.ndarray, " _"]] = []
        for start, length, parent in zip(
            forest.segment_start, forest.segment_length, forest.segment_parent, strict=True
        ):
            own = np.arange(start, start + length)
            paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
        num_keys = np.array([len(path) for path in paths])

        buckets: list[Bucket] = []
        output_index = np.zeros(len(forest.token_ids), dtype=np.int64)
        num_rows = 0
        for members in _group_by_shape(
            forest.segment_length, num_keys, BUCKET_COST if bucket_cost is None else bucket_cost
        ):
            lengths = forest.segment_length[members]
            bucket = _make_bucket([paths[member] for member in members], lengths, device)
            width = bucket.query_index.shape[1]
            for row, member in enumerate(members):
                own = paths[member][num_keys[member] - forest.segment_length[member] :]
                output_index[own] = num_rows + row * width + np.arange(len(own))
            num_rows += len(members) * width
            buckets.append(bucket)
        return cls(
            buckets=tuple(buckets),
            output_index=torch.from_numpy(output_index).to(device),
            longest_path=int(num_keys.max()),
        )


def _group_by_shape(
    num_queries: Int64[np.ndarray, " segments"],
    num_keys: Int64[np.ndarray, " segments"],
    bucket_cost: int,
) -> list[Int64[np.ndarray, " _"]]:
    """Split segments, in order of their key counts, where that makes the padded total least.

    The total is the sum over buckets of members x widest query x longest key + `bucket_cost`.
    """
    shapes, shape_of, counts = np.unique(
        np.stack([num_keys, num_queries], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    keys, queries = shapes.T
    least = np.zeros(len(shapes) + 1)
    first = np.zeros(len(shapes) + 1, dtype=np.int64)
    for end in range(1, len(shapes) + 1):
        widest = np.maximum.accumulate(queries[:end][::-1])[::-1]
        members = np.cumsum(counts[:end][::-1])[::-1]
        total = least[:end] + members * widest * keys[end - 1] + bucket_cost
        first[end] = total.argmin()
        least[end] = total.min()
    ends = [len(shapes)]
    while ends[-1]:
        ends.append(int(first[ends[-1]]))
    shape_of = shape_of.reshape(-1)
    return [
        np.flatnonzero((start <= shape_of) & (shape_of < end))
        for start, end in pairwise(reversed(ends))
    ]


def _make_bucket(
    paths: list[Int64[np.ndarray, " _"]],
    lengths: Int64[np.ndarray, " members"],
    device: torch.device,
) -> Bucket:
    """Pad the paths of some segments, whose last `lengths` tokens are their own, into one batch."""
    query_index = np.zeros((len(paths), lengths.max()), dtype=np.int64)
    key_index = np.zeros((len(paths), max(len(path) for path in paths)), dtype=np.int64)
    for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        query_index[row, :length] = path[len(path) - length :]
        key_index[row, : len(path)] = path
    context = np.array([len(path) for path in paths]) - lengths
    if (context == context[0]).all():
        context = context[:1]
    limit = context[:, None, None, None] + np.arange(query_index.shape[1])[:, None]
    return Bucket(
        query_index=torch.from_numpy(query_index).to(device),
        key_index=torch.from_numpy(key_index).to(device),
        mask=torch.from_numpy(np.arange(key_index.shape[1]) <= limit).to(device),
    )


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

    Grouped queries are folded into the query axis, so keys are gathered once for each key head
    and a masked batch still fits the fused kernels.

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
    if len(layout.output_index) != num_tokens:
        raise ValueError(
            f"the layout is for {len(layout.output_index)} tokens, the input has {num_tokens}"
        )
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = [_attend_bucket(bucket, query, key, value, scaling) for bucket in layout.buckets]
    return torch.cat(outputs).index_select(0, layout.output_index)[None], None


def _attend_bucket(
    bucket: Bucket,
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "tokens kv_heads dim"],
    value: Float[Tensor, "tokens kv_heads value_dim"],
    scaling: float | None,
) -> Float[Tensor, "rows heads value_dim"]:
    """Padded outputs of one bucket, segment after segment."""
    (num_segments, width), num_kv_heads = bucket.query_index.shape, key.shape[1]
    num_groups = query.shape[1] // num_kv_heads
    # index_select, not [...]: its backward pass adds rows in parallel.
    queries = query.index_select(0, bucket.query_index.flatten())
    queries = queries.view(num_segments, width, num_kv_heads, num_groups, -1)
    keys, values = (
        states.index_select(0, bucket.key_index.flatten())
        .view(*bucket.key_index.shape, num_kv_heads, -1)
        .transpose(1, 2)
        for states in (key, value)
    )
    output = scaled_dot_product_attention(
        queries.permute(0, 2, 3, 1, 4).reshape(num_segments, num_kv_heads, num_groups * width, -1),
        keys,
        values,
        attn_mask=bucket.mask.repeat(1, 1, num_groups, 1),
        scale=scaling,
    )
    output = output.reshape(num_segments, num_kv_heads, num_groups, width, -1)
    return output.permute(0, 3, 1, 2, 4).reshape(num_segments * width, query.shape[1], -1)


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
