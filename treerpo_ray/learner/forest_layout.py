"""Forest layout: who attends to whom in a packed forest, and two ways to compute it.

Keys of a segment are the tokens of its path: those of its ancestors and its own. No mask over
tokens x tokens exists.

- On a CPU, and wherever the other way does not go, segments of like shape form a bucket: one padded
  batch of queries against the gathered keys of their paths.
- On a GPU in half precision one call takes them all: queries are the forest's tokens in order, a
  sequence a segment, and keys the tokens of all paths, one after the other. Nothing is padded and
  no mask is made (`VarlenKernel`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from treerpo_ray.algo.packing import Forest

BUCKET_COST = {"cpu": 2**14, "cuda": 2**20}
"""Cost of one more bucket in query-key pairs: the calls it adds against the padding it saves. On a
GPU calls cost the most."""


class Varlen(Protocol):
    """Attention over sequences of any lengths, as `torch.nn.attention.varlen.varlen_attn` does it.

    With a window of (-1, 0) query i of n attends to the first m - n + i + 1 of its m keys.
    """

    def __call__(
        self,
        query: Float[Tensor, "queries heads dim"],
        key: Float[Tensor, "keys kv_heads dim"],
        value: Float[Tensor, "keys kv_heads dim"],
        cu_seq_q: Int32[Tensor, " sequences+1"],
        cu_seq_k: Int32[Tensor, " sequences+1"],
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Float[Tensor, "queries heads dim"]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenKernel:
    """What computes all paths in one call, and where it can be used."""

    attend: Varlen
    takes: Callable[[Tensor, Tensor], bool]
    """Whether it takes queries and values of that type, device and width."""


def _takes_flash(query: Tensor, value: Tensor) -> bool:
    """What FlashAttention takes; the keys of MLA are wider than its values."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
    )


FLASH = VarlenKernel(attend=cast(Varlen, varlen_attn), takes=_takes_flash)


@dataclass(frozen=True, kw_only=True)
class ForestLayout:
    """Who attends to whom in a packed forest, on the model's device.

    What one of the two ways needs is made when it is used first.
    """

    paths: tuple[Int64[np.ndarray, " _"], ...]
    """Tokens of each segment's path, its own last."""
    lengths: Int64[np.ndarray, " segments"]
    """Tokens of each segment; segments stand one after the other."""
    longest_path: int
    """Tokens from the start of a prompt to the end of its longest path."""
    device: torch.device
    bucket_cost: int
    """Of one more bucket, in query-key pairs."""
    kernel: VarlenKernel | None
    """None: buckets compute all."""

    @classmethod
    def from_forest(
        cls, forest: Forest, device: torch.device, bucket_cost: int | None = None
    ) -> "ForestLayout":
        """Lay out `forest`; the work is proportional to the tokens of all paths.

        Args:
            forest: Of trees to be trained on.
            device: Of the model.
            bucket_cost: In query-key pairs; by default that of the device.
        """
        paths: list[Int64[np.ndarray, " _"]] = []
        for start, length, parent in zip(
            forest.segment_start, forest.segment_length, forest.segment_parent, strict=True
        ):
            own = np.arange(start, start + length)
            paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
        return cls(
            paths=tuple(paths),
            lengths=forest.segment_length,
            longest_path=max(map(len, paths)),
            device=device,
            bucket_cost=BUCKET_COST[device.type] if bucket_cost is None else bucket_cost,
            kernel=FLASH,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the forest."""
        return int(self.lengths.sum())

    @cached_property
    def varlen(self) -> "VarlenPaths":
        """For a call over all paths."""
        return VarlenPaths.of(self.paths, self.lengths, self.device)

    @cached_property
    def buckets(self) -> "Buckets":
        """For padded batches."""
        return Buckets.of(self.paths, self.lengths, self.device, self.bucket_cost)

    def attend(
        self,
        query: Float[Tensor, "tokens heads dim"],
        key: Float[Tensor, "tokens kv_heads dim"],
        value: Float[Tensor, "tokens kv_heads value_dim"],
        scaling: float | None,
    ) -> Float[Tensor, "tokens heads value_dim"]:
        """Attend along each segment's path; `scaling` of the scores, by default dim ** -0.5."""
        if torch.is_autocast_enabled(query.device.type):  # which changes no types for FLASH
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (states.to(dtype) for states in (query, key, value))
        if self.kernel is not None and self.kernel.takes(query, value):
            return self.varlen.attend(self.kernel.attend, query, key, value, scaling)
        return self.buckets.attend(query, key, value, scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenPaths:
    """A sequence a segment: its queries are its own tokens, its keys those of its path."""

    key_index: Int64[Tensor, " keys"]
    query_ends: Int32[Tensor, " segments+1"]
    """0, and where the queries of each segment end."""
    key_ends: Int32[Tensor, " segments+1"]
    most_queries: int
    most_keys: int

    @classmethod
    def of(
        cls,
        paths: tuple[Int64[np.ndarray, " _"], ...],
        lengths: Int64[np.ndarray, " segments"],
        device: torch.device,
    ) -> "VarlenPaths":
        """Those of a layout."""
        num_keys = np.array([len(path) for path in paths])

        def ends(counts: np.ndarray) -> Int32[Tensor, " _"]:
            return torch.from_numpy(np.append(0, counts.cumsum()).astype(np.int32)).to(device)

        return cls(
            key_index=torch.from_numpy(np.concatenate(paths)).to(device),
            query_ends=ends(lengths),
            key_ends=ends(num_keys),
            most_queries=int(lengths.max()),
            most_keys=int(num_keys.max()),
        )

    def attend(
        self,
        varlen: Varlen,
        query: Float[Tensor, "tokens heads dim"],
        key: Float[Tensor, "tokens kv_heads dim"],
        value: Float[Tensor, "tokens kv_heads dim"],
        scaling: float | None,
    ) -> Float[Tensor, "tokens heads dim"]:
        """See `ForestLayout.attend`."""
        return varlen(
            query.contiguous(),
            key.index_select(0, self.key_index),
            value.index_select(0, self.key_index),
            self.query_ends,
            self.key_ends,
            self.most_queries,
            self.most_keys,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Segments of like shape as one padded batch.

    A padded query reads token 0 and its output is dropped; a padded key lies behind the causal
    limit of every real query. So neither needs a mask of its own.
    """

    num_segments: int
    num_queries: int
    """Of the longest segment."""
    num_keys: int
    """Of the longest path."""
    mask: Bool[Tensor, "#segments 1 queries keys"]
    """Causal limit; shared where all contexts in the bucket are equally long."""

    def attend(
        self,
        query: Float[Tensor, "rows heads dim"],
        key: Float[Tensor, "columns kv_heads dim"],
        value: Float[Tensor, "columns kv_heads value_dim"],
        scaling: float | None,
    ) -> Float[Tensor, "rows heads value_dim"]:
        """Padded outputs, segment after segment.

        Grouped queries are folded into the query axis, so that keys are gathered once for each key
        head and a masked batch still fits the fused kernels.
        """
        num_kv_heads = key.shape[1]
        num_groups = query.shape[1] // num_kv_heads
        sizes = self.num_segments, self.num_queries, num_kv_heads, num_groups
        queries = query.view(*sizes, -1).permute(0, 2, 3, 1, 4)
        keys, values = (
            states.view(self.num_segments, self.num_keys, num_kv_heads, -1).transpose(1, 2)
            for states in (key, value)
        )
        output = scaled_dot_product_attention(
            queries.reshape(self.num_segments, num_kv_heads, num_groups * self.num_queries, -1),
            keys,
            values,
            attn_mask=self.mask.repeat(1, 1, num_groups, 1),
            scale=scaling,
        )
        output = output.reshape(self.num_segments, num_kv_heads, num_groups, self.num_queries, -1)
        return output.permute(0, 3, 1, 2, 4).reshape(len(query), query.shape[1], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """All segments of a forest in padded batches, gathered at once."""

    members: tuple[Bucket, ...]
    query_index: Int64[Tensor, " queries"]
    """Of all buckets, one after the other, as those below."""
    key_index: Int64[Tensor, " keys"]
    output_index: Int64[Tensor, " tokens"]
    """Row of each token in the buckets' padded outputs."""

    @classmethod
    def of(
        cls,
        paths: tuple[Int64[np.ndarray, " _"], ...],
        lengths: Int64[np.ndarray, " segments"],
        device: torch.device,
        cost: int,
    ) -> "Buckets":
        """Those of a layout; `cost` of one more in query-key pairs."""
        num_keys = np.array([len(path) for path in paths])
        output_index = np.zeros(int(lengths.sum()), dtype=np.int64)
        made, queries, keys = [], [], []
        num_rows = 0
        for members in _group_by_shape(lengths, num_keys, cost):
            own_paths = [paths[member] for member in members]
            query_index, key_index = _padded(own_paths, lengths[members])
            width, longest = query_index.shape[1], key_index.shape[1]
            context = num_keys[members] - lengths[members]
            made.append(_make_bucket(width, longest, context, device))
            for row, (path, length) in enumerate(zip(own_paths, lengths[members], strict=True)):
                own = path[len(path) - length :]
                output_index[own] = num_rows + row * width + np.arange(length)
            num_rows += query_index.size
            queries.append(query_index.ravel())
            keys.append(key_index.ravel())

        def tensor(parts: list[np.ndarray]) -> Int64[Tensor, " _"]:
            return torch.from_numpy(np.concatenate(parts)).to(device)

        return cls(
            members=tuple(made),
            query_index=tensor(queries),
            key_index=tensor(keys),
            output_index=tensor([output_index]),
        )

    def attend(
        self,
        query: Float[Tensor, "tokens heads dim"],
        key: Float[Tensor, "tokens kv_heads dim"],
        value: Float[Tensor, "tokens kv_heads value_dim"],
        scaling: float | None,
    ) -> Float[Tensor, "tokens heads value_dim"]:
        """See `ForestLayout.attend`.

        Tokens are gathered for all buckets at once, so that the backward pass adds their gradients
        up once; index_select, not [...]: its backward pass adds rows in parallel.
        """
        rows = [bucket.num_segments * bucket.num_queries for bucket in self.members]
        columns = [bucket.num_segments * bucket.num_keys for bucket in self.members]
        queries = query.index_select(0, self.query_index).split(rows)
        keys, values = (
            states.index_select(0, self.key_index).split(columns) for states in (key, value)
        )
        outputs = [
            bucket.attend(q, k, v, scaling)
            for bucket, q, k, v in zip(self.members, queries, keys, values, strict=True)
        ]
        return torch.cat(outputs).index_select(0, self.output_index)


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


def _padded(
    paths: list[Int64[np.ndarray, " _"]], lengths: Int64[np.ndarray, " members"]
) -> tuple[Int64[np.ndarray, "members queries"], Int64[np.ndarray, "members keys"]]:
    """Own tokens and paths of some segments, whose last `lengths` tokens are their own."""
    query_index = np.zeros((len(paths), lengths.max()), dtype=np.int64)
    key_index = np.zeros((len(paths), max(len(path) for path in paths)), dtype=np.int64)
    for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        query_index[row, :length] = path[len(path) - length :]
        key_index[row, : len(path)] = path
    return query_index, key_index


def _make_bucket(
    num_queries: int,
    num_keys: int,
    context: Int64[np.ndarray, " members"],
    device: torch.device,
) -> Bucket:
    """A bucket of segments that have `context` tokens before them."""
    num_segments = len(context)
    if (context == context[0]).all():
        context = context[:1]
    limit = context[:, None, None, None] + np.arange(num_queries)[:, None]
    return Bucket(
        num_segments=num_segments,
        num_queries=num_queries,
        num_keys=num_keys,
        mask=torch.from_numpy(np.arange(num_keys) <= limit).to(device),
    )
