"""Tree records for tests, and what they are compared by."""

import itertools
import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from tests.support.learning.trees import make_step, make_tree, trees
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.records import Training, TreeRecord
from treerpo_ray.verifier.verdict import Grade, Verdict

FINITE = st.floats(0, 1e6)
TEXT = st.text(max_size=5)


PARTS = (0.25, 0.1, 1 / 3, 1e-9)
"""Rewards of the answers with partial credit, in turn."""


def make_record(tree: Tree, verdicts: tuple[Verdict, ...]) -> TreeRecord:
    """A record of ticket 5 with this tree; partial credit is that of PARTS."""
    parts = itertools.cycle(PARTS)
    rewards = [
        next(parts) if v is Verdict.PARTIAL else v.reward if v.is_reward else math.nan
        for v in verdicts
    ]
    record = TreeRecord(
        ticket=5,
        attempt=1,
        prompt_id="train-5",
        question="1+1=?",
        answers=("2", "two"),
        seed=2**63 - 1,
        engine=0,
        grow_s=0.25,
        finished_at_s=1.7e9 + 0.125,
        tree=tree,
        leaf_texts=tuple(f"leaf {leaf}" for leaf in tree.leaves),
        verdicts=(),
    )
    return record.graded(list(map(Grade, verdicts, rewards)))


@st.composite
def records(draw: st.DrawFn) -> TreeRecord:
    """Any record."""
    tree = draw(trees())
    steps = []
    for index, step in enumerate(tree.steps):
        if index in tree.leaves and draw(st.booleans()):
            steps.append(empty_step(step.parent))
        else:
            size = len(step.token_ids)
            versions = draw(st.lists(st.integers(0, 2**31 - 1), min_size=size, max_size=size))
            stop = draw(st.sampled_from([StopReason.BOUNDARY, StopReason.END_OF_TEXT]))
            steps.append(
                replace(
                    step,
                    versions=np.array(versions, np.int32),
                    stop=stop,
                    num_discarded=draw(st.integers(0, 9)),
                )
            )
    tree = Tree.from_steps(tree.prompt_ids, tuple(steps))
    size = len(tree.leaves)
    verdicts = draw(st.lists(st.sampled_from(list(Verdict)), min_size=size, max_size=size))
    return replace(
        make_record(tree, tuple(verdicts)),
        ticket=draw(st.integers(0, 2**62)),
        question=draw(TEXT),
        answers=tuple(draw(st.lists(TEXT, max_size=2))),
        seed=draw(st.integers(0, 2**63 - 1)),
        grow_s=draw(FINITE),
        scored_at_s=draw(FINITE),
        training=draw(st.none() | st.just(some_training(tree))),
        leaf_texts=tuple(draw(st.lists(TEXT, min_size=size, max_size=size))),
    )


def some_training(tree: Tree) -> Training:
    """Every second step was trained on: its advantage is its index, and the learner's
    log-probability of a token the engine's less 1/4."""
    steps = np.arange(len(tree), dtype=np.float64)
    advantages = np.where(steps % 2, steps, np.nan)
    is_trained = ~np.isnan(advantages).repeat(tree.lengths)
    logprobs = np.where(is_trained, tree.logprobs - np.float32(0.25), np.float32(np.nan))
    return Training(advantages=advantages, logprobs=logprobs)


def empty_step(parent: int) -> Step:
    """A step that a sampler turned down."""
    return replace(make_step(parent, np.empty(0, np.int32)), stop=StopReason.ERROR)


def plain(record: TreeRecord) -> tuple[object, ...]:
    """Everything of a record, dtypes included, in a form that can be compared."""
    apart = ("tree", "leaf_rewards", "training")
    scalars = [getattr(record, name) for name in TreeRecord.__slots__ if name not in apart]
    scalars.append(np.array(record.leaf_rewards).tobytes())  # NaN is not equal to itself
    arrays = [record.tree.prompt_ids]
    if record.training is not None:
        arrays += [record.training.advantages, record.training.logprobs]
    for step in record.tree.steps:
        arrays += [step.token_ids, step.logprobs, step.versions]
    stops = [
        (step.parent, step.stop, type(step.stop), step.num_discarded) for step in record.tree.steps
    ]
    return *scalars, stops, [(array.dtype, array.tobytes()) for array in arrays]


def tree_of(ticket: int, *versions: int) -> TreeRecord:
    """An unscored tree with one step of each version."""
    tree = make_tree([ROOT] * len(versions))
    steps = tuple(
        replace(step, versions=np.full(len(step.token_ids), version, np.int32))
        for step, version in zip(tree.steps, versions, strict=True)
    )
    tree = Tree.from_steps(tree.prompt_ids, steps)
    return replace(make_record(tree, ()), ticket=ticket, leaf_texts=())
