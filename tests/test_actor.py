"""Actors: what callers are told of an actor's methods is what its class has."""

import inspect
import re
from collections.abc import Callable

import pytest
from ray.util.tracing.tracing_helper import _inject_tracing_into_class

from treerpo_ray.actor import is_asynchronous
from treerpo_ray.engine.engine import Engine
from treerpo_ray.engine.types import EngineApi
from treerpo_ray.metrics.events import RunLogApi
from treerpo_ray.metrics.run_log import RunLog
from treerpo_ray.metrics.stage_status import StageApi
from treerpo_ray.metrics.watchdog import Heartbeats, HeartbeatsApi
from treerpo_ray.search.gate import Gate
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.task import GateApi, TreePoolApi, WeightSyncApi
from treerpo_ray.weight_sync import EnginesApi, WeightSync
from treerpo_ray.weights.source import PlacesApi
from treerpo_ray.weights.store import WeightStore, WeightStoreApi

PAIRS = [
    (EngineApi, Engine),
    (EnginesApi, TreePool),
    (GateApi, Gate),
    (HeartbeatsApi, Heartbeats),
    (PlacesApi, WeightSync),
    (RunLogApi, RunLog),
    (TreePoolApi, TreePool),
    (WeightStoreApi, WeightStore),
    (WeightSyncApi, WeightSync),
    *((StageApi, stage) for stage in (Gate, RunLog, TreePool, WeightSync)),
]


def signature(method: Callable[..., object]) -> str:
    """A method's signature as text, types without their modules, and without the argument that Ray
    gives a method of a class once an actor was made of it."""
    own = inspect.signature(method)
    told = [own.parameters[name] for name in own.parameters if name != "_ray_trace_ctx"]
    text = str(own.replace(parameters=told))
    return re.sub(r"[\w.]+\.(?=\w)|['\"]", "", text)


def test_a_signature_is_the_same_once_an_actor_was_made_of_its_class() -> None:
    class Counter:
        def add(self, number: int) -> int:
            return number

    before = signature(Counter.add)
    _inject_tracing_into_class(Counter)
    assert "_ray_trace_ctx" in inspect.signature(Counter.add).parameters
    assert signature(Counter.add) == before == "(self, number: int) -> int"


def test_stages_are_asynchronous_but_for_those_that_do_one_thing_at_a_time() -> None:
    """Ray starts a thread for each call that another kind of actor may have under way."""
    found = {kind: is_asynchronous(kind) for _, kind in PAIRS}
    assert {kind for kind, is_so in found.items() if not is_so} == {Heartbeats, RunLog}
    _inject_tracing_into_class(RunLog)
    assert not is_asynchronous(RunLog)


@pytest.mark.parametrize(("api", "kind"), PAIRS)
def test_what_callers_are_told_of_an_actor_is_what_it_has(api: type, kind: type) -> None:
    told = {name: method for name, method in vars(api).items() if not name.startswith("_")}
    assert told
    for name, method in told.items():
        assert signature(method) == signature(getattr(kind, name)), name
