"""Benchmarks: each part against something real, side by side in one run; ratios are what counts.

python jobs/bench.py                    # all of them, about five minutes on two cores
python jobs/bench.py packing learner    # some
Prints a table, and as the last line JSON.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

import numpy as np
import pyarrow as pa
import rich.console
import rich.table
import torch
from torch.nn.utils.rnn import pad_sequence

from treerpo_ray.algo.advantages import AdvantageForm, step_advantages
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import PruneRule, step_groups
from treerpo_ray.algo.packing import Forest, pack
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.standard_errors import standard_error_of_mean
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.config import Config, load
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.records import TreeRecord, from_table
from treerpo_ray.tree_stream import from_worker_batch, to_worker_batch
from treerpo_ray.verifier.verdict import Answer, Verdict

ROUNDS = 5
"""Times that the two sides of a comparison take turns."""
NUM_TREES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: medians over the rounds."""

    name: str
    ours: str
    other: str
    ours_s: float
    other_s: float
    ratio: float
    """Median over the rounds of other / ours: how many times faster ours is."""
    low: float
    high: float
    """Smallest and largest ratio of a round."""


def compared(
    name: str, ours: tuple[str, Callable[[], float]], other: tuple[str, Callable[[], float]]
) -> Row:
    """Run both sides in turns; each returns its cost in seconds for the same work."""
    for _, side in (ours, other):
        side()  # warm-up
    times = [(ours[1](), other[1]()) for _ in range(ROUNDS)]
    ratios = sorted(theirs / mine for mine, theirs in times)
    return Row(
        name=name,
        ours=ours[0],
        other=other[0],
        ours_s=statistics.median(mine for mine, _ in times),
        other_s=statistics.median(theirs for _, theirs in times),
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of `work`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Learner -----------------------------------------------------------------------------------


def random_tree(shape: TreeShape, num_prompt: int, rng: np.random.Generator) -> Tree:
    """A full tree of random bytes."""

    def step(parent: int, depth: int) -> Step:
        count = shape.step_tokens[depth]
        return Step(
            parent=parent,
            token_ids=rng.integers(10, 200, count).astype(np.int32),
            logprobs=np.full(count, -5, np.float32),
            versions=np.zeros(count, np.int32),
            stop=StopReason.BOUNDARY,
        )

    steps: list[Step] = []
    level = [ROOT]
    for depth, num_children in enumerate(shape.num_children):
        first = len(steps)
        steps += [step(parent, depth) for parent in level for _ in range(num_children)]
        level = list(range(first, len(steps)))
    prompt = rng.integers(10, 200, num_prompt).astype(np.int32)
    return Tree.from_steps(prompt, tuple(steps))


def bench_learner(config: Config) -> list[Row]:
    """Forward and backward over the same trained steps: packed forest against a row a step."""
    from transformers import AutoModelForCausalLM

    from treerpo_ray.learner.policy import ForestTensors, load_policy

    torch.set_num_threads(config.learner.cpu_threads)
    rng = np.random.default_rng(0)
    policy = load_policy(
        config.model.path,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    plain = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="sdpa")

    def packed(trees: list[Tree], advantages: list[np.ndarray]) -> None:
        policy.model.zero_grad()
        for forest in pack(trees, advantages, config.learner.token_budget):
            tensors = ForestTensors.from_forest(forest, torch.device("cpu"))
            logprobs, _ = policy.edge_logprobs(tensors, 1.0)
            (-(logprobs * tensors.advantage).sum()).backward()

    def rows(trees: list[Tree], advantages: list[np.ndarray]) -> None:
        plain.zero_grad()
        paths = [
            (torch.tensor([*t.prompt_ids.tolist(), *t.path_token_ids(i)]), len(s.token_ids), a[i])
            for t, a in zip(trees, advantages, strict=True)
            for i, s in enumerate(t.steps)
        ]
        paths.sort(key=lambda path: len(path[0]))
        size = max(1, config.learner.token_budget // len(paths[-1][0]))
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            ids = pad_sequence([path for path, _, _ in batch], batch_first=True)
            mask = pad_sequence([torch.ones_like(path) for path, _, _ in batch], batch_first=True)
            logits = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            loss = logprobs.new_zeros(())
            for row, (path, count, advantage) in zip(logprobs, batch, strict=True):
                loss = loss - advantage * row[len(path) - 1 - count : len(path) - 1].sum()
            loss.backward()

    found = []
    for name, num_children, step_tokens in (
        ("quickstart trees, 4x4 of 23 tokens", (4, 4), (23, 23)),
        ("4x4x4 of 23 tokens", (4, 4, 4), (23, 23, 23)),
    ):
        shape = TreeShape(num_children=num_children, step_tokens=step_tokens)
        trees = [random_tree(shape, 24, rng) for _ in range(4)]
        advantages = [rng.normal(size=len(tree.steps)) for tree in trees]
        found.append(
            compared(
                f"learner: {name}",
                ("packed forest", partial(seconds, partial(packed, trees, advantages))),
                ("one row a step", partial(seconds, partial(rows, trees, advantages))),
            )
        )
    return found


# From batch to forests -----------------------------------------------------------------------


def bench_packing(_: Config) -> list[Row]:
    """CPU time from the Arrow batch of a learner step to its packed forests, statistics included.

    The other side goes row by row through Python lists, group by group and step by step.

    Raises:
        AssertionError: the forests of the two sides differ in any number.
    """
    table, learner = packing_batch(), LearnerConfig()
    ours = batch_to_forests(table, learner)
    plain = plain_forests(table, learner)
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
                partial(cpu_seconds, partial(plain_forests, table, learner)),
            ),
        )
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of `work`, freeing its result aside."""
    start = time.process_time()
    result = work()
    end = time.process_time()
    del result
    return end - start


def packing_batch() -> pa.Table:
    """The batch of one worker: trees whose answers are right or wrong at random."""
    rng = np.random.default_rng(0)
    shape = TreeShape(num_children=(8, 8, 8), step_tokens=(384, 384, 384))
    records = []
    for ticket in range(NUM_TREES):
        tree = random_tree(shape, 100, rng)
        is_right = rng.random(len(tree.leaves)) < rng.random()
        records.append(
            TreeRecord(
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
        )
    return to_worker_batch(records)


def batch_to_forests(batch: pa.Table, learner: LearnerConfig) -> list[Forest]:
    """What the worker and its learner do with a batch before the first forward pass."""
    from treerpo_ray.learner.stats import count

    form, pruning = learner.form, learner.pruning
    records = from_table(from_worker_batch(batch))
    values = [mean_backup(record.tree, record.rewards) for record in records]
    groups = [step_groups(r.tree, own) for r, own in zip(records, values, strict=True)]
    advantages = [
        step_advantages(record.tree, own, form=form, pruning=pruning, groups=siblings)
        for record, own, siblings in zip(records, values, groups, strict=True)
    ]
    for record, own, siblings in zip(records, values, groups, strict=True):
        count(record, own, siblings, form=form, pruning=pruning)
    return pack([record.tree for record in records], advantages, learner.token_budget)


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
    token_ids = np.concatenate([segments[i][2] for i in order], dtype=np.int64)
    return Forest(
        token_ids=token_ids,
        position_ids=np.concatenate(positions),
        segment_start=np.array(start),
        segment_length=np.array(end) - np.array(start),
        segment_parent=np.array([rank[segments[i][1]] for i in order]),
        segment_depth=np.array([segments[i][0] for i in order]),
        source=np.concatenate(sources),
        target=np.concatenate([token_ids[a : a + len(own)] for a, own in numbers]),
        advantage=np.concatenate(advantages),
        behaviour_logprob=np.concatenate(logprobs),
        step=np.concatenate([own for _, own in numbers]),
        origin=np.array(origins),
    )


# Verifier ----------------------------------------------------------------------------------


def bench_verifier(config: Config) -> list[Row]:
    """Grading whole answers: killable workers against math-verify called in process."""
    from math_verify import parse, verify

    from treerpo_ray.verifier.verifier import Verifier

    texts = [(rf"so \boxed{{\frac{{{n}}}{{{n + 7}}}}}", f"{n}/{n + 7}") for n in range(1, 101)]
    answers = [Answer(text=text, references=(gold,), is_cut_off=False) for text, gold in texts]
    settings = config.verifier
    verifier = Verifier(
        check=settings.check,
        num_workers=settings.num_workers,
        timeout_s=settings.timeout_s,
        memory_mib=settings.memory_mib,
    )
    try:
        row = compared(
            "verifier: 100 fractions",
            ("killable workers", lambda: seconds(lambda: verifier.grade(answers))),
            (
                "math-verify in process",
                lambda: seconds(lambda: [verify(parse(gold), parse(text)) for text, gold in texts]),
            ),
        )
    finally:
        verifier.close()
    return [row]


# Search ------------------------------------------------------------------------------------


def bench_search(config: Config) -> list[Row]:
    """Seconds a thousand sampled tokens: tree search in an engine against plain vLLM requests."""
    return [asyncio.run(_search(config))]


async def _search(config: Config) -> Row:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    from treerpo_ray.driver.plan import load_inputs
    from treerpo_ray.engine.engine import Engine
    from treerpo_ray.engine.types import EngineSetup, Sampling

    prompts = load_inputs(config).prompts.token_ids[:NUM_TREES]
    engine = Engine(setup=EngineSetup.of(config), index=0, log_folder=None)
    await engine.start()
    shape, sampling = config.shape, Sampling(temperature=1.0)

    async def tree(number: int, prompt: list[int]) -> int:
        groups = [g async for g in engine.grow(prompt, shape, sampling, number, [])]
        return sum(len(step.token_ids) for group in groups for step in group.steps)

    async def answer(number: int, prompt: list[int]) -> int:
        params = SamplingParams(
            temperature=1.0,
            max_tokens=shape.max_answer_tokens,
            seed=number,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in engine._llm.generate(tokens_input(prompt), params, f"raw-{number}"):
            final = output
        return len(final.outputs[0].token_ids)

    async def cost(
        work: Callable[[int, list[int]], Awaitable[int]], repeats: int, first: int
    ) -> float:
        start = time.perf_counter()
        jobs = [work(first + n, p) for n, p in enumerate(prompts * repeats)]
        num_tokens = sum(await asyncio.gather(*jobs))
        return 1000 * (time.perf_counter() - start) / num_tokens

    times = []
    num_leaves = int(np.prod(shape.num_children))
    for number in range(ROUNDS + 1):
        first = 10_000 * number
        times.append((await cost(tree, 1, first), await cost(answer, num_leaves, first)))
    await engine.stop()
    times = times[1:]  # the first is the warm-up
    ratios = sorted(theirs / mine for mine, theirs in times)
    return Row(
        name=f"search: {NUM_TREES} trees of {list(shape.num_children)}, a thousand tokens",
        ours="tree search",
        other="raw vLLM, whole answers",
        ours_s=statistics.median(mine for mine, _ in times),
        other_s=statistics.median(theirs for _, theirs in times),
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
    )


BENCHES = {
    "packing": bench_packing,
    "learner": bench_learner,
    "verifier": bench_verifier,
    "search": bench_search,
}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if unknown := set(arguments) - BENCHES.keys():
        print(f"{__doc__}\nunknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    config = load([str(Path(__file__).resolve().parents[1] / "conf/quickstart.yaml")])
    rows = [row for name in arguments or BENCHES for row in BENCHES[name](config)]
    table = rich.table.Table(title=f"median of {ROUNDS} rounds, both sides in turns")
    for title in ("what", "ours", "s", "other", "s", "ours is faster by"):
        table.add_column(title, justify="right" if title in ("s",) else "left")
    for row in rows:
        faster = f"{row.ratio:.2f}x ({row.low:.2f} to {row.high:.2f})"
        table.add_row(
            row.name, row.ours, f"{row.ours_s:.3f}", row.other, f"{row.other_s:.3f}", faster
        )
    rich.console.Console().print(table)
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
