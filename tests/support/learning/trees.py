"""Hand-built trees and hypothesis strategies for the tests of `treerpo_ray.algo`."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from treerpo_ray.algo.groups import PruneRule, Pruning
from treerpo_ray.algo.packing import Forest
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree


def by_range(threshold: float) -> Pruning:
    """The paper's pruning."""
    return Pruning(rule=PruneRule.RANGE, threshold=threshold)


def make_tree(
    parents: Sequence[int],
    lengths: Sequence[int] | None = None,
    prompt_length: int = 3,
    first_token: int = 0,
) -> Tree:
    """A tree whose token ids count up from `first_token`, prompt first, so each is unique.

    The behaviour log-prob of token t is -t / 1024, which float32 holds exactly.
    """
    lengths = [2] * len(parents) if lengths is None else lengths
    next_token = first_token + prompt_length
    steps = []
    for parent, length in zip(parents, lengths, strict=True):
        ids = np.arange(next_token, next_token + length, dtype=np.int32)
        steps.append(make_step(parent, ids))
        next_token += length
    prompt_ids = np.arange(first_token, first_token + prompt_length, dtype=np.int32)
    return Tree.from_steps(prompt_ids, tuple(steps))


def make_step(parent: int, token_ids: np.ndarray) -> Step:
    """A step of version 0 whose log-probs follow from its token ids."""
    return Step(
        parent=parent,
        token_ids=token_ids,
        logprobs=(-token_ids / 1024).astype(np.float32),
        versions=np.zeros(len(token_ids), np.int32),
        stop=StopReason.BOUNDARY,
    )


def full_tree(
    branching: int, depth: int, step_length: int, prompt_length: int = 3, first_token: int = 0
) -> Tree:
    """Every step above `depth` has `branching` children, all steps `step_length` tokens."""
    parents: list[int] = []
    level = [ROOT]
    for _ in range(depth):
        start = len(parents)
        parents += [parent for parent in level for _ in range(branching)]
        level = list(range(start, len(parents)))
    return make_tree(parents, [step_length] * len(parents), prompt_length, first_token)


def on_leaves(tree: Tree, rewards: Sequence[float]) -> np.ndarray:
    """Rewards over steps: those given for the leaves, in order, and NaN elsewhere."""
    array = np.full(len(tree.steps), np.nan)
    array[list(tree.leaves)] = rewards
    return array


@st.composite
def trees(draw: st.DrawFn, max_groups: int = 6, max_children: int = 4) -> Tree:
    """Trees of any shape, chains and single children included, expanded in any order."""
    parents = [ROOT] * draw(st.integers(1, max_children))
    open_steps = list(range(len(parents)))
    for _ in range(draw(st.integers(0, max_groups - 1))):
        parent = open_steps.pop(draw(st.integers(0, len(open_steps) - 1)))
        num_children = draw(st.integers(1, max_children))
        open_steps += range(len(parents), len(parents) + num_children)
        parents += [parent] * num_children
    lengths = [draw(st.integers(1, 5)) for _ in parents]
    return make_tree(parents, lengths, prompt_length=draw(st.integers(1, 4)))


def rewards(tree: Tree, *, with_errors: bool = False) -> st.SearchStrategy[np.ndarray]:
    """Rewards in [0, 1] of all leaves, many of them exactly 0 or 1; NaN for errored ones."""
    reward = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    if with_errors:
        reward |= st.just(float("nan"))
    num_leaves = len(tree.leaves)
    return st.lists(reward, min_size=num_leaves, max_size=num_leaves).map(
        lambda drawn: on_leaves(tree, drawn)
    )


def shuffled(tree: Tree, ranks: Sequence[float]) -> tuple[Tree, list[int]]:
    """The same tree with the siblings of each group sorted by `ranks` (one a step).

    Also returns, for each step of the new tree, its index in the old one.
    """
    order: list[int] = []
    expand = [ROOT]
    while expand:
        children = sorted(tree.children.get(expand.pop(0), ()), key=lambda i: ranks[i])
        order += children
        expand += children
    new = {old: index for index, old in enumerate(order)} | {ROOT: ROOT}
    steps = tuple(
        make_step(new[tree.steps[old].parent], tree.steps[old].token_ids) for old in order
    )
    return Tree.from_steps(tree.prompt_ids, steps), order


def segment_context(forest: Forest, segment: int) -> list[int]:
    """Positions of a segment's ancestors and its own, from the prompt down."""
    own = range(
        forest.segment_start[segment], (forest.segment_start + forest.segment_length)[segment]
    )
    parent = int(forest.segment_parent[segment])
    return [*(segment_context(forest, parent) if parent >= 0 else []), *own]


def edge_contexts(forest: Forest) -> list[list[int]]:
    """For each edge the token ids that its prediction may see, the source's the last."""
    contexts = []
    for source in forest.source:
        segment = int(np.searchsorted(forest.segment_start, source, side="right")) - 1
        positions = segment_context(forest, segment)
        seen = positions[: positions.index(source) + 1]
        contexts.append(forest.token_ids[seen].tolist())
    return contexts
