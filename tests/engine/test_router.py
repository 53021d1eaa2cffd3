"""Places for trees: the engine with the fewest first, then in order."""

import asyncio

import pytest

from tests.support.stages.fake_engines import make_replica
from tests.support.stages.virtual_time import run
from treerpo_ray.engine.router import Router


def test_trees_go_to_the_engine_with_the_fewest_and_then_wait_in_order() -> None:
    async def scenario() -> None:
        replicas = [
            await make_replica(0, num_trees=1, max_trees=2),
            await make_replica(1, max_trees=2),
            await make_replica(2, is_serving=False, max_trees=2),
        ]
        router = Router(replicas)
        trees = [asyncio.create_task(router.take()) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert [tree.result().index for tree in trees[:3]] == [1, 0, 1]
        assert router.num_waiting == 2
        router.release(replicas[0])
        await asyncio.sleep(0.1)
        assert trees[3].result() is replicas[0] and not trees[4].done()
        await replicas[2].start(lambda: None, None)
        router.fill()
        await asyncio.sleep(0.1)
        assert trees[4].result() is replicas[2]
        assert [m.num_trees for m in replicas] == [2, 2, 1]

    run(scenario())


def test_an_engine_that_leaves_takes_no_tree_and_gives_no_place() -> None:
    async def scenario() -> None:
        going = await make_replica(0, max_trees=1)
        staying = await make_replica(1, num_trees=1, max_trees=1)
        router = Router([going, staying])
        tree = await router.take()
        assert tree is going
        going.drain()
        waiting = asyncio.create_task(router.take())
        router.release(going)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        router.release(staying)
        assert await waiting is staying

    run(scenario())


def test_a_tree_that_is_given_up_gives_its_place_to_the_next() -> None:
    async def scenario() -> None:
        engine = await make_replica(0, num_trees=1, max_trees=1)
        router = Router([engine])
        first, second, third = (asyncio.create_task(router.take()) for _ in range(3))
        await asyncio.sleep(0.1)
        first.cancel()  # while it waits
        await asyncio.sleep(0.1)
        assert router.num_waiting == 2
        router.release(engine)  # the place is the second's, which has not run yet
        second.cancel()
        await asyncio.sleep(0.1)
        assert third.result() is engine and engine.num_trees == 1

    run(scenario())


def test_any_number_of_trees_fits_without_a_limit() -> None:
    async def scenario() -> None:
        replicas = [await make_replica(0), await make_replica(1)]
        router = Router(replicas)
        taken = [await router.take() for _ in range(100)]
        assert [taken.count(engine) for engine in replicas] == [50, 50]

    run(scenario())


def test_whoever_waits_is_told_that_no_engine_will_serve() -> None:
    async def scenario() -> None:
        router = Router([await make_replica(0, is_serving=False)])
        waiting = asyncio.create_task(router.take())
        await asyncio.sleep(0.1)
        router.fail(RuntimeError("no engine"))
        with pytest.raises(RuntimeError, match="no engine"):
            await waiting
        assert router.num_waiting == 0

    run(scenario())


def test_whoever_gives_up_at_the_moment_that_no_engine_will_serve_is_just_cancelled() -> None:
    async def scenario() -> None:
        router = Router([await make_replica(0, is_serving=False)])
        waiting = asyncio.create_task(router.take())
        await asyncio.sleep(0.1)
        router.fail(RuntimeError("no engine"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario())
