"""Random trees: full ones of any shape, for benches and for the first run on a GPU."""

from collections.abc import Sequence

import numpy as np

from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Verdict


def random_tree(
    shape: TreeShape,
    num_prompt: int,
    rng: np.random.Generator,
    *,
    tokens: range = range(10, 200),
    logprob: float = -5.0,
) -> Tree:
    """A full tree of random `tokens`, each of which the engine gave the same log-probability."""

    def ids(count: int) -> np.ndarray:
        return rng.integers(tokens.start, tokens.stop, count).astype(np.int32)

    def step(parent: int, depth: int) -> Step:
        count = shape.step_tokens[depth]
        return Step(
            parent=parent,
            token_ids=ids(count),
            logprobs=np.full(count, logprob, np.float32),
            versions=np.zeros(count, np.int32),
            stop=StopReason.BOUNDARY,
        )

    steps: list[Step] = []
    level = [ROOT]
    for depth, num_children in enumerate(shape.num_children):
        first = len(steps)
        steps += [step(parent, depth) for parent in level for _ in range(num_children)]
        level = list(range(first, len(steps)))
    return Tree.from_steps(ids(num_prompt), tuple(steps))


def scored_record(ticket: int, tree: Tree, is_right: Sequence[bool]) -> TreeRecord:
    """A tree as it comes to the learner; `is_right` has one entry a leaf."""
    return TreeRecord(
        ticket=ticket,
        attempt=0,
        prompt_id=str(ticket),
        question="?",
        answers=("1",),
        seed=ticket,
        engine=0,
        grow_s=1.0,
        finished_at_s=1.0,
        tree=tree,
        leaf_texts=("the answer is 1",) * len(tree.leaves),
        verdicts=tuple(Verdict.CORRECT if own else Verdict.WRONG for own in is_right),
    )
