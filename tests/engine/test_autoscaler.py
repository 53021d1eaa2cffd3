"""How many engines there are to be, which one goes first, and what becomes of them as nodes and
trees come and go; the engines are stand-ins, see `fake_engines`."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.stages.fake_engines import (
    Fault,
    Fleet,
    make_config,
    make_pool,
    make_replica,
    serve_from_start,
    until,
)
from tests.support.stages.virtual_time import run
from treerpo_ray.engine.autoscaler import ScalingPolicy, first_to_leave
from treerpo_ray.engine.pool import MAX_STARTS, EnginePool
from treerpo_ray.engine.replica import ReplicaState

# How many --------------------------------------------------------------------------------------


def scaling(**changes) -> ScalingPolicy:
    fields = {"fewest": 1, "most": 4, "trees_per_engine": 8, "patience_s": 60.0}
    return ScalingPolicy(**(fields | changes))


@pytest.mark.parametrize(
    ("num_trees", "engines"),
    [(0, 1), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (32, 4), (33, 4), (10_000, 4)],
)
def test_the_engines_needed_are_the_trees_by_those_of_one_engine_within_bounds(
    num_trees, engines
) -> None:
    assert scaling().needed(num_trees) == engines


def test_engines_without_a_limit_of_trees_are_always_enough() -> None:
    assert scaling(fewest=3, most=3, trees_per_engine=None).needed(1000) == 3


def test_the_pool_grows_at_once_and_shrinks_after_its_patience() -> None:
    rule = scaling()
    loads = [(0, 4), (10, 30), (11, 0), (50, 12), (70, 0), (71, 0), (110, 0), (111, 0)]
    # 30 trees need 4 engines until 10 + 60; the 12 of second 50 need 2 until 110.
    assert [rule.target(trees, now) for now, trees in loads] == [1, 4, 4, 4, 4, 2, 2, 1]


def test_without_patience_the_pool_follows_the_trees() -> None:
    rule = scaling(patience_s=0.0)
    assert [rule.target(trees, now) for now, trees in [(0, 32), (1, 0), (2, 16)]] == [4, 1, 2]


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 50)), min_size=1),
    st.floats(0, 50),
)
def test_the_target_is_the_most_that_was_needed_within_the_patience(gaps, patience_s) -> None:
    rule = scaling(patience_s=patience_s)
    now, past = 0.0, []
    for gap, num_trees in gaps:
        now += gap
        past.append((now, rule.needed(num_trees)))
        recent = [need for time, need in past if time >= now - patience_s]
        assert rule.target(num_trees, now) == max(recent)


# Which one goes first --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "first"),
    [
        ([{}, {"is_serving": False}, {"node": "", "is_serving": False}], 2),
        ([{}, {"is_serving": False}], 1),
        ([{}, {}, {"node": "b", "num_trees": 9}], 2),
        ([{"num_trees": 3}, {"num_trees": 2}], 1),
        ([{}, {}], 1),
    ],
    ids=["without a node", "not serving", "alone on its node", "with fewer trees", "the last one"],
)
def test_the_engine_to_leave_first_is_the_one(replicas: list[dict], first: int) -> None:
    async def scenario() -> None:
        made = [await make_replica(index, **fields) for index, fields in enumerate(replicas)]
        assert first_to_leave(made).index == first

    run(scenario())


# What becomes of the engines -------------------------------------------------------------------


def keep(
    fleet: Fleet,
    act: Callable[[EnginePool, AsyncExitStack], Awaitable[None]],
    num_trees: int = 0,
    *overrides: str,
) -> None:
    """Run `act` with a pool whose autoscaler has looked, and with so many trees on it."""

    async def scenario() -> None:
        config = make_config(
            "engine.max_engines=3", "engine.max_trees=4", "engine.shrink_after_s=0", *overrides
        )
        pool = await make_pool(config, fleet)
        async with AsyncExitStack() as trees:
            await serve_from_start(pool)
            for _ in range(num_trees):
                await trees.enter_async_context(pool.engines.place())
            await until(lambda: bool(fleet.of("pool")))
            await act(pool.engines, trees)
        await pool.stop()

    run(scenario())


def ends(fleet: Fleet) -> list[tuple]:
    kinds = ("engine_draining", "engine_left")
    return [
        (event.kind, event.fields["engine"], event.fields["trees"])
        for event in fleet.events
        if event.kind in kinds
    ]


def test_an_engine_on_a_drained_node_is_replaced_at_once_and_ends_when_its_trees_have() -> None:
    fleet = Fleet(nodes={1: "another"})

    async def act(pool: EnginePool, trees: AsyncExitStack) -> None:
        [replica] = pool.replicas
        fleet.leaving["node"] = math.inf
        await until(lambda: len(fleet.started) == 2)
        assert replica.state is ReplicaState.DRAINING
        [fresh] = pool.staying
        assert fresh.index == 1
        await asyncio.sleep(1000)
        assert fleet.killed == []
        await trees.aclose()
        await until(lambda: pool.replicas == (fresh,))
        assert fleet.started[0][0].calls[-1] == "stop"

    keep(fleet, act, 2)
    assert ends(fleet) == [("engine_draining", 0, 2), ("engine_left", 0, 0)]
    assert [event["reason"] for event in fleet.of("engine_left")] == ["it is drained"]


def test_trees_that_are_left_when_the_node_ends_move_on() -> None:
    fleet = Fleet(nodes={1: "another"})

    async def act(pool: EnginePool, trees: AsyncExitStack) -> None:
        fleet.leaving["node"] = asyncio.get_running_loop().time() + 600
        await until(lambda: bool(fleet.of("engine_draining")))
        await asyncio.sleep(500)
        assert fleet.killed == []
        await asyncio.sleep(100)
        assert fleet.killed == [fleet.started[0][0]]
        assert "stop" not in fleet.killed[0].calls  # killed: its trees notice at once

    keep(fleet, act, 2)
    assert ends(fleet) == [("engine_draining", 0, 2), ("engine_left", 0, 2)]
    assert [event["reason"] for event in fleet.of("engine_left")] == ["its node ends"]


def test_the_pool_grows_with_the_trees_and_lets_pending_engines_go_first() -> None:
    fleet = Fleet({index: [Fault("node", "hung")] for index in (1, 2)})

    async def act(pool: EnginePool, trees: AsyncExitStack) -> None:
        waiting = [asyncio.create_task(pool.place().__aenter__()) for _ in range(5)]
        await until(lambda: [replica.index for replica in pool.replicas] == [0, 1, 2])
        for tree in waiting:
            tree.cancel()
        await until(lambda: [replica.index for replica in pool.replicas] == [0])

    keep(fleet, act, 4)
    assert ends(fleet) == [("engine_left", 2, 0), ("engine_left", 1, 0)]


def test_nothing_is_added_once_engines_fail_for_good() -> None:
    fleet = Fleet({1: [Fault("start", "killed")] * MAX_STARTS})

    async def act(pool: EnginePool, trees: AsyncExitStack) -> None:
        waiting = [asyncio.create_task(pool.place().__aenter__()) for _ in range(5)]
        await until(lambda: bool(fleet.of("engine_left")))
        await asyncio.sleep(1000)
        assert len(fleet.started[1]) == MAX_STARTS and len(pool.replicas) == 1
        for tree in waiting:
            tree.cancel()

    keep(fleet, act, 4, "engine.max_engines=2")


def test_counts_are_noted_when_they_change() -> None:
    fleet = Fleet()

    async def act(pool: EnginePool, trees: AsyncExitStack) -> None:
        await asyncio.sleep(100)  # some looks more
        assert len(fleet.of("pool")) == 1
        await trees.enter_async_context(pool.place())
        await until(lambda: len(fleet.of("pool")) == 2)

    keep(fleet, act)
    counts = {"nodes": 2, "nodes_leaving": 0, "serving": 1, "starting": 0, "draining": 0}
    assert fleet.of("pool")[:2] == [
        {**counts, "waiting": 0, "growing": 0},
        {**counts, "waiting": 0, "growing": 1},
    ]


def test_a_look_that_fails_is_noted_and_the_next_one_goes_well() -> None:
    fleet = Fleet(looks_to_fail=[ConnectionError("away")])

    async def act(pool: EnginePool, trees: AsyncExitStack) -> None:
        assert fleet.of("autoscaler_failed") == [{"reason": "ConnectionError: away"}]

    keep(fleet, act)
