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

    Forests of a whole batch are held at once: to save memory, arrays over tokens and edges have
    four bytes an entry.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    position_ids: Int32[np.ndarray, " tokens"]
    """Distance from the start of the prompt along the segment's own path."""
    segment_start: Int64[np.ndarray, " segments"]
    segment_length: Int64[np.ndarray, " segments"]
    segment_parent: Int64[np.ndarray, " segments"]
    """Index of the parent segment; -1 for a prompt."""
    segment_depth: Int64[np.ndarray, " segments"]
    source: Int32[np.ndarray, " edges"]
    target: Int32[np.ndarray, " edges"]
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
class _Segments:
    """Prompts and steps that are laid out, and where their tokens are found."""

    parent: Int64[np.ndarray, " segments"]
    """Place of the parent among these; -1 of a prompt."""
    depth: Int64[np.ndarray, " segments"]
    length: Int64[np.ndarray, " segments"]
    offset: Int64[np.ndarray, " segments"]
    """Tokens of the path before the segment."""
    origin: Int64[np.ndarray, " segments"]
    """2 p for the prompt of part p and 2 p + 1 for its steps."""
    place: Int64[np.ndarray, " segments"]
    """First token in the arrays of the origin."""
    index: Int64[np.ndarray, " segments"]
    """Of a step that of `Forest.origin`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The prompt and some steps of one tree, which go into one forest."""

    tree: Tree
    columns: Int64[np.ndarray, "7 segments"]
    """Those of `_Segments`, as if this were the only part; the prompt first, then steps, parents
    before their children."""
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
    ramp = np.arange(token_budget, dtype=np.int32)
    return [_lay_out(parts, ramp) for parts in bins]


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
    ends = _part_ends(num_path, total, token_budget)
    firsts = np.append(0, ends[:-1])
    is_new[firsts] = paths[firsts] != ROOT  # each part begins with a whole path
    steps, num_own = paths[is_new], is_new.sum(1)
    is_context = steps != trained.repeat(num_own)
    own = np.where(is_context, np.nan, advantages[steps]).astype(np.float32)
    num_steps = num_own.cumsum()[ends - 1]  # of all parts so far
    prompts = np.append(0, num_steps[:-1])  # before which of the steps
    cuts = num_steps + np.arange(1, len(ends) + 1)
    columns = _columns(tree, first_step, np.insert(steps, prompts, ROOT), cuts)
    own = np.insert(own, prompts, np.nan)
    num_tokens = num_path[firsts] + total[ends - 1] - total[firsts]
    for begin, end, number in zip([0, *cuts], cuts, num_tokens.tolist(), strict=False):
        yield _Part(
            tree=tree,
            columns=columns[:, begin:end],
            advantages=own[begin:end],
            num_tokens=number,
        )


def _part_ends(
    num_path: Int64[np.ndarray, " trained"], total: Int64[np.ndarray, " trained"], budget: int
) -> Int64[np.ndarray, " parts"]:
    """Behind which trained steps the parts of a tree end.

    Args:
        num_path: Tokens from the start of the prompt to the end of each step.
        total: Tokens of all steps on the paths to this one and to those before it.
        budget: Most tokens of a part.
    """
    ends = [0]
    while (first := ends[-1]) < len(total):
        room = budget - num_path[first] + total[first]
        ends.append(int(total.searchsorted(room, side="right")))
    return np.array(ends[1:])


def _columns(
    tree: Tree,
    first_step: int,
    segments: Int64[np.ndarray, " segments"],
    ends: Int64[np.ndarray, " parts"],
) -> Int64[np.ndarray, "7 segments"]:
    """`_Part.columns` of all parts of a tree, one after the other.

    Args:
        tree: The tree.
        first_step: Steps of the trees before it.
        segments: Of each part ROOT for the prompt, then steps.
        ends: Of each part.
    """
    sizes = np.diff(ends, prepend=0)
    part = np.arange(len(ends)).repeat(sizes)
    row = np.arange(len(segments)) - (ends - sizes).repeat(sizes)
    rows = np.empty((len(ends), len(tree) + 1), np.int64)  # ROOT = -1 is the last
    rows[part, segments] = row
    is_step = segments != ROOT
    num_prompt = len(tree.prompt_ids)
    length = tree.lengths[segments]
    parent = np.where(is_step, rows[part, tree.parents[segments]], -1)
    offset = tree.path_lengths[segments] - length + num_prompt
    return np.stack(
        [
            parent,
            np.where(is_step, tree.depth_array[segments], 0),
            np.where(is_step, length, num_prompt),
            np.where(is_step, offset, 0),
            is_step,
            np.where(is_step, tree.starts[segments], 0),
            first_step + segments,
        ]
    )


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


def _lay_out(parts: list[_Part], ramp: Int32[np.ndarray, " budget"]) -> Forest:
    """Segments of all parts in one row of tokens, an edge for each token of the trained ones.

    Args:
        parts: Of trees.
        ramp: 0, 1, 2 ..., as many as the forest may have tokens.
    """
    segments, advantage = _level_order(parts)
    length, parent, place = segments.length, segments.parent, segments.place
    end = length.cumsum()
    start = end - length
    trained = (~np.isnan(advantage)).nonzero()[0]
    count = length[trained]
    first, begin, stop = place[trained], start[trained], end[trained]
    whole = _runs(segments.origin, (place, place + length))
    texts = [text for part in parts for text in (part.tree.prompt_ids, part.tree.token_ids)]
    token_ids = np.concatenate([texts[own][a:b] for own, a, b in whole])
    runs = _runs(segments.origin[trained], (first, first + count), (begin, stop))
    logprobs = [own for part in parts for own in (_NOTHING, part.tree.logprobs)]
    source = np.concatenate([ramp[a - 1 : b - 1] for *_, a, b in runs])
    source[count.cumsum() - count] = (end - 1)[parent[trained]]
    position_ids = (segments.offset - start).astype(np.int32).repeat(length)
    position_ids += ramp[: len(position_ids)]
    return Forest(
        token_ids=token_ids,
        position_ids=position_ids,
        segment_start=start,
        segment_length=length,
        segment_parent=parent,
        segment_depth=segments.depth,
        source=source,
        target=np.concatenate([token_ids[a:b] for *_, a, b in runs]),
        advantage=advantage[trained].repeat(count),
        behaviour_logprob=np.concatenate([logprobs[own][a:b] for own, a, b, *_ in runs]),
        step=ramp[: len(trained)].repeat(count),
        origin=segments.index[trained],
    )


def _runs(
    origin: Int64[np.ndarray, " segments"],
    *spans: tuple[Int64[np.ndarray, " segments"], Int64[np.ndarray, " segments"]],
) -> list[tuple[int, ...]]:
    """Origin, and start and end in each span, of segments that stand one after the other in all:
    they are copied in one go, whole levels where a tree is laid out whole."""
    is_first = np.ones(len(origin), bool)
    is_first[1:] = origin[1:] != origin[:-1]
    for start, end in spans:
        is_first[1:] |= start[1:] != end[:-1]
    first = is_first.nonzero()[0]
    last = np.empty_like(first)
    last[:-1], last[-1] = first[1:] - 1, len(origin) - 1
    bounds = [part for start, end in spans for part in (start[first], end[last])]
    return list(zip(origin[first].tolist(), *(part.tolist() for part in bounds), strict=True))


def _level_order(parts: list[_Part]) -> tuple[_Segments, Float32[np.ndarray, " segments"]]:
    """Segments of all parts, shallow ones first, with `parent` counted in this order, and their
    advantages."""
    columns = np.concatenate([part.columns for part in parts], axis=1)
    advantage = np.concatenate([part.advantages for part in parts])
    parent, depth, *_, origin, _, _ = columns
    begin = 0
    for number, part in enumerate(parts):
        end = begin + len(part.advantages)
        parent[begin + 1 : end] += begin
        origin[begin:end] += 2 * number
        begin = end
    order = depth.argsort(kind="stable")
    rank = np.empty(len(order) + 1, np.int64)
    rank[order], rank[-1] = np.arange(len(order)), -1
    parent[:] = rank[parent]
    ordered = zip(_Segments.__slots__, columns[:, order], strict=True)
    return _Segments(**dict(ordered)), advantage[order]
