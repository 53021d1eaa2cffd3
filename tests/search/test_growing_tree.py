"""A growing tree: whatever becomes of its engines, what has arrived of it is not grown again."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.support.stages.fake_engines import (
    ENDS,
    PROMPTS,
    SHAPE,
    Fault,
    Fleet,
    make_config,
    make_gate,
    make_pool,
    serve_from_start,
    whole_tree,
)
from tests.support.stages.virtual_time import run
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.algo.tree import Tree
from treerpo_ray.engine.types import Sampling
from treerpo_ray.records import TreeRecord
from treerpo_ray.search.growing_tree import GrowingTree

TICKET = make_gate(make_config()).ticket(2)
WHOLE = whole_tree(TICKET.prompt, TICKET.seed)


def growing(shape: TreeShape = SHAPE) -> GrowingTree:
    return GrowingTree(
        ticket=TICKET, prompts=PROMPTS, shape=shape, sampling=Sampling(temperature=1.0)
    )


def is_same(tree: Tree, other: Tree) -> bool:
    return np.array_equal(tree.parents, other.parents) and np.array_equal(
        tree.token_ids, other.token_ids
    )


def grown(tree: GrowingTree, *faults: Fault, version: int = 0) -> tuple[TreeRecord, Fleet]:
    """The finished record of a tree, on one engine at a time whose starts have these faults."""
    fleet, records = Fleet(faults={0: list(faults)}), list[TreeRecord]()

    async def scenario() -> None:
        pool = await make_pool(make_config(), fleet)
        await serve_from_start(pool, version)
        records.append(await tree.finish(pool.engines))
        await pool.stop()

    run(scenario())
    return records[0], fleet


def test_an_undisturbed_tree_is_the_one_of_its_ticket_and_tells_of_its_engine() -> None:
    tree = growing()
    assert len(tree.record().tree) == 0 and tree.record().finished_at_s == 0.0
    record, fleet = grown(tree)
    assert is_same(record.tree, WHOLE)
    assert (record.ticket, record.seed, record.attempt, record.engine) == (2, TICKET.seed, 0, 0)
    problem = PROMPTS.problems[TICKET.prompt]
    assert (record.prompt_id, record.answers) == (problem.id, problem.answers)
    assert record.finished_at_s > 0 and not tree.is_on_engine
    assert fleet.of("tree_moved") == []


@pytest.mark.parametrize("how", [*ENDS, "hung"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_tree_whose_engine_fails_goes_on_from_the_groups_that_have_arrived(
    how: str, after: int
) -> None:
    record, fleet = grown(growing(), Fault("grow", how, after))
    assert is_same(record.tree, WHOLE)
    assert record.attempt == 1
    [moved] = fleet.of("tree_moved")
    assert (moved["ticket"], moved["engine"], moved["groups"]) == (2, 0, after)
    assert [engine.held for engine in fleet.started[0]] == [[0], [after]]


def test_what_an_engine_samples_with_older_weights_than_it_has_proved_is_not_taken() -> None:
    record, fleet = grown(growing(), Fault("grow", "stale"), version=1)
    assert record.tree.min_version == record.tree.max_version == 1
    [moved] = fleet.of("tree_moved")
    told = "StaleEngine: engine 0 sampled with version 0 after it had proved 1"
    assert moved["reason"] == told and moved["groups"] == 0


def test_a_tree_goes_on_from_a_record_of_it_and_not_from_that_of_another() -> None:
    part = growing()
    part.groups = part_of(growing())[:1]
    part.attempt, part.grow_s = 3, 50.0
    past = part.record()
    for other in (
        replace(past, seed=past.seed + 1),
        replace(past, tree=replace(past.tree, prompt_ids=past.tree.prompt_ids + 1)),
    ):
        tree = growing()
        assert not tree.take_up(other)
        assert (tree.groups, tree.attempt, tree.grow_s) == ([], 0, 0.0)
    tree = growing()
    assert tree.take_up(past) and len(tree.groups) == 1
    record, fleet = grown(tree)
    assert is_same(record.tree, WHOLE) and fleet.started[0][0].held == [1]
    assert record.attempt == 3
    assert record.grow_s >= 50.0, "the time before the resume counts"


@pytest.mark.parametrize("num_children", [(1, 2, 2), (2, 2, 1), (2, 2), (3, 2, 2)])
def test_a_tree_does_not_go_on_from_groups_of_another_shape(num_children: tuple[int, ...]) -> None:
    done, _ = grown(growing())
    assert max(done.tree.depths) == 3
    shape = replace(SHAPE, num_children=num_children, step_tokens=(3,) * len(num_children))
    tree = growing(shape)
    assert not tree.take_up(done)
    assert tree.groups == [] and not tree.finished_at_s


def part_of(tree: GrowingTree) -> list:
    """The groups of the whole tree, as they arrive."""
    grown(tree)
    return tree.groups


def test_a_finished_record_needs_no_engine() -> None:
    done, _ = grown(growing())
    tree = growing()
    assert tree.take_up(done)
    again = asyncio.run(tree.finish(engines=None))
    assert is_same(again.tree, WHOLE) and again.finished_at_s == done.finished_at_s


def test_where_a_tree_is_and_how_far_is_said_in_one_line() -> None:
    tree = growing()
    grown(tree, Fault("grow", "killed", 1))
    groups = len(tree.groups)
    said = tree.state()
    assert said.startswith(f"ticket 2 on engine 0: {groups} step groups, the last ")
