"""What the keeper does to engines as nodes and trees come and go; the engines only note it."""

import asyncio
import math
import time
from dataclasses import dataclass, field

import pytest
import ray

from treerpo_ray.config import Config, load
from treerpo_ray.engine import autoscaler as engine_keeper
from treerpo_ray.engine.autoscaler import MARGIN_S, Autoscaler, Nodes
from treerpo_ray.engine.pool import Router
from treerpo_ray.engine.replica import Replica

CONFIG = load(
    ["engine.max_engines=3", "engine.max_trees=4", "engine.shrink_after_s=0"],
)


@dataclass
class NotedEngines:
    """Engines without Ray: replicas come without a node, and events are kept."""

    config: Config = CONFIG
    replicas: list[Replica] = field(default_factory=list)
    leaving: list[Replica] = field(default_factory=list)
    failure: BaseException | None = None
    events: list[tuple] = field(default_factory=list)
    stopped: list[Replica] = field(default_factory=list)
    work: list[asyncio.Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router = Router(self.replicas, self.config.engine.max_trees)

    def serving(self, node: str, num_trees: int = 0) -> Replica:
        replica = Replica(len(self.replicas), None, node=node, is_serving=True, num_trees=num_trees)
        self.replicas.append(replica)
        return replica

    def add(self, index: int) -> None:
        self.replicas.append(Replica(index, None))

    def remove(self, replica: Replica) -> None:
        self.replicas.remove(replica)

    def note(self, kind: str, **fields) -> None:
        self.events.append((kind, fields.get("engine"), fields.get("trees")))

    def spawn(self, work) -> None:
        self.work.append(asyncio.create_task(work))

    async def stop_actors(self, replicas: list[Replica]) -> None:
        self.stopped += replicas


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """The nodes that the keeper sees; it looks often, and nothing is there to be killed."""
    nodes = Nodes(num_alive=2, leaving={})
    monkeypatch.setattr(engine_keeper, "see_nodes", lambda: nodes)
    monkeypatch.setattr(engine_keeper, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(engine_keeper, "DRAIN_POLL_S", 0.01)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    return nodes


async def until(is_so) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def keep(engines: NotedEngines, act) -> None:
    """Run the keeper while `act` runs."""

    async def run() -> None:
        keeper = asyncio.create_task(Autoscaler(engines).run())
        await until(lambda: ("pool", None, None) in engines.events)
        await act()
        keeper.cancel()

    asyncio.run(run())


def kinds(engines: NotedEngines) -> list[tuple]:
    return [event for event in engines.events if event[0] != "pool"]


def test_an_engine_on_a_drained_node_is_replaced_at_once_and_ends_when_its_trees_have(
    cluster,
) -> None:
    engines = NotedEngines()
    replica = engines.serving("a", num_trees=2)
    cluster.leaving["a"] = math.inf

    async def act() -> None:
        assert engines.leaving == [replica]
        [fresh] = engines.replicas
        assert (fresh.index, fresh.is_serving) == (1, False)
        assert engines.stopped == []
        replica.num_trees = 0
        await asyncio.gather(*engines.work)
        assert engines.stopped == [replica] and engines.leaving == []

    keep(engines, act)
    assert kinds(engines) == [("engine_draining", 0, 2), ("engine_left", 0, 0)]


def test_trees_that_are_left_when_the_node_ends_move_on(cluster) -> None:
    engines = NotedEngines()
    engines.serving("a", num_trees=2)
    cluster.leaving["a"] = time.time() + MARGIN_S + 2.0

    async def act() -> None:
        assert kinds(engines) == [("engine_draining", 0, 2)]
        await asyncio.gather(*engines.work)

    keep(engines, act)
    assert kinds(engines) == [("engine_draining", 0, 2), ("engine_left", 0, 2)]
    assert engines.stopped == []  # killed: its trees notice at once


def test_the_pool_grows_with_the_trees_and_lets_pending_engines_go_first(cluster) -> None:
    engines = NotedEngines()
    first = engines.serving("a", num_trees=9)

    async def act() -> None:
        assert [replica.index for replica in engines.replicas] == [0, 1, 2]
        first.num_trees = 4
        await until(lambda: engines.replicas == [first])

    keep(engines, act)
    assert kinds(engines) == [("engine_left", 2, 0), ("engine_left", 1, 0)]


def test_nothing_is_added_once_engines_fail_for_good(cluster) -> None:
    engines = NotedEngines(failure=RuntimeError("five times"))
    first = engines.serving("a", num_trees=9)

    async def act() -> None:
        assert engines.replicas == [first]

    keep(engines, act)


def test_counts_are_noted_when_they_change(cluster) -> None:
    engines = NotedEngines()
    replica = engines.serving("a")

    async def act() -> None:
        await asyncio.sleep(0.1)  # some looks more
        replica.num_trees = 1
        await until(lambda: len(engines.events) == 2)

    keep(engines, act)
    assert [event[0] for event in engines.events] == ["pool", "pool"]


def test_a_look_that_fails_is_noted_and_the_next_one_goes_well(cluster, monkeypatch) -> None:
    looks = iter([ConnectionError("away")])

    def see_nodes() -> Nodes:
        for error in looks:
            raise error
        return cluster

    monkeypatch.setattr(engine_keeper, "see_nodes", see_nodes)
    engines = NotedEngines()
    engines.serving("a")

    async def act() -> None:
        pass

    keep(engines, act)
    assert [event[0] for event in engines.events] == ["keeper_failed", "pool"]
