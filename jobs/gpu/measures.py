"""Measures of the first GPU run: attention kernels, exactness of packing, time and memory."""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend

from jobs.gpu.workload import (
    Sizes,
    forest_of,
)
from treerpo_ray.algo.packing import pack
from treerpo_ray.learner import tree_attention
from treerpo_ray.learner.forest_layout import ForestLayout, VarlenKernel
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.policy import ForestTensors, Policy
from treerpo_ray.preflight.machine import GIB
from treerpo_ray.records import TreeRecord

ALL_KEYS = 704
"""Keys of the attention whose gradient is NaN in cuDNN: 64 modulo 128."""
LOW = -120.0
"""Logsumexp of their scores: cuDNN's gradient needs one below -88.7."""


def masked_kernel(sizes: Sizes) -> str:
    """The kernel that torch chooses for masked attention in bfloat16."""
    shape = (1, sizes.kv_heads, 128, sizes.head_dim)
    query, key, value = (
        torch.zeros(shape, dtype=torch.bfloat16, device=sizes.device, requires_grad=True)
        for _ in range(3)
    )
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=sizes.device)
    return SDPBackend(torch._fused_sdp_choice(query, key, value, mask)).name


def attend(
    sizes: Sizes, prompt: int, step: int, score: float, kernel: VarlenKernel | None
) -> list[torch.Tensor]:
    """Gradients of a prompt and one step after it, whose scores are all `score`; without a kernel
    for all paths masks are made."""
    forest = forest_of(prompt, [step])
    layout = replace(ForestLayout.from_forest(forest, sizes.device), kernel=kernel)
    tokens, size = prompt + step, abs(score * sizes.head_dim**0.5) ** 0.5
    states = []
    for heads, sign in ((sizes.heads, np.sign(score)), (sizes.kv_heads, 1), (sizes.kv_heads, 1)):
        state = torch.zeros(1, heads, tokens, sizes.head_dim, device=sizes.device)
        state[..., 0] = sign * size
        states.append(state.to(torch.bfloat16).requires_grad_())
    query, key, value = states
    output, _ = tree_attention.tree_attention(
        torch.nn.Identity(), query, key, value, None, layout=layout
    )
    output.float().sum().backward()
    return [state.grad for state in states if state.grad is not None]


def low_scores_have_gradients(sizes: Sizes, kernel: VarlenKernel | None = None) -> bool:
    """Whether the gradient is finite that is NaN in some versions of cuDNN."""
    gradients = attend(sizes, ALL_KEYS - 64, 64, LOW - float(np.log(ALL_KEYS)), kernel)
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def seconds_a_shape(sizes: Sizes, kernel: VarlenKernel | None = None) -> float:
    """Forward and backward pass of attention over shapes that were never met."""
    rng = np.random.default_rng(time.time_ns() % 2**32)
    attend(sizes, 100, 10, 1.0, kernel)
    start = time.monotonic()
    for _ in range(sizes.new_shapes):
        attend(sizes, int(rng.integers(64, 1100)), int(rng.integers(1, 384)), 1.0, kernel)
    _wait(sizes.device)
    return round((time.monotonic() - start) / sizes.new_shapes, 4)


@torch.no_grad()
def packed_against_rows(sizes: Sizes, policy: Policy) -> tuple[float, float]:
    """Mean and largest difference (nats) of packed log-probabilities from those of plain rows."""
    prompt, steps = 96, [64, 33, 17]
    forest = forest_of(prompt, steps)
    differences = []
    with torch.autocast(sizes.device.type, torch.bfloat16):
        packed, _ = policy.edge_logprobs(ForestTensors.from_forest(forest, sizes.device), 1.0)
        start = 0
        for place, length in zip(forest.segment_start[1:], steps, strict=True):
            ids = [*forest.token_ids[:prompt], *forest.token_ids[place : place + length]]
            row = policy.sequence_logprobs([int(token) for token in ids])[prompt - 1 :]
            differences.append((packed[start : start + length] - row).abs())
            start += length
    difference = torch.cat(differences)
    return float(difference.mean()), float(difference.max())


def measured(made: Learner, records: list[TreeRecord]) -> dict[str, float]:
    """Time of an update, and the most memory of each of its parts."""
    peaks: dict[str, float] = {}

    def note(name: str, *_: object) -> None:
        if made.device.type == "cuda":
            _wait(made.device)
            peak = torch.cuda.max_memory_allocated() / GIB
            peaks[name] = max(peaks.get(name, 0.0), round(peak, 2))
            torch.cuda.reset_peak_memory_stats()

    hooks = [
        made.policy.model.base_model.register_forward_hook(partial(note, "forward_gib")),
        made.optimizer.adamw.register_step_pre_hook(partial(note, "loss_and_backward_gib")),
        made.optimizer.adamw.register_step_post_hook(partial(note, "step_gib")),
    ]
    trees = [record.tree for record in records]
    signs = [np.ones(len(tree)) for tree in trees]
    forests = pack(trees, signs, made.settings.token_budget)
    _wait(made.device)
    start = time.monotonic()
    made.update(records)
    _wait(made.device)
    seconds = time.monotonic() - start
    for hook in hooks:
        hook.remove()
    tokens = sum(len(forest.token_ids) for forest in forests)
    return {
        "s_a_forest": round(seconds / len(forests), 3),
        "tokens_per_s": round(tokens / seconds),
        **peaks,
    }


def top_kernels(made: Learner, records: list[TreeRecord]) -> dict[str, float]:
    """Seconds of the operations that take the most."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = made.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=kinds) as profiled:
        made.update(records[:1])
    key = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, key))[:8]
    return {row.key[:80]: round(getattr(row, key) / 1e6, 4) for row in rows}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
