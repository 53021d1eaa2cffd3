"""How engines come up: one that fails is replaced, one that always does is given up for a while.

The engines are stand-ins in this process, see `fake_engines`.
"""

import asyncio

import pytest

from tests.support.stages.fake_engines import (
    DIFFERS,
    ENDS,
    TREES,
    Fault,
    Fleet,
    Handle,
    Source,
    make_config,
    make_gate,
    make_pool,
    serve,
    serve_from_start,
    take,
    until,
)
from tests.support.stages.virtual_time import run
from treerpo_ray.engine.pool import MAX_STARTS, PoolTimes
from treerpo_ray.engine.replica import ReplicaState
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import WeightsLost
from treerpo_ray.weights.manifest import Manifest


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, how) for method in ("node", "start", "load", "probe") for how in ENDS),
        *((method, "hung") for method in ("start", "load", "probe")),
    ],
)
def test_an_engine_that_fails_while_the_run_starts_is_replaced(method: str, how: str) -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        await serve_from_start(pool, version=1)
        await until(lambda: all(replica.is_serving for replica in pool.engines.replicas))
        assert [event["engine"] for event in fleet.of("engine_lost")] == [1]
        assert fleet.started[1][1].version == 1
        await pool.stop()

    fleet = Fleet({1: [Fault(method, how)]})
    run(scenario())


def test_weights_that_are_lost_cost_no_engine() -> None:
    """Neither one that serves nor one that starts; both take over what is published next."""

    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        await serve_from_start(pool, version=1)
        pool.engines.replace(pool.engines.replicas[0], RuntimeError("its node is gone"))
        await asyncio.sleep(100)
        assert fleet.started[0][1].calls == ["start", "load 1"], "and now it waits"
        await serve(pool, 2)
        await until(lambda: all(replica.is_serving for replica in pool.engines.replicas))
        fleet.started[1][0].fault = Fault("load", "lost")
        with pytest.raises(WeightsLost):
            await serve(pool, 3)
        found = {r.index: (r.is_serving, r.version) for r in pool.engines.replicas}
        assert found == {0: (True, 3), 1: (True, 2)}
        await serve(pool, 2)  # the learner goes on from its checkpoint
        assert [replica.version for replica in pool.engines.replicas] == [2, 2]
        assert {index: len(started) for index, started in fleet.started.items()} == {0: 2, 1: 1}
        [waiting, *_] = fleet.of("waiting")
        assert waiting["what"].endswith("for engine 0, since those of version 1 are lost")
        await pool.stop()

    fleet = Fleet({0: [Fault("load", "lost", after=1), Fault("load", "lost")]})
    run(scenario())


def test_a_learner_that_waits_for_the_one_engine_that_lost_its_weights_is_served() -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=1"), fleet)
        await serve_from_start(pool, version=1)
        assert fleet.started[0][0].calls == ["start", "load 1", "load 1", "probe"]
        await pool.stop()

    fleet = Fleet({0: [Fault("load", "lost")]})
    run(scenario())


def test_a_run_does_not_start_without_nodes_for_its_engines() -> None:
    async def scenario() -> None:
        config = make_config("engine.num_engines=3", "engine.start_timeout_s=1")
        pool = await make_pool(config, fleet)
        with pytest.raises(TimeoutError, match=r"1 s for a node with .*CPU.* for engine 0, 2"):
            await pool.start()
        await pool.stop()

    fleet = Fleet({0: [Fault("node", "hung")], 2: [Fault("node", "hung")]})
    run(scenario())


def test_a_run_of_which_no_engine_comes_up_ends_with_the_reason() -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        with pytest.raises(RuntimeError, match=r"5 times in a row: .*core is dead"):
            await pool.start()
        assert [len(started) for started in fleet.started.values()] == [MAX_STARTS] * 2
        await pool.stop()

    fleet = Fleet({index: [Fault("start", "core dead")] * MAX_STARTS for index in (0, 1)})
    run(scenario())


def test_an_engine_on_a_node_with_other_versions_is_given_up_at_once_and_the_others_go_on() -> None:
    async def scenario() -> None:
        config = make_config("engine.num_engines=2")
        pool = await make_pool(config, fleet)
        await serve_from_start(pool)
        await until(lambda: bool(fleet.of("engine_left")))
        await asyncio.sleep(30)  # some looks of the autoscaler
        assert [len(started) for started in fleet.started.values()] == [1, 1]
        [lost], [left] = fleet.of("engine_lost"), fleet.of("engine_left")
        assert lost == {"engine": 1, "reason": f"NodeDiffers: {DIFFERS}"}
        assert left["reason"] == "it is given up, since its node differs"
        gate = make_gate(config)
        await pool.grow_tickets(Handle(gate), gate.session, 0, 1, [])
        await take(pool, TREES)
        await pool.stop()

    fleet = Fleet({1: [Fault("start", "differs")]})
    run(scenario())


def test_a_run_all_of_whose_engines_are_on_nodes_with_other_versions_ends_with_what_differs() -> (
    None
):
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        with pytest.raises(RuntimeError, match=f"the last one differs: NodeDiffers: {DIFFERS}$"):
            await pool.start()
        assert [len(started) for started in fleet.started.values()] == [1, 1]
        await pool.stop()

    fleet = Fleet({index: [Fault("start", "differs")] for index in (0, 1)})
    run(scenario())


@pytest.mark.parametrize("rest_s", [0.0, 600.0])
def test_an_engine_that_was_given_up_is_tried_again_once_it_rested_and_trees_are_finished(
    rest_s: float,
) -> None:
    async def scenario() -> None:
        config = make_config("engine.num_engines=2")
        pool = await make_pool(config, fleet, PoolTimes(rest_s=rest_s))
        await serve_from_start(pool)
        await until(lambda: bool(fleet.of("engine_left")))
        [left] = fleet.of("engine_left")
        assert left["engine"] == 1 and "given up" in str(left["reason"])
        await asyncio.sleep(30)  # some looks of the autoscaler
        assert len(fleet.started[1]) == MAX_STARTS
        gate = make_gate(config)
        await pool.grow_tickets(Handle(gate), gate.session, 0, 1, [])
        await take(pool, TREES)
        if rest_s:
            await asyncio.sleep(30)
            assert len(fleet.started[1]) == MAX_STARTS
        else:
            await until(lambda: fleet.of("engine_serving")[-1]["engine"] == 1)
            assert len(fleet.started[1]) == MAX_STARTS + 1
        await pool.stop()

    fleet = Fleet({1: [Fault("start", "killed")] * MAX_STARTS})
    run(scenario())


def test_an_engine_that_fails_in_a_way_that_nobody_foresaw_is_replaced() -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=1"), fleet)
        unlike = Probe(token_ids=[1, 2, 3], logprobs=[-0.5])  # one value is missing
        manifest = Manifest(version=0, tensors=(), digests=())
        start = asyncio.create_task(pool.start())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match=r"5 times in a row: ValueError: zip\(\)"):
            await pool.serve(manifest, Source(), unlike, True)
        lost = fleet.of("engine_lost")
        assert {event["reason"] for event in lost} == {
            "ValueError: zip() argument 2 is shorter than argument 1"
        }
        assert len(fleet.started[0]) == len(lost) == MAX_STARTS
        with pytest.raises(RuntimeError, match="5 times in a row"):
            await start

    fleet = Fleet()
    run(scenario())


def test_engines_that_sleep_load_what_they_served_or_what_is_new_and_others_start_after_that() -> (
    None
):
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=3"), fleet)
        await serve_from_start(pool, version=1)
        await pool.sleep()
        await asyncio.sleep(100)
        killed, hung = fleet.started[1], fleet.started[2]
        assert fleet.started[0][0].calls == ["start", "load 1", "probe", "sleep"]
        assert [engine.calls for engine in killed[1:] + hung[1:]] == [[], []], (
            "nor are they started"
        )
        await pool.wake()
        assert fleet.started[0][0].calls[-1] == "load 1", "there was nothing to train"
        await pool.wake()
        assert fleet.started[0][0].calls[-2:] == ["sleep", "load 1"], "it is awake"
        await until(lambda: all(replica.is_serving for replica in pool.engines.replicas))
        await pool.sleep()
        await serve(pool, 2)
        serving = [starts[-1] for starts in fleet.started.values()]
        assert [engine.version for engine in serving] == [2, 2, 2]
        assert [engine.calls[-2:] for engine in serving] == [["sleep", "load 2"]] * 3
        await pool.stop()

    fleet = Fleet({1: [Fault("sleep", "killed")], 2: [Fault("sleep", "hung")]})
    run(scenario())


@pytest.mark.parametrize("how", ["busy", "hung"])
def test_an_engine_that_is_still_starting_when_others_sleep_is_waited_for_or_starts_anew(
    how: str,
) -> None:
    async def scenario() -> None:
        pool = await make_pool(
            make_config("engine.num_engines=2", "engine.start_timeout_s=50"), fleet
        )
        await serve_from_start(pool, version=1)
        pool.engines.replace(pool.engines.replicas[1], RuntimeError("its core is dead"))
        await until(lambda: len(fleet.started[1]) == 2 and fleet.started[1][1].calls == ["start"])
        start = asyncio.get_running_loop().time()
        await pool.sleep()
        waited_s = asyncio.get_running_loop().time() - start
        assert fleet.started[0][0].calls[-1] == "sleep"
        await asyncio.sleep(100)
        if how == "busy":
            assert waited_s < 1
            assert fleet.started[1][1].calls == ["start", "load 1", "probe", "sleep"]
        else:
            assert waited_s == pytest.approx(50, abs=1)
            assert [engine.calls for engine in fleet.started[1][1:]] == [["start"], []]
            assert "waited 50 s for" in str(fleet.of("engine_lost")[-1]["reason"])
        await serve(pool, 2)
        await until(lambda: all(replica.is_serving for replica in pool.engines.replicas))
        assert [engine.version for engine in pool.engines.replicas] == [2, 2]
        await pool.stop()

    fleet = Fleet({1: [Fault("stop", "killed"), Fault("start", how)]})
    run(scenario())


def test_a_draining_engine_takes_over_weights_for_as_long_as_it_has_trees() -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        await serve_from_start(pool)
        first = pool.engines.replicas[0]
        async with pool.engines.place() as replica:
            assert replica is first
            pool.engines.let_go(first, "fewer are enough")
            await serve(pool, 1)
            assert (first.version, first.state) == (1, ReplicaState.DRAINING)
            assert [stats.version for stats in await pool.stats()] == [1]
        assert not first.takes_weights
        await until(lambda: first.state is ReplicaState.GONE)
        assert fleet.killed == [fleet.started[0][0]]
        assert [event["reason"] for event in fleet.of("engine_left")] == ["it is drained"]
        await pool.stop()

    fleet = Fleet()
    run(scenario())


def test_a_draining_engine_that_fails_is_not_replaced_and_ends_at_once() -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        await serve_from_start(pool)
        first = pool.engines.replicas[0]
        async with pool.engines.place():
            pool.engines.let_go(first, "fewer are enough")
            fleet.started[0][0].fault = Fault("load", "killed")
            await serve(pool, 1)
            assert first.state is ReplicaState.GONE
            assert fleet.killed == [fleet.started[0][0]]
        await asyncio.sleep(1)  # virtual: whoever waited for it to drain has looked
        assert [event["reason"] for event in fleet.of("engine_left")] == [
            "it failed: ActorDiedError: The actor died unexpectedly before finishing this task."
        ]
        assert len(fleet.started[0]) == 1 and fleet.of("engine_lost") == []
        await pool.stop()

    fleet = Fleet()
    run(scenario())


def test_work_on_the_engines_that_fails_is_noted() -> None:
    async def fail() -> None:
        raise KeyError("a mistake")

    async def scenario() -> None:
        pool = await make_pool(make_config(), fleet)
        pool.engines.spawn(fail())
        await until(lambda: bool(fleet.of("engine_work_failed")))
        assert fleet.of("engine_work_failed") == [{"reason": "KeyError: 'a mistake'"}]

    fleet = Fleet()
    run(scenario())
