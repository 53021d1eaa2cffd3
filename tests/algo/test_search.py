"""The search asks for each step once, waits for no level, and gives the same tree again."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_ray.algo.search import (
    Path,
    SiblingGroup,
    TreeShape,
    assemble,
    grow,
    step_seed,
)
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree

PROMPT = [100, 101]
SEED = 7
SHAPE = TreeShape(num_children=(2, 2, 2), step_tokens=(3, 4, 5), delimiters=(9,))
INNER = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
"""Parents of the step groups of a full tree of SHAPE."""


@dataclass(frozen=True)
class Call:
    prefix: tuple[int, ...]
    max_tokens: int
    delimiters: tuple[int, ...]
    seed: int


@dataclass
class Script:
    """A sampler whose step at a path has the path's last child number as its only token."""

    shape: TreeShape = SHAPE
    stops: dict[Path, StopReason] = field(default_factory=dict)
    """Why steps end; at a boundary if not given."""
    gates: dict[Path, asyncio.Event] = field(default_factory=dict)
    """Steps that are finished only when their event is set."""
    dead: frozenset[Path] = frozenset()
    """Steps at which the engine dies."""
    calls: dict[Path, Call] = field(default_factory=dict)
    finished: list[Path] = field(default_factory=list)
    cancelled: set[Path] = field(default_factory=set)

    async def sample(
        self, prefix: list[int], *, max_tokens: int, delimiters: tuple[int, ...], seed: int
    ) -> Step:
        path = self.path_of(tuple(prefix[len(PROMPT) :]), seed)
        assert path not in self.calls, "a step is asked for once"
        self.calls[path] = Call(tuple(prefix), max_tokens, delimiters, seed)
        try:
            await (self.gates[path].wait() if path in self.gates else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled.add(path)
            raise
        if path in self.dead:
            raise ConnectionError(f"engine died at {path}")
        self.finished.append(path)
        return scripted_step(path, self.stops.get(path, StopReason.BOUNDARY))

    def path_of(self, parent: Path, seed: int) -> Path:
        numbers = range(self.shape.num_children[len(parent)])
        return next((*parent, n) for n in numbers if step_seed(SEED, (*parent, n)) == seed)


def scripted_step(path: Path, stop: StopReason = StopReason.BOUNDARY) -> Step:
    tokens = 0 if stop is StopReason.ERROR else 1
    return Step(
        parent=ROOT,
        token_ids=np.full(tokens, path[-1], np.int32),
        logprobs=np.full(tokens, -0.5, np.float32),
        versions=np.zeros(tokens, np.int32),
        stop=stop,
    )


def search(script: Script, held: list[SiblingGroup] | None = None) -> AsyncIterator[SiblingGroup]:
    return grow(PROMPT, script.shape, script, seed=SEED, held=held or [])


def grown(script: Script, held: list[SiblingGroup] | None = None) -> list[SiblingGroup]:
    async def collect() -> list[SiblingGroup]:
        return [group async for group in search(script, held)]

    return asyncio.run(collect())


async def settle() -> None:
    """Let everything run that waits for nothing but its turn."""
    for _ in range(100):
        await asyncio.sleep(0)


def plain(tree: Tree) -> list[tuple[int, list[int], StopReason]]:
    return [(step.parent, step.token_ids.tolist(), step.stop) for step in tree.steps]


def is_parents_first(groups: list[SiblingGroup]) -> bool:
    seen = [group.parent for group in groups]
    return all(not path or path[:-1] in seen[:index] for index, path in enumerate(seen))


def test_a_full_tree_asks_for_exactly_its_steps_with_their_prefixes_limits_and_seeds() -> None:
    script = Script()
    groups = grown(script)
    assert script.calls == {
        (*parent, number): Call(
            prefix=(*PROMPT, *parent),
            max_tokens=(3, 4, 5)[len(parent)],
            delimiters=() if len(parent) == 2 else (9,),
            seed=step_seed(SEED, (*parent, number)),
        )
        for parent in INNER
        for number in (0, 1)
    }
    assert sorted(group.parent for group in groups) == sorted(INNER)
    assert is_parents_first(groups)


def test_the_children_of_a_group_stand_in_the_order_of_their_numbers_however_they_finish() -> None:
    async def scenario() -> list[SiblingGroup]:
        shape = TreeShape(num_children=(3,), step_tokens=(1,))
        script = Script(shape, gates={(n,): asyncio.Event() for n in range(3)})
        task = asyncio.create_task(anext(search(script)))
        for number in (2, 0, 1):
            await settle()
            assert not task.done()
            script.gates[(number,)].set()
        group = await task
        assert script.finished == [(2,), (0,), (1,)]
        return [group]

    [group] = asyncio.run(scenario())
    assert [step.token_ids.tolist() for step in group.steps] == [[0], [1], [2]]


def test_a_fast_child_is_expanded_while_its_sibling_still_runs_and_its_groups_wait() -> None:
    async def scenario() -> list[Path]:
        script = Script(gates={(1,): asyncio.Event()})
        groups = search(script)
        first = asyncio.create_task(anext(groups))
        await settle()
        below = {path for path in script.calls if path[0] == 0}
        assert below == {(0,)} | {(0, *rest) for rest in [(0,), (1,)]} | {
            (0, a, b) for a in (0, 1) for b in (0, 1)
        }
        assert len(script.finished) == 7
        assert not first.done(), "no group comes before its parent's"
        script.gates[(1,)].set()
        return [(await first).parent] + [group.parent async for group in groups]

    order = asyncio.run(scenario())
    assert sorted(order) == sorted(INNER)
    assert order.index((0,)) < order.index((0, 0))
    assert order[0] == ()


def test_a_group_is_yielded_while_another_branch_still_runs() -> None:
    async def scenario() -> None:
        script = Script(gates={(1, 0): asyncio.Event()})
        groups = search(script)
        early = {(await anext(groups)).parent for _ in range(5)}
        assert early == {(), (0,), (0, 0), (0, 1), (1, 1)} - {(1, 1)} | {(0, 0)} or len(early) == 4

    async def first_groups() -> tuple[set[Path], list[Path]]:
        script = Script(gates={(1, 0): asyncio.Event()})
        groups = search(script)
        early = {(await anext(groups)).parent for _ in range(4)}
        script.gates[(1, 0)].set()
        return early, [group.parent async for group in groups]

    early, late = asyncio.run(first_groups())
    assert early == {(), (0,), (0, 0), (0, 1)}
    assert sorted(late) == [(1,), (1, 0), (1, 1)]
