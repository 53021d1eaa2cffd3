"""Plain varlen: what `torch.nn.attention.varlen.varlen_attn` computes on a GPU, a row at a time."""

import torch
from torch import Tensor

from treerpo_ray.learner.forest_layout import VarlenKernel


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Attention of sequences of any lengths, causal from their ends."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_q, max_k)
    assert (sum(queries), sum(keys)) == (len(query), len(key))
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        for place, own in enumerate(q):
            seen = len(k) - len(q) + place + 1
            heads = [
                (scale * k[:seen, head // groups] @ own[head]).softmax(0) @ v[:seen, head // groups]
                for head in range(query.shape[1])
            ]
            rows.append(torch.stack(heads))
    return torch.stack(rows)


PLAIN = VarlenKernel(attend=plain_varlen, takes=lambda query, value: True)
