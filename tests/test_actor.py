"""Actors: what callers are told of an actor's methods is what its class has."""

import inspect
import re
from collections.abc import Callable

import pytest

from treerpo_ray.engine.engine import Engine
from treerpo_ray.engine.replica import EngineApi
from treerpo_ray.metrics.run_log import RunLog, RunLogApi
from treerpo_ray.metrics.watchdog import Heartbeats, HeartbeatsApi, StageApi
from treerpo_ray.search.gate import Gate
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.task import GateApi, TreePoolApi, WeightSyncApi
from treerpo_ray.weight_sync import EnginesApi, WeightSync

PAIRS = [
    (EngineApi, Engine),
    (EnginesApi, TreePool),
    (GateApi, Gate),
    (HeartbeatsApi, Heartbeats),
    (RunLogApi, RunLog),
    (TreePoolApi, TreePool),
    (WeightSyncApi, WeightSync),
    *((StageApi, stage) for stage in (Gate, RunLog, TreePool, WeightSync)),
]


def signature(method: Callable[..., object]) -> str:
    """A method's signature as text, types without their modules."""
    return re.sub(r"[\w.]+\.(?=\w)|['\"]", "", str(inspect.signature(method)))


@pytest.mark.parametrize(("api", "kind"), PAIRS)
def test_what_callers_are_told_of_an_actor_is_what_it_has(api: type, kind: type) -> None:
    told = {name: method for name, method in vars(api).items() if not name.startswith("_")}
    assert told
    for name, method in told.items():
        assert signature(method) == signature(getattr(kind, name)), name
