"""Packing: from the Arrow batch of a learner step to its forests, arrays against lists."""

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import numpy as np
import pyarrow as pa
import torch

from jobs.benches.random_trees import random_tree, scored_record
from jobs.benches.sides import NUM_TREES, Row, compared, cpu_seconds
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.algo.groups import PruneRule
from treerpo_ray.algo.packing import Forest
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.standard_errors import standard_error_of_mean
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.config import Config
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.learner.learner import Learner
from treerpo_ray.records import from_table
from treerpo_ray.tree_stream import from_worker_batch, to_worker_batch
from treerpo_ray.verifier.verdict import Verdict

PAPER_TREES, PAPER_STEP_TOKENS = 128, 147
"""A batch of the paper's recipe (128 trees of 8, 8 and 8 children), with the mean length of a step
at which it samples 11 M tokens."""
MOST_BATCHES = 3
"""Memory that a batch may take on its way to forests, itself counted, in multiples of its bytes."""


def bench_packing(config: Config) -> list[Row]:
    """CPU time from the Arrow batch of a learner step to its packed forests, statistics included.

    The other side goes row by row through Python lists, group by group and step by step.

    Raises:
        AssertionError: the forests of the two sides differ in any number.
    """
    table, learner = packing_batch(), packing_learner(config)
    ours = batch_to_forests(table, learner)
    plain = plain_forests(table, learner.settings)
    assert len(ours) == len(plain)
    for mine, theirs in zip(ours, plain, strict=True):
        for field in fields(Forest):
            np.testing.assert_array_equal(getattr(mine, field.name), getattr(theirs, field.name))
    return [
        compared(
            f"packing: {NUM_TREES} trees of [8, 8, 8], steps of 384 tokens (CPU time)",
            ("arrays", partial(cpu_seconds, partial(batch_to_forests, table, learner))),
            (
                "rows as lists",
                partial(cpu_seconds, partial(plain_forests, table, learner.settings)),
            ),
        )
    ]


def bench_records(config: Config) -> list[Row]:
    """The same of a batch of the paper's size on one worker: time, and memory at its peak.

    128 trees of answers of 441 tokens are the 11 M sampled tokens of a step with the base model.
    What is trained of them decides how much forests hold: here three of four tokens.
    """
    table, learner = packing_batch(PAPER_TREES, PAPER_STEP_TOKENS), packing_learner(config)
    work = partial(batch_to_forests, table, learner)
    name = (
        f"records: {PAPER_TREES} trees, {PAPER_TREES * 584 * PAPER_STEP_TOKENS / 1e6:.0f} M tokens"
    )
    lists = partial(plain_forests, table, learner.settings)
    return [
        compared(
            f"{name}, Arrow to forests (CPU time)",
            ("arrays", partial(cpu_seconds, work)),
            ("rows as lists", partial(cpu_seconds, lists)),
            rounds=2,  # lists take long
        ),
        compared(
            f"{name}, peak memory with the batch counted",
            ("batch, arrays", lambda: table.nbytes / 2**30 + peak_gib(work)),
            (f"limit: {MOST_BATCHES} batches", lambda: MOST_BATCHES * table.nbytes / 2**30),
            unit="GiB",
            rounds=1,  # it is the same each time
        ),
    ]


def peak_gib(work: Callable[[], object]) -> float:
    """Most memory that Python and NumPy hold more than before while `work` is done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 2**30
    finally:
        tracemalloc.stop()


def packing_batch(num_trees: int = NUM_TREES, step_tokens: int = 384) -> pa.Table:
    """The batch of one worker: trees whose answers are right or wrong at random."""
    rng = np.random.default_rng(0)
    shape = TreeShape(num_children=(8, 8, 8), step_tokens=(step_tokens,) * 3)
    records = []
    for ticket in range(num_trees):
        tree = random_tree(shape, 100, rng)
        is_right = rng.random(len(tree.leaves)) < rng.random()
        records.append(scored_record(ticket, tree, is_right.tolist()))
    return to_worker_batch(records)


def packing_learner(config: Config) -> Learner:
    """One of the default settings; its model has nothing to do."""
    return Learner(
        model=config.model,
        learner=LearnerConfig(),
        loss=config.loss,
        tree=config.tree,
        gate=config.gate,
        max_tokens=config.max_model_tokens,
        device=torch.device("cpu"),
    )


def batch_to_forests(batch: pa.Table, learner: Learner) -> list[Forest]:
    """What the worker and its learner do with a batch before the first forward pass."""
    records = from_table(from_worker_batch(batch))
    [forests] = learner.prepare(records)[0].minibatches
    return list(forests)


def plain_forests(batch: pa.Table, learner: LearnerConfig) -> list[Forest]:
    """The same forests with nothing stacked: a list a column, a loop over groups, a step at a time.

    It does what records and statistics of lists do, also where nobody reads the result: versions
    are split by step, an answer's length is that of its list of tokens. Of the statistics it makes
    the standard errors of groups and these lengths. It knows the paper's form and rule.
    """
    assert learner.advantage is AdvantageForm.BERNOULLI
    assert learner.pruning.rule is PruneRule.RANGE
    trees: list[PlainTree] = []
    first_step = 0
    for row in from_worker_batch(batch).to_pylist():
        trees.append(PlainTree.of(row, first_step, learner.prune_threshold))
        first_step += len(row["parent"])
    parts = [part for tree in trees for part in tree.parts(learner.token_budget)]
    bins: list[list[tuple[PlainTree, dict[int, float]]]] = []
    free: list[int] = []
    for tree, steps, num_tokens in sorted(parts, key=lambda part: -part[2]):
        index = next((i for i, room in enumerate(free) if num_tokens <= room), len(bins))
        if index == len(bins):
            bins.append([])
            free.append(learner.token_budget)
        bins[index].append((tree, steps))
        free[index] -= num_tokens
    return [plain_forest(own) for own in bins]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTree:
    """A tree as lists of steps, with the advantage of each trained step."""

    prompt: np.ndarray
    parents: list[int]
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    children: dict[int, list[int]]
    advantages: dict[int, float]
    first_step: int

    @classmethod
    def of(cls, row: dict, first_step: int, threshold: float) -> Self:
        ends = np.cumsum(row["length"])
        tokens = np.split(np.asarray(row["token_ids"], np.int32), ends)[:-1]
        logprobs = np.split(np.asarray(row["logprobs"], np.float32), ends)[:-1]
        np.split(np.asarray(row["versions"], np.int32), ends)
        children: dict[int, list[int]] = {}
        for step, parent in enumerate(row["parent"]):
            children.setdefault(parent, []).append(step)
        verdicts = [Verdict(verdict) for verdict in row["verdict"]]
        values = {leaf: verdict.reward for leaf, verdict in zip(row["leaf"], verdicts, strict=True)}
        errors = dict.fromkeys(row["leaf"], 0.0)
        advantages: dict[int, float] = {}
        sums = dict.fromkeys(("value_se", "signal", "noise"), 0.0)
        for parent in sorted(children, reverse=True):
            own = np.array([values[child] for child in children[parent]])
            values[parent] = mean = float(own.mean())
            own_errors = np.array([errors[child] for child in children[parent]])
            errors[parent] = float(standard_error_of_mean(own))
            free = 1 - 1 / len(own)
            sums["value_se"] += errors[parent]
            sums["signal"] += float(((own - mean) ** 2).sum())
            sums["noise"] += float((free * (free * own_errors**2 + errors[parent] ** 2)).sum())
            if own.max() - own.min() > threshold:
                scaled = ((own - mean) / (mean * (1 - mean))).tolist()
                advantages |= zip(children[parent], scaled, strict=True)
        tree = cls(
            prompt=np.asarray(row["prompt_ids"], np.int32),
            parents=row["parent"],
            tokens=tokens,
            logprobs=logprobs,
            children=children,
            advantages=advantages,
            first_step=first_step,
        )
        for leaf in row["leaf"]:  # the answers, for their lengths
            len([int(token) for step in tree.path(leaf) for token in tokens[step]])
        return tree

    def path(self, step: int) -> list[int]:
        path = []
        while step != ROOT:
            path.append(step)
            step = self.parents[step]
        return path[::-1]

    def parts(self, budget: int) -> Iterator[tuple[Self, dict[int, float], int]]:
        """Steps with their advantages (NaN: context) and the number of tokens, forest by forest."""
        steps: dict[int, float] = {}
        size = len(self.prompt)
        stack = self.children[ROOT][::-1]
        while stack:
            step = stack.pop()
            stack += self.children.get(step, [])[::-1]
            if step not in self.advantages:
                continue
            path = self.path(step)
            new = sum(len(self.tokens[i]) for i in path if i not in steps)
            if steps and size + new > budget:
                yield self, steps, size
                steps, size = {}, len(self.prompt)
                new = sum(len(self.tokens[i]) for i in path)
            for above in path:
                steps.setdefault(above, np.nan)
            steps[step] = self.advantages[step]
            size += new
        if steps:
            yield self, steps, size


def plain_forest(parts: list[tuple[PlainTree, dict[int, float]]]) -> Forest:
    """Lay segments out one after the other, level by level."""
    segments: list[tuple[int, int, np.ndarray, np.ndarray, float, int]] = []
    for tree, steps in parts:
        row = {ROOT: len(segments)}
        segments.append((0, -1, tree.prompt, np.empty(0, np.float32), np.nan, -1))
        for step, advantage in steps.items():
            row[step], parent = len(segments), row[tree.parents[step]]
            depth = segments[parent][0] + 1
            own = tree.tokens[step], tree.logprobs[step], advantage, tree.first_step + step
            segments.append((depth, parent, *own))
    order = sorted(range(len(segments)), key=lambda i: segments[i][0])
    rank = {old: new for new, old in enumerate(order)} | {-1: -1}
    start: list[int] = []
    end: list[int] = []
    offset: list[int] = []
    positions, sources, advantages, logprobs, numbers, origins = [], [], [], [], [], []
    size = num_trained = 0
    for i in order:
        _, parent, tokens, own_logprobs, advantage, origin = segments[i]
        count = len(tokens)
        above = rank[parent]
        start.append(size)
        size += count
        end.append(size)
        offset.append(0 if above < 0 else offset[above] + end[above] - start[above])
        positions.append(np.arange(offset[-1], offset[-1] + count))
        if not np.isnan(advantage):
            sources.append(np.append(end[above] - 1, np.arange(start[-1], size - 1)))
            advantages.append(np.full(count, advantage, np.float32))
            logprobs.append(own_logprobs)
            numbers.append((start[-1], np.full(count, num_trained, np.int32)))
            origins.append(origin)
            num_trained += 1
    token_ids = np.concatenate([segments[i][2] for i in order])
    return Forest(
        token_ids=token_ids,
        position_ids=np.concatenate(positions, dtype=np.int32),
        segment_start=np.array(start),
        segment_length=np.array(end) - np.array(start),
        segment_parent=np.array([rank[segments[i][1]] for i in order]),
        segment_depth=np.array([segments[i][0] for i in order]),
        source=np.concatenate(sources, dtype=np.int32),
        target=np.concatenate([token_ids[a : a + len(own)] for a, own in numbers]),
        advantage=np.concatenate(advantages),
        behaviour_logprob=np.concatenate(logprobs),
        step=np.concatenate([own for _, own in numbers]),
        origin=np.array(origins),
    )
