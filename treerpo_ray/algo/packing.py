"""Packing: kept steps of many trees into forests that one forward pass takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from treerpo_ray.algo.tree import ROOT, Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """Trees laid out in one row of tokens, each segment once.

    A segment is a prompt (depth 0) or a step (depth >= 1). Segments stand level by level: all
    of depth 0, then all of depth 1, and so on; a segment's tokens are contiguous, and its keys
    are the tokens of its ancestor segments and its own up to the querying token.

    The loss runs over edges: edge e says that the hidden state at position `source[e]` predicts
    `target[e]`. The first token of a step is predicted from the last position of its parent,
    which so has as many edges as it has trained children.
    """

    token_ids: Int64[np.ndarray, " tokens"]
    position_ids: Int64[np.ndarray, " tokens"]
    """Distance from the start of the prompt along the segment's own path."""
    segment_start: Int64[np.ndarray, " segments"]
    segment_length: Int64[np.ndarray, " segments"]
    segment_parent: Int64[np.ndarray, " segments"]
    """Index of the parent segment; -1 for a prompt."""
    segment_depth: Int64[np.ndarray, " segments"]
    source: Int64[np.ndarray, " edges"]
    target: Int64[np.ndarray, " edges"]
    advantage: Float32[np.ndarray, " edges"]
    behaviour_logprob: Float32[np.ndarray, " edges"]
    step: Int32[np.ndarray, " edges"]
    """Number of the trained step that an edge belongs to, 0 .. num_steps - 1 in this forest."""

    @property
    def num_steps(self) -> int:
        """Trained steps in this forest."""
        return int(self.step.max()) + 1 if len(self.step) else 0


@dataclass(frozen=True, slots=True)
class _Part:
    """Steps of one tree that go into one forest."""

    tree: Tree
    advantages: dict[int, float]
    """Laid-out steps, parents first; NaN marks a step that is context only."""
    num_tokens: int
    """Tokens of the prompt and of these steps."""


class _Segment(NamedTuple):
    """A prompt or step that is laid out; its fields are those of `Forest` and `Step`."""

    token_ids: Int32[np.ndarray, " tokens"]
    logprobs: Float32[np.ndarray, " tokens"]
    parent: int
    depth: int
    advantage: float


def pack(
    trees: Sequence[Tree],
    advantages: Sequence[Float[np.ndarray, " _"]],
    token_budget: int,
) -> list[Forest]:
    """Lays the trained steps of all trees out in forests of at most `token_budget` tokens.

    Only trained steps, their ancestors and their prompts cost tokens. A tree that fits stays
    whole; a larger one is split in depth-first order, and each part repeats the ancestors that
    it needs as context. Every trained step is lossed in exactly one forest, all its tokens
    together. Forests are filled first-fit-decreasing; the result depends on the inputs alone.

    Args:
        trees: The trees.
        advantages: For each tree the advantage of each step; NaN where it is not trained.
        token_budget: Most tokens a forest may have.

    Raises:
        ValueError: If one path from prompt to step exceeds the budget, or a prompt or a step
            that is to be laid out has no tokens.
    """
    parts = [
        part
        for tree, tree_advantages in zip(trees, advantages, strict=True)
        for part in _split(tree, tree_advantages, token_budget)
    ]
    bins: list[list[_Part]] = []
    free: list[int] = []
    for part in sorted(parts, key=lambda part: -part.num_tokens):
        index = next((i for i, room in enumerate(free) if part.num_tokens <= room), len(bins))
        if index == len(bins):
            bins.append([])
            free.append(token_budget)
        bins[index].append(part)
        free[index] -= part.num_tokens
    return [_lay_out(_level_order(parts)) for parts in bins]


def _split(
    tree: Tree, advantages: Float[np.ndarray, " steps"], token_budget: int
) -> Iterator[_Part]:
    """Greedy parts of one tree: the next trained step joins if its missing ancestors fit too."""
    if len(advantages) != len(tree.steps):
        raise ValueError(f"{len(advantages)} advantages given for {len(tree.steps)} steps")
    lengths = {ROOT: len(tree.prompt_ids)}
    lengths |= {index: len(step.token_ids) for index, step in enumerate(tree.steps)}
    steps: dict[int, float] = {}
    num_tokens = lengths[ROOT]
    for index in _depth_first(tree):
        advantage = float(advantages[index])
        if np.isnan(advantage):
            continue
        path = tree.path(index)
        if 0 in (lengths[i] for i in (ROOT, *path)):
            raise ValueError(f"the prompt or one of the steps {path} is empty: nothing predicts it")
        num_new_tokens = sum(lengths[i] for i in path if i not in steps)
        if steps and num_tokens + num_new_tokens > token_budget:
            yield _Part(tree, steps, num_tokens)
            steps, num_tokens = {}, lengths[ROOT]
            num_new_tokens = sum(lengths[i] for i in path)
        if num_tokens + num_new_tokens > token_budget:
            raise ValueError(
                f"one path of {num_tokens + num_new_tokens} tokens is above the token budget of "
                f"{token_budget} a forest: raise the budget, or shorten prompts or answers"
            )
        for ancestor in path:
            steps.setdefault(ancestor, np.nan)
        steps[index] = advantage
        num_tokens += num_new_tokens
    if steps:
        yield _Part(tree, steps, num_tokens)


def _depth_first(tree: Tree) -> Iterator[int]:
    """Steps of the tree, each before its children, siblings in sampling order."""
    stack = list(reversed(tree.children.get(ROOT, ())))
    while stack:
        index = stack.pop()
        yield index
        stack.extend(reversed(tree.children.get(index, ())))


def _level_order(parts: list[_Part]) -> list[_Segment]:
    """Segments of all parts, shallow ones first, with `parent` counted in this order."""
    segments: list[_Segment] = []
    for part in parts:
        tree = part.tree
        row = {ROOT: len(segments)}
        segments.append(_Segment(tree.prompt_ids, np.empty(0, np.float32), -1, 0, np.nan))
        for index, advantage in part.advantages.items():
            step = tree.steps[index]
            depth = tree.depths[index]
            row[index] = len(segments)
            segments.append(
                _Segment(step.token_ids, step.logprobs, row[step.parent], depth, advantage)
            )
    order = sorted(range(len(segments)), key=lambda i: segments[i].depth)
    rank = {old: new for new, old in enumerate(order)} | {-1: -1}
    return [segments[i]._replace(parent=rank[segments[i].parent]) for i in order]


def _lay_out(segments: list[_Segment]) -> Forest:
    """The segments in one row of tokens, and an edge for each token of the trained ones."""
    token_ids = np.concatenate([s.token_ids for s in segments], dtype=np.int64)
    length = np.array([len(s.token_ids) for s in segments], np.int64)
    parent = np.array([s.parent for s in segments], np.int64)
    depth = np.array([s.depth for s in segments], np.int64)
    start = length.cumsum() - length
    offset = np.zeros_like(start)
    for level in range(1, segments[-1].depth + 1):
        below = np.flatnonzero(depth == level)
        offset[below] = offset[parent[below]] + length[parent[below]]

    advantage = np.array([s.advantage for s in segments], np.float32)
    trained = np.flatnonzero(~np.isnan(advantage))
    count = length[trained]
    predicted = _ranges(start[trained], count)
    source = predicted - 1
    source[count.cumsum() - count] = (start + length - 1)[parent[trained]]
    return Forest(
        token_ids=token_ids,
        position_ids=_ranges(offset, length),
        segment_start=start,
        segment_length=length,
        segment_parent=parent,
        segment_depth=depth,
        source=source,
        target=token_ids[predicted],
        advantage=advantage[trained].repeat(count),
        behaviour_logprob=np.concatenate([segments[i].logprobs for i in trained]),
        step=np.arange(len(trained), dtype=np.int32).repeat(count),
    )


def _ranges(
    start: Int64[np.ndarray, " ranges"], length: Int64[np.ndarray, " ranges"]
) -> Int64[np.ndarray, " total"]:
    """start[0], start[0] + 1, ... (length[0] of them), then start[1], start[1] + 1, ..."""
    return np.repeat(start - (length.cumsum() - length), length) + np.arange(length.sum())
