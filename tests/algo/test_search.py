"""The search asks for each step once, waits for no level, and gives the same tree again."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.learning.trees import trees
from treerpo_ray.algo.search import (
    Path,
    SiblingGroup,
    TreeShape,
    assemble,
    cut_at_surprise,
    grow,
    sibling_groups,
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


def search(
    script: Script, held: list[SiblingGroup] | None = None
) -> AsyncGenerator[SiblingGroup, None]:
    groups = grow(PROMPT, script.shape, script, seed=SEED, held=held or [])
    assert isinstance(groups, AsyncGenerator), "a search can be closed"
    return groups


async def first_of(groups: AsyncGenerator[SiblingGroup, None]) -> SiblingGroup:
    return await anext(groups)


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
        task = asyncio.create_task(first_of(search(script)))
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
        first = asyncio.create_task(first_of(groups))
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


def test_groups_come_while_a_branch_still_runs_and_a_grandchild_group_awaits_its_parent() -> None:
    async def scenario() -> tuple[list[Path], list[Path]]:
        script = Script(gates={(1, 0): asyncio.Event()})
        groups = search(script)
        early = [(await anext(groups)).parent for _ in range(4)]
        await settle()
        assert {(1, 1, 0), (1, 1, 1)} <= set(script.finished)
        script.gates[(1, 0)].set()
        return early, [group.parent async for group in groups]

    early, late = asyncio.run(scenario())
    assert sorted(early) == [(), (0,), (0, 0), (0, 1)]
    assert late == [(1,), (1, 1), (1, 0)]


@pytest.mark.parametrize("stop", [StopReason.END_OF_TEXT, StopReason.ERROR])
def test_a_step_that_ended_or_failed_is_a_leaf(stop: StopReason) -> None:
    script = Script(stops={(0,): stop, (1, 1): stop})
    tree = assemble(PROMPT, grown(script))
    assert sorted(script.calls) == [(0,), (1,), (1, 0), (1, 0, 0), (1, 0, 1), (1, 1)]
    assert tree.leaves == (0, 3, 4, 5)
    assert [tree.steps[leaf].stop for leaf in tree.leaves[:2]] == [stop, stop]


def test_one_depth_is_grpo_as_many_answers_to_the_prompt_and_nothing_below() -> None:
    script = Script(TreeShape(num_children=(5,), step_tokens=(8,), delimiters=(9,)))
    [group] = grown(script)
    assert [call.prefix for call in script.calls.values()] == [tuple(PROMPT)] * 5
    assert {call.delimiters for call in script.calls.values()} == {()}
    assert len({call.seed for call in script.calls.values()}) == 5
    tree = assemble(PROMPT, [group])
    assert tree.leaves == (0, 1, 2, 3, 4)
    assert set(tree.depths) == {1}


def test_closing_the_search_cancels_every_request() -> None:
    async def scenario() -> Script:
        running = [(1,), (0, 1), (0, 0, 0)]
        script = Script(gates={path: asyncio.Event() for path in running})
        groups = search(script)
        waiting = asyncio.create_task(first_of(groups))
        await settle()
        script.gates[(1,)].set()
        await waiting
        await groups.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return script

    script = asyncio.run(scenario())
    assert script.cancelled == set(script.calls) - set(script.finished)
    assert {(0, 1), (0, 0, 0)} <= script.cancelled


def test_cancelling_the_task_that_waits_for_a_group_cancels_every_request() -> None:
    async def scenario() -> Script:
        script = Script(gates={(0,): asyncio.Event(), (1, 0): asyncio.Event()})
        task = asyncio.create_task(first_of(search(script)))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return script

    assert asyncio.run(scenario()).cancelled == {(0,), (1, 0)}


def test_a_dead_engine_is_raised_as_it_is_after_the_groups_that_were_whole() -> None:
    async def scenario() -> tuple[list[Path], Script]:
        script = Script(
            dead=frozenset({(0, 1)}), gates={(0, 1): asyncio.Event(), (1,): asyncio.Event()}
        )
        groups, seen = search(script), []
        script.gates[(1,)].set()
        with pytest.raises(ConnectionError, match=r"^engine died at \(0, 1\)$"):
            async for group in groups:
                seen.append(group.parent)
                if len(seen) == 4:
                    script.gates[(0, 1)].set()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return seen, script

    seen, script = asyncio.run(scenario())
    assert sorted(seen) == [(), (1,), (1, 0), (1, 1)]
    assert (0, 0, 0) in script.finished, "a group of the broken branch must not be yielded"


@pytest.mark.parametrize("num_held", range(len(INNER) + 1))
def test_a_tree_taken_up_from_held_groups_is_the_same_tree(num_held: int) -> None:
    stops = {(0, 1): StopReason.END_OF_TEXT, (1, 0, 0): StopReason.END_OF_TEXT}
    whole = grown(Script(stops=stops))
    held = whole[:num_held]
    script = Script(stops=stops)
    rest = grown(script, held)
    asked = {path[:-1] for path in script.calls}
    assert asked == {group.parent for group in rest}
    assert asked.isdisjoint(group.parent for group in held)
    assert is_parents_first([*held, *rest])
    assert plain(assemble(PROMPT, [*held, *rest])) == plain(assemble(PROMPT, whole))


@given(data=st.data(), branching=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_tree_does_not_depend_on_the_order_of_its_groups(
    data: st.DataObject, branching: list[int]
) -> None:
    shape = TreeShape(num_children=tuple(branching), step_tokens=(1,) * len(branching))
    reason = st.sampled_from(list(StopReason))
    groups: list[SiblingGroup] = []
    level: list[Path] = [()]
    while level:
        path = level.pop(0)
        if len(path) < len(branching):
            paths = [(*path, number) for number in range(branching[len(path)])]
            stops = [data.draw(reason) for _ in paths]
            steps = tuple(map(scripted_step, paths, stops))
            groups.append(SiblingGroup(parent=path, steps=steps))
            level += [p for p, s in zip(paths, stops, strict=True) if s is StopReason.BOUNDARY]
    tree = assemble(PROMPT, data.draw(st.permutations(groups)))
    assert plain(tree) == plain(assemble(PROMPT, groups))
    assert plain(tree) == plain(assemble(PROMPT, scripted_tree(shape, groups)))
    assert list(tree.depths) == sorted(tree.depths), "breadth first"
    assert len(tree.children) == len(groups)


def scripted_tree(shape: TreeShape, groups: list[SiblingGroup]) -> list[SiblingGroup]:
    """The groups that the search itself makes of the same steps."""
    stops = {
        (*group.parent, number): step.stop
        for group in groups
        for number, step in enumerate(group.steps)
    }
    return grown(Script(shape, stops=stops))


@given(trees())
def test_the_groups_of_a_tree_make_the_tree_again(tree: Tree) -> None:
    groups = sibling_groups(tree)
    assert len(groups) == len(tree.children)
    held: set[tuple[int, ...]] = set()
    for group in groups:
        assert not group.parent or group.parent in held, "parents come first"
        held |= {(*group.parent, number) for number in range(len(group.steps))}
        assert {step.parent for step in group.steps} == {ROOT}
    again = assemble(tree.prompt_ids.tolist(), reversed(groups))
    assert edges(again) == edges(tree)
    assert plain(assemble(tree.prompt_ids.tolist(), sibling_groups(again))) == plain(again)


def edges(tree: Tree) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Tokens of each step, which are unique, with those of its children in order; () is ROOT."""
    own = {ROOT: ()} | {i: tuple(step.token_ids.tolist()) for i, step in enumerate(tree.steps)}
    return {own[parent]: [own[i] for i in found] for parent, found in tree.children.items()}


def test_a_group_without_its_parents_is_refused() -> None:
    group = SiblingGroup(parent=(0,), steps=(scripted_step((0, 0)),))
    with pytest.raises(ValueError, match=r"sibling group \(0,\) hangs below a step"):
        assemble(PROMPT, [group])


def test_the_seeds_of_steps_are_distinct_reproducible_and_fit_a_signed_64_bit_number() -> None:
    paths: list[Path] = [(a,) for a in range(8)]
    paths += [(a, b) for a in range(8) for b in range(8)]
    seeds = {step_seed(tree, path) for tree in (0, 1, 2**63 - 1) for path in paths}
    assert len(seeds) == 3 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, (0,)) == 6098610408229398849


@pytest.mark.parametrize(
    ("num_children", "step_tokens", "steps", "sampled", "longest"),
    [
        ((8, 8, 8), (384, 384, 384), 584, 224_256, 1152),
        ((8,), (1152,), 8, 9_216, 1152),
        ((2, 3), (5, 7), 2 + 6, 2 * 5 + 6 * 7, 12),
    ],
)
def test_a_shape_adds_up_to_the_steps_and_tokens_of_a_full_tree(
    num_children: tuple[int, ...],
    step_tokens: tuple[int, ...],
    steps: int,
    sampled: int,
    longest: int,
) -> None:
    shape = TreeShape(num_children=num_children, step_tokens=step_tokens)
    assert (shape.max_steps, shape.max_sampled_tokens) == (steps, sampled)
    assert shape.max_answer_tokens == longest


@pytest.mark.parametrize(
    ("num_children", "step_tokens"),
    [((), ()), ((2, 2), (3,)), ((2, 0), (3, 3)), ((2,), (0,)), ((-1,), (1,))],
)
def test_an_impossible_shape_is_one_line_with_its_keys(
    num_children: tuple[int, ...], step_tokens: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"^tree\.num_children and tree\.step_tokens .*$"):
        TreeShape(num_children=num_children, step_tokens=step_tokens)


def surprising(*logprobs: float) -> Step:
    return Step(
        parent=ROOT,
        token_ids=np.arange(len(logprobs), dtype=np.int32),
        logprobs=np.array(logprobs, np.float32),
        versions=np.full(len(logprobs), 4, np.int32),
        stop=StopReason.BOUNDARY,
    )


def test_a_step_is_cut_before_its_least_likely_token_within_the_window() -> None:
    step = surprising(-9.0, -0.1, -0.2, -3.0, -0.1)
    cut = cut_at_surprise(step, 3)
    assert cut.token_ids.tolist() == [0, 1, 2] and cut.num_discarded == 2
    assert len(cut.logprobs) == len(cut.versions) == 3
    assert cut.stop is StopReason.BOUNDARY
    assert cut_at_surprise(step, 4).token_ids.tolist() == [0, 1, 2]
    assert cut_at_surprise(step, 1).token_ids.tolist() == [0, 1, 2, 3]
    assert cut_at_surprise(step, 0) is step
    tree = Tree.from_steps(np.array([1], np.int32), (cut,))
    assert tree.num_sampled_tokens == 5


@pytest.mark.parametrize("children", [1, 2])
def test_only_full_steps_that_are_to_have_several_children_are_cut_at_surprise(
    children: int,
) -> None:
    shape = TreeShape(num_children=(3, children), step_tokens=(4, 4), entropy_window=2)
    full = surprising(-0.1, -0.2, -0.3, -0.4)
    short = surprising(-0.1, -0.2, -0.3)
    steps = [full, short, replace(full, stop=StopReason.END_OF_TEXT), *[full] * 2 * children]
    prefixes = []

    class Replay:
        async def sample(
            self, prefix: list[int], *, max_tokens: int, delimiters: tuple[int, ...], seed: int
        ) -> Step:
            prefixes.append(prefix)
            return steps[len(prefixes) - 1]

    async def collect() -> list[SiblingGroup]:
        return [group async for group in grow(PROMPT, shape, Replay(), seed=SEED)]

    tree = assemble(PROMPT, asyncio.run(collect()))
    is_cut = children > 1
    below = [0] * 2 * children
    assert [len(step.token_ids) for step in tree.steps] == [4 - is_cut, 3, 4, *[4] * 2 * children]
    assert [step.num_discarded for step in tree.steps] == [is_cut, 0, 0, *below]
    # The children of the step that was cut go on from where it was cut.
    assert [*PROMPT, 0, 1, 2, *[3] * (not is_cut)] in prefixes


def test_an_entropy_window_must_leave_a_token_of_every_step() -> None:
    with pytest.raises(ValueError, match=r"entropy_window=3 must be less than .*\[4, 3\]"):
        TreeShape(num_children=(2, 2), step_tokens=(4, 3), entropy_window=3)
