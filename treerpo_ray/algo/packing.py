"""Packing: kept steps of many trees into forests that one forward pass takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    origin: Int64[np.ndarray, " trained"]
    """Of each trained step its index among the steps of all packed trees, tree after tree."""

    @property
    def num_steps(self) -> int:
        """Trained steps in this forest."""
        return len(self.origin)


_NOTHING = np.empty(0, np.float32)
"""Log-probabilities of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The prompt and some steps of one tree, which go into one forest."""

    tree: Tree
    first_step: int
    """Steps of the trees before it."""
    segments: Int64[np.ndarray, " segments"]
    """ROOT for the prompt, then steps, parents first."""
    advantages: Float32[np.ndarray, " segments"]
    """NaN marks a segment that is context only."""
    num_tokens: int


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
    ends = np.cumsum([len(tree) for tree in trees], dtype=np.int64).tolist()
    parts = [
        part
        for tree, end, tree_advantages in zip(trees, ends, advantages, strict=True)
        for part in _split(tree, end - len(tree), tree_advantages, token_budget)
    ]
    bins: list[list[_Part]] = []
    free = np.full(len(parts), token_budget)
    for part in sorted(parts, key=lambda part: -part.num_tokens):
        index = int((free >= part.num_tokens).argmax())  # no more bins than parts
        if index == len(bins):
            bins.append([])
        bins[index].append(part)
        free[index] -= part.num_tokens
    return [_lay_out(parts) for parts in bins]


def unpack(
    trees: Sequence[Tree],
    forests: Sequence[Forest],
    values: Sequence[Float32[np.ndarray, " _"]],
) -> list[Float32[np.ndarray, " _"]]:
    """What the edges of each forest have, by tree at the tokens that they predict.

    Args:
        trees: The trees that were packed, in that order.
        forests: What became of them.
        values: A number for each edge of each forest.

    Returns:
        An entry a token of each tree; NaN where a token is not trained.
    """
    lengths = np.concatenate([tree.lengths for tree in trees]).astype(np.int64)
    starts = lengths.cumsum() - lengths
    found = np.full(int(lengths.sum()), np.nan, np.float32)
    for forest, own in zip(forests, values, strict=True):
        count = lengths[forest.origin]
        shift = starts[forest.origin] - (count.cumsum() - count)
        found[shift.repeat(count) + np.arange(len(own))] = own
    return np.split(found, np.cumsum([len(tree.token_ids) for tree in trees])[:-1])


def _split(
    tree: Tree, first_step: int, advantages: Float[np.ndarray, " steps"], token_budget: int
) -> Iterator[_Part]:
    """Greedy parts of one tree: the next trained step joins if its missing ancestors fit too."""
    if len(advantages) != len(tree):
        raise ValueError(f"{len(advantages)} advantages given for {len(tree)} steps")
    order = tree.depth_first
    trained = order[~np.isnan(advantages[order])]
    if not len(trained):
        return
    paths = tree.paths[trained]
    _check_lengths(tree, paths, token_budget)
    # Of a step's path, what the trained step before it lacks: in depth-first order that is also
    # what all before it lack.
    is_new = paths != np.roll(paths, 1, axis=0)
    is_new[0] = True
    is_new = np.logical_or.accumulate(is_new, axis=1) & (paths != ROOT)
    num_new = np.where(is_new, np.append(tree.lengths, 0)[paths], 0).sum(1)
    num_path = tree.path_lengths[trained] + len(tree.prompt_ids)
    total = num_new.cumsum()
    start = 0
    while start < len(trained):
        room = token_budget - num_path[start] + total[start]
        end = int(total.searchsorted(room, side="right"))
        own = is_new[start:end].copy()
        own[0] = paths[start] != ROOT
        steps = paths[start:end][own]
        is_context = steps != np.repeat(trained[start:end], own.sum(1))
        part = np.where(is_context, np.nan, advantages[steps])
        yield _Part(
            tree=tree,
            first_step=first_step,
            segments=np.append(ROOT, steps),
            advantages=np.append(np.nan, part).astype(np.float32),
            num_tokens=int(num_path[start] + total[end - 1] - total[start]),
        )
        start = end


def _check_lengths(tree: Tree, paths: Int64[np.ndarray, "paths depth"], token_budget: int) -> None:
    """Raise ValueError where a path has an empty part or is too long to be laid out."""
    is_empty = (np.append(tree.lengths, 1)[paths] == 0).any(1)
    if not len(tree.prompt_ids):
        is_empty[:] = True
    if is_empty.any():
        path = tuple(step for step in paths[is_empty.argmax()].tolist() if step != ROOT)
        raise ValueError(f"the prompt or one of the steps {path} is empty: nothing predicts it")
    longest = len(tree.prompt_ids) + np.append(tree.lengths, 0)[paths].sum(1).max()
    if longest > token_budget:
        raise ValueError(
            f"one path of {longest} tokens is above the token budget of {token_budget} a forest: "
            "raise the budget, or shorten prompts or answers"
        )


def _lay_out(parts: list[_Part]) -> Forest:
    """Segments of all parts in one row of tokens, an edge for each token of the trained ones."""
    segments = _level_order(parts)
    length, parent = segments.length, segments.parent
    start = length.cumsum() - length
    is_trained = ~np.isnan(segments.advantage)
    trained = is_trained.nonzero()[0]
    count = length[trained]
    token_ids = segments.gather([(p.tree.prompt_ids, p.tree.token_ids) for p in parts], np.int64)
    predicted = is_trained.repeat(length).nonzero()[0]
    target = token_ids[predicted]
    source = predicted
    source -= 1
    source[count.cumsum() - count] = (start + length - 1)[parent[trained]]
    position_ids = (segments.offset - start).repeat(length)
    position_ids += np.arange(len(position_ids))
    return Forest(
        token_ids=token_ids,
        position_ids=position_ids,
        segment_start=start,
        segment_length=length,
        segment_parent=parent,
        segment_depth=segments.depth,
        source=source,
        target=target,
        advantage=segments.advantage[trained].repeat(count),
        behaviour_logprob=segments.take(trained).gather(
            [(_NOTHING, p.tree.logprobs) for p in parts], np.float32
        ),
        step=np.arange(len(trained), dtype=np.int32).repeat(count),
        origin=segments.index[trained],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segments:
    """Prompts and steps that are laid out, and where their tokens are found."""

    parent: Int64[np.ndarray, " segments"]
    depth: Int64[np.ndarray, " segments"]
    length: Int64[np.ndarray, " segments"]
    offset: Int64[np.ndarray, " segments"]
    """Tokens of the path before the segment."""
    advantage: Float32[np.ndarray, " segments"]
    origin: Int64[np.ndarray, " segments"]
    """2 p for the prompt of part p and 2 p + 1 for its steps."""
    place: Int64[np.ndarray, " segments"]
    """First token in the arrays of the origin."""
    index: Int64[np.ndarray, " segments"]
    """Of a step that of `Forest.origin`."""

    def take(self, index: Int64[np.ndarray, " _"]) -> "_Segments":
        """Some of the segments."""
        return _Segments(**{name: getattr(self, name)[index] for name in self.__slots__})

    def gather(self, arrays: list[tuple[np.ndarray, np.ndarray]], dtype: type) -> np.ndarray:
        """What the segments have in the arrays of each part's prompt and steps, one by one.

        Neighbours are copied in one go: whole levels where a tree is laid out whole.
        """
        flat = [array for pair in arrays for array in pair]
        end = self.place + self.length
        breaks = (self.origin[1:] != self.origin[:-1]) | (self.place[1:] != end[:-1])
        cuts = breaks.nonzero()[0]
        first, last = np.append(0, cuts + 1), np.append(cuts, len(end) - 1)
        runs = zip(
            self.origin[first].tolist(), self.place[first].tolist(), end[last].tolist(), strict=True
        )
        return np.concatenate([flat[origin][a:b] for origin, a, b in runs], dtype=dtype)


def _level_order(parts: list[_Part]) -> _Segments:
    """Segments of all parts, shallow ones first, with `parent` counted in this order."""
    columns: list[tuple[np.ndarray, ...]] = []
    num_segments = 0
    for number, part in enumerate(parts):
        tree, segments = part.tree, part.segments
        row = np.empty(len(tree) + 1, np.int64)  # ROOT = -1 is the last
        row[segments] = num_segments + np.arange(len(segments))
        own = segments[1:]
        parent, depth, length, offset, place = np.zeros((5, len(segments)), np.int64)
        parent[0], length[0] = -1, len(tree.prompt_ids)
        parent[1:], length[1:] = row[tree.parents[own]], tree.lengths[own]
        depth[1:], place[1:] = tree.depth_array[own], tree.starts[own]
        offset[1:] = tree.path_lengths[own] - tree.lengths[own] + len(tree.prompt_ids)
        origin = 2 * number + (segments != ROOT)
        index = part.first_step + segments
        columns.append((parent, depth, length, offset, part.advantages, origin, place, index))
        num_segments += len(segments)
    parent, depth, length, offset, advantage, origin, place, index = map(
        np.concatenate, zip(*columns, strict=True)
    )
    order = depth.argsort(kind="stable")
    rank = np.empty(num_segments + 1, np.int64)
    rank[order], rank[-1] = np.arange(num_segments), -1
    return _Segments(
        parent=rank[parent],
        depth=depth,
        length=length,
        offset=offset,
        advantage=advantage,
        origin=origin,
        place=place,
        index=index,
    ).take(order)
