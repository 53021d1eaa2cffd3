"""One engine from its start to its end: its states follow each other in one direction."""

import asyncio
import time

import pytest

from tests.support.stages.fake_engines import LOGPROB, Source, make_replica
from tests.support.stages.virtual_time import run
from treerpo_ray.engine.replica import Replica, ReplicaState, WeightVersion
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.manifest import Manifest


def version(number: int) -> WeightVersion:
    manifest = Manifest(version=number, tensors=(), digests=())
    return WeightVersion(
        manifest=manifest, source=Source(), probe=Probe(token_ids=[1, 2], logprobs=[LOGPROB])
    )


def test_an_engine_starts_serves_drains_and_is_gone() -> None:
    async def scenario() -> None:
        replica = await make_replica(3, is_serving=False)
        assert (replica.state, replica.node, replica.version) == (ReplicaState.STARTING, "a", -1)
        newest = version(7)
        assert await replica.start(lambda: newest, 0.1) == (1003, 2003)
        assert (replica.state, replica.version) == (ReplicaState.SERVING, 7)
        replica.drain()
        assert replica.state is ReplicaState.DRAINING
        await replica.drained(5.0)
        replica.kill()
        replica.kill()
        assert replica.state is ReplicaState.GONE

    run(scenario())


def test_a_version_that_comes_while_another_is_loaded_is_served_too() -> None:
    async def scenario() -> None:
        replica = await make_replica(0, is_serving=False)
        first, second = version(1), version(2)
        told = iter([first, second, second])
        await replica.start(lambda: next(told), None)
        assert replica.version == 2

    run(scenario())


def test_a_change_that_cannot_be_is_refused() -> None:
    async def scenario() -> None:
        starting = await make_replica(0, is_serving=False)
        with pytest.raises(RuntimeError, match="engine 0 is STARTING and cannot be DRAINING"):
            starting.drain()
        with pytest.raises(RuntimeError, match="takes no tree"):
            starting.take_place()
        serving = await make_replica(1, max_trees=1, num_trees=1)
        with pytest.raises(RuntimeError, match="takes no tree"):
            serving.take_place()
        serving.give_place_back()
        with pytest.raises(RuntimeError, match="has no tree"):
            serving.give_place_back()
        with pytest.raises(RuntimeError, match="SERVING and cannot be SERVING"):
            await serving.start(lambda: None, None)
        serving.kill()
        with pytest.raises(RuntimeError, match="GONE and cannot be DRAINING"):
            serving.drain()
        with pytest.raises(RuntimeError, match="GONE and cannot be SERVING"):
            await serving.start(lambda: None, None)

    run(scenario())


def test_nobody_else_writes_what_is_known_of_an_engine() -> None:
    async def scenario() -> None:
        replica = await make_replica(0)
        told = [name for name, of in vars(Replica).items() if isinstance(of, property)]
        assert {"state", "node", "version", "num_trees", "num_starts"} <= set(told)
        for name in (*told, "anything_else"):
            with pytest.raises(AttributeError):
                setattr(replica, name, None)

    run(scenario())


def test_draining_ends_with_the_last_tree_or_shortly_before_the_node_does() -> None:
    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        start = now()
        last = await make_replica(0, num_trees=2)
        last.drain()
        drained = asyncio.create_task(last.drained(5.0))
        for _ in range(2):
            await asyncio.sleep(100)
            assert not drained.done()
            last.give_place_back()
        await drained
        assert now() - start == pytest.approx(200)

        start = now()
        left = await make_replica(1, num_trees=2)
        left.drain()
        drained = asyncio.create_task(left.drained(5.0))
        await asyncio.sleep(10)
        left.leave_by(time.time() + 60)
        await drained
        assert now() - start == pytest.approx(65, abs=1) and left.num_trees == 2

    run(scenario())
