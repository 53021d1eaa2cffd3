"""Rollout: the search on an engine against vLLM alone, and the grading of answers."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import numpy as np

from jobs.benches.sides import NUM_TREES, ROUNDS, Row, compared, seconds
from treerpo_ray.config import Config
from treerpo_ray.verifier.verdict import Answer


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


def bench_search(config: Config) -> list[Row]:
    """Seconds a thousand sampled tokens: tree search in an engine against plain vLLM requests."""
    return [asyncio.run(_search(config))]


async def _search(config: Config) -> Row:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    from treerpo_ray.engine.engine import Engine
    from treerpo_ray.engine.types import EngineSetup, Sampling
    from treerpo_ray.preflight.inputs import load_inputs

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
        ours_cost=statistics.median(mine for mine, _ in times),
        other_cost=statistics.median(theirs for _, theirs in times),
        unit="s",
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
    )
