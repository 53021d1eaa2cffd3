"""Trees and the router of engines: who gets one, when, and what a change of mind gives back."""

import asyncio

import pytest

from treerpo_ray.engine.autoscaler import first_to_leave
from treerpo_ray.engine.pool import Router
from treerpo_ray.engine.replica import Replica


def replica(index: int, **fields) -> Replica:
    return Replica(index, actor=None, **({"node": "a", "is_serving": True} | fields))


async def settle(*tasks: asyncio.Task) -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_trees_go_to_the_engine_with_the_fewest_and_then_wait_in_order() -> None:
    async def run() -> None:
        replicas = [replica(0, num_trees=1), replica(1), replica(2, is_serving=False)]
        router = Router(replicas, max_trees=2)
        trees = [asyncio.create_task(router.take()) for _ in range(5)]
        await settle()
        assert [tree.result().index for tree in trees[:3]] == [1, 0, 1]
        assert router.num_waiting == 2
        router.release(replicas[0])
        await settle()
        assert trees[3].result() is replicas[0] and not trees[4].done()
        replicas[2].is_serving = True
        router.fill()
        await settle()
        assert trees[4].result() is replicas[2]
        assert [m.num_trees for m in replicas] == [2, 2, 1]

    asyncio.run(run())


def test_an_engine_that_leaves_takes_no_tree_and_gives_no_place() -> None:
    async def run() -> None:
        going, staying = replica(0), replica(1, num_trees=1)
        router = Router([going, staying], max_trees=1)
        tree = await router.take()
        assert tree is going
        router.replicas.remove(going)
        waiting = asyncio.create_task(router.take())
        router.release(going)
        await settle()
        assert not waiting.done()
        router.release(staying)
        assert await waiting is staying

    asyncio.run(run())


def test_a_tree_that_is_given_up_gives_its_place_to_the_next() -> None:
    async def run() -> None:
        engine = replica(0, num_trees=1)
        router = Router([engine], max_trees=1)
        first, second, third = (asyncio.create_task(router.take()) for _ in range(3))
        await settle()
        first.cancel()  # while it waits
        await settle()
        assert router.num_waiting == 2
        router.release(engine)  # the place is the second's, which has not run yet
        second.cancel()
        await settle()
        assert third.result() is engine and engine.num_trees == 1

    asyncio.run(run())


def test_any_number_of_trees_fits_without_a_limit() -> None:
    async def run() -> None:
        router = Router([replica(0), replica(1)], max_trees=None)
        taken = [await router.take() for _ in range(100)]
        assert [taken.count(engine) for engine in router.replicas] == [50, 50]

    asyncio.run(run())


def test_whoever_waits_is_told_that_no_engine_will_serve() -> None:
    async def run() -> None:
        router = Router([replica(0, is_serving=False)], max_trees=None)
        waiting = asyncio.create_task(router.take())
        await settle()
        router.fail(RuntimeError("no engine"))
        with pytest.raises(RuntimeError, match="no engine"):
            await waiting
        assert router.num_waiting == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("replicas", "first"),
    [
        ([replica(0), replica(1, is_serving=False), replica(2, node="", is_serving=False)], 2),
        ([replica(0), replica(1, is_serving=False)], 1),
        ([replica(0, num_trees=0), replica(1, num_trees=0), replica(2, node="b", num_trees=9)], 2),
        ([replica(0, num_trees=3), replica(1, num_trees=2)], 1),
        ([replica(0), replica(1)], 1),
    ],
    ids=["without a node", "not serving", "alone on its node", "with fewer trees", "the last one"],
)
def test_the_engine_to_leave_first_is_the_one(replicas, first) -> None:
    assert first_to_leave(replicas).index == first
