"""Benchmarks: each part against something real, side by side in one run; ratios are what counts.

python jobs/bench.py                    # all of them, about five minutes on two cores
python jobs/bench.py learner verifier   # some
Prints a table, and as the last line JSON.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

import numpy as np
import rich.console
import rich.table
import torch
from torch.nn.utils.rnn import pad_sequence

from treerpo_ray.algo.packing import pack
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.config import Config, load

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
    return Tree(prompt_ids=prompt, steps=tuple(steps))


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


# Verifier ----------------------------------------------------------------------------------


def bench_verifier(config: Config) -> list[Row]:
    """Grading whole answers: killable workers against math-verify called in process."""
    from math_verify import parse, verify

    from treerpo_ray.verifier.verdict import Answer
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
    from treerpo_ray.engine.types import Sampling

    prompts = load_inputs(config).prompts.token_ids[:NUM_TREES]
    engine = Engine(config=config, index=0, log_folder=None)
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


BENCHES = {"learner": bench_learner, "verifier": bench_verifier, "search": bench_search}


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
