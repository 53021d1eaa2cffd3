"""How engines come up: one that fails is replaced, one that always does is given up for a while.

The engines are stand-ins in this process, see `fake_engines`.
"""

import asyncio
from collections.abc import Callable

import pytest

from tests.search.test_tree_pool import ENDS, TREES, make_config, make_gate, run, serve_from_start
from tests.support.fake_engines import Fault, Handle, fake_fleet, make_pool, take
from treerpo_ray.engine import autoscaler as engine_keeper
from treerpo_ray.engine import pool as engines
from treerpo_ray.engine.pool import MAX_STARTS
from treerpo_ray.weight_sync import Probe


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, how) for method in ("node", "start", "load", "probe") for how in ENDS),
        *((method, "hung") for method in ("start", "load", "probe")),
    ],
)
def test_an_engine_that_fails_while_the_run_starts_is_replaced(method: str, how: str) -> None:
    async def scenario() -> None:
        limit = 1 if how == "hung" else 600
        key = "start_timeout_s" if method == "start" else "load_timeout_s"
        config = make_config("engine.num_engines=2", f"engine.{key}={limit}")
        pool = await make_pool(config, fleet)
        await serve_from_start(pool, version=1)
        await until(lambda: all(replica.is_serving for replica in pool.engines.replicas))
        assert [event["engine"] for event in fleet.of("engine_lost")] == [1]
        assert fleet.started[1][1].version == 1
        await pool.stop()

    with fake_fleet({1: [Fault(method, how)]}) as fleet:
        run(scenario())


def test_a_run_does_not_start_without_nodes_for_its_engines() -> None:
    async def scenario() -> None:
        config = make_config("engine.num_engines=3", "engine.start_timeout_s=1")
        pool = await make_pool(config, fleet)
        with pytest.raises(TimeoutError, match=r"1 s for a node with .*CPU.* for engine 0, 2"):
            await pool.start()
        await pool.stop()

    with fake_fleet({0: [Fault("node", "hung")], 2: [Fault("node", "hung")]}) as fleet:
        run(scenario())


def test_a_run_of_which_no_engine_comes_up_ends_with_the_reason() -> None:
    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=2"), fleet)
        with pytest.raises(RuntimeError, match=r"5 times in a row: .*core is dead"):
            await pool.start()
        assert [len(started) for started in fleet.started.values()] == [MAX_STARTS] * 2
        await pool.stop()

    with fake_fleet(
        {index: [Fault("start", "core dead")] * MAX_STARTS for index in (0, 1)}
    ) as fleet:
        run(scenario())


@pytest.mark.parametrize("rest_s", [0.0, 600.0])
def test_an_engine_that_was_given_up_is_tried_again_once_it_rested_and_trees_are_finished(
    rest_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "REST_S", rest_s)
    monkeypatch.setattr(engine_keeper, "LOOK_EVERY_S", 0.01)

    async def scenario() -> None:
        config = make_config("engine.num_engines=2")
        pool = await make_pool(config, fleet)
        await serve_from_start(pool)
        await until(lambda: bool(fleet.of("engine_left")))
        [left] = fleet.of("engine_left")
        assert left["engine"] == 1 and "given up" in str(left["reason"])
        await asyncio.sleep(0.1)  # some looks of the keeper
        assert len(fleet.started[1]) == MAX_STARTS
        gate = make_gate(config)
        await pool.grow_tickets(Handle(gate), gate.session, 0, 1, [])
        await take(pool, TREES)
        if rest_s:
            await asyncio.sleep(0.1)
            assert len(fleet.started[1]) == MAX_STARTS
        else:
            await until(lambda: fleet.of("engine_serving")[-1]["engine"] == 1)
            assert len(fleet.started[1]) == MAX_STARTS + 1
        await pool.stop()

    with fake_fleet({1: [Fault("start", "killed")] * MAX_STARTS}) as fleet:
        run(scenario())


def test_an_engine_that_fails_in_a_way_that_nobody_foresaw_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = iter([ValueError("zip() argument 2 is shorter than argument 1")])

    def distance(probe: Probe, found: list[float]) -> float:
        for error in errors:
            raise error
        return 0.0

    monkeypatch.setattr(Probe, "distance", distance)

    async def scenario() -> None:
        pool = await make_pool(make_config("engine.num_engines=1"), fleet)
        await serve_from_start(pool)
        [lost] = fleet.of("engine_lost")
        assert lost["reason"] == "ValueError: zip() argument 2 is shorter than argument 1"
        assert len(fleet.started[0]) == 2
        await pool.stop()

    with fake_fleet() as fleet:
        run(scenario())


def test_work_on_the_engines_that_fails_is_noted() -> None:
    async def fail() -> None:
        raise KeyError("a mistake")

    async def scenario() -> None:
        pool = await make_pool(make_config(), fleet)
        pool.engines.spawn(fail())
        await until(lambda: bool(fleet.of("engine_work_failed")))
        assert fleet.of("engine_work_failed") == [{"reason": "KeyError: 'a mistake'"}]

    with fake_fleet() as fleet:
        run(scenario())
