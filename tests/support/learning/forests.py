"""Ragged random trees, laid out by hand as a Forest and as the rows that it must equal."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.learning.tiny_models import VOCAB_SIZE
from treerpo_ray.algo.packing import Forest


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A prompt or step of a test tree; `edges` holds (advantage, behaviour) of trained tokens."""

    tokens: list[int]
    parent: int
    depth: int
    edges: list[tuple[float, float]]


TestTree = list[Segment]


def random_tree(rng: np.random.Generator, *, num_children: int, max_depth: int) -> TestTree:
    """A tree with steps of 1 to 6 tokens, some of which are leaves early or are not trained."""
    tree = [_random_segment(rng, -1, 0, int(rng.integers(1, 12)), is_trained=False)]
    for parent in range(10_000):
        if parent == len(tree):
            break
        depth = tree[parent].depth + 1
        if depth > max_depth or (depth > 1 and rng.random() < 0.25):
            continue
        for _ in range(int(rng.integers(2, num_children + 1))):
            length = int(rng.integers(1, 7))
            tree.append(_random_segment(rng, parent, depth, length, is_trained=rng.random() < 0.8))
    return tree


def uniform_tree(
    rng: np.random.Generator, *, prompt: int, step: int, num_children: int, depth: int
) -> TestTree:
    """A full tree in which every step has `step` tokens and is trained."""
    tree = [_random_segment(rng, -1, 0, prompt, is_trained=False)]
    for parent in range(sum(num_children**level for level in range(depth))):
        for _ in range(num_children):
            level = tree[parent].depth + 1
            tree.append(_random_segment(rng, parent, level, step, is_trained=True))
    return tree


def _random_segment(
    rng: np.random.Generator, parent: int, depth: int, length: int, *, is_trained: bool
) -> Segment:
    edges = zip(rng.normal(size=length), rng.uniform(-4, -1, length), strict=True)
    return Segment(
        tokens=rng.integers(0, VOCAB_SIZE, length).tolist(),
        parent=parent,
        depth=depth,
        edges=list(edges) if is_trained else [],
    )


def lay_out(trees: list[TestTree]) -> Forest:
    """The trees in level order; edges in the order of `trained`."""
    order = _level_order(trees)
    rank = {place: index for index, place in enumerate(order)} | {
        (number, -1): -1 for number in range(len(trees))
    }
    segments = [trees[number][index] for number, index in order]
    length = np.array([len(segment.tokens) for segment in segments])
    start = np.cumsum(length) - length
    parent = np.array([rank[number, trees[number][index].parent] for number, index in order])
    offset = np.zeros_like(start)
    source, target, edges, steps = [], [], [], []
    num_steps = 0
    first_step = np.cumsum([0, *(len(tree) for tree in trees)])
    for row, segment in enumerate(segments):
        if segment.parent >= 0:
            offset[row] = offset[parent[row]] + length[parent[row]]
        if segment.edges:
            before = start[parent[row]] + length[parent[row]] - 1
            source += [before, *range(start[row], start[row] + length[row] - 1)]
            target += segment.tokens
            edges += segment.edges
            steps += [num_steps] * len(segment.tokens)
            num_steps += 1
    return Forest(
        token_ids=np.concatenate([segment.tokens for segment in segments], dtype=np.int32),
        position_ids=np.concatenate(
            [o + np.arange(n) for o, n in zip(offset, length, strict=True)], dtype=np.int32
        ),
        segment_start=start,
        segment_length=length,
        segment_parent=parent,
        segment_depth=np.array([segment.depth for segment in segments]),
        source=np.array(source, dtype=np.int32),
        target=np.array(target, dtype=np.int32),
        advantage=np.array([advantage for advantage, _ in edges], dtype=np.float32),
        behaviour_logprob=np.array([behaviour for _, behaviour in edges], dtype=np.float32),
        step=np.array(steps, dtype=np.int32),
        origin=np.array([first_step[n] + i for n, i in order if trees[n][i].edges]),
    )


def trained(trees: list[TestTree]) -> list[tuple[list[int], Segment]]:
    """Context tokens and segment of each trained step, in the forest's order of edges."""
    found = []
    for number, index in _level_order(trees):
        segment = trees[number][index]
        if segment.edges:
            context: list[int] = []
            ancestor = segment.parent
            while ancestor >= 0:
                context = trees[number][ancestor].tokens + context
                ancestor = trees[number][ancestor].parent
            found.append((context, segment))
    return found


def row_logits(model: PreTrainedModel, trees: list[TestTree]) -> Tensor:
    """The model's own logits, [edges, vocabulary], from one plain row for each trained step."""
    rows = []
    for context, segment in trained(trees):
        row = torch.tensor([context + segment.tokens])
        logits = model(input_ids=row, use_cache=False).logits[0]
        rows.append(logits[len(context) - 1 : -1])
    return torch.cat(rows)


def _level_order(trees: list[TestTree]) -> list[tuple[int, int]]:
    places = [(number, index) for number, tree in enumerate(trees) for index in range(len(tree))]
    return sorted(places, key=lambda place: trees[place[0]][place[1]].depth)
