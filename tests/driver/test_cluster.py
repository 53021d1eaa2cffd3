"""What a run needs of a cluster and of vLLM, worked out without starting Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from http.server import HTTPServer, SimpleHTTPRequestHandler

import grpc
import pytest
import ray
import torch
from ray._private import services
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.driver.cluster import (
    Capacity,
    await_head,
    check_capacity,
    local_resources,
    look_at_resources,
    places_held,
    session,
)
from treerpo_ray.preflight.machine import machine_gib
from treerpo_ray.preflight.placement import Node, Stage, missing_resources, needed_resources
from treerpo_ray.stop import Stop

CPU = "engine.resources={CPU: 0.5}"
GPU = "engine.resources={CPU: 0.5, GPU: 1}"


def test_role_slots_are_declared_on_a_cluster_of_ones_own() -> None:
    config = load(
        ["engine.num_engines=2", "engine.resources={rollout_slot: 1, GPU: 2, special: 1}"]
    )
    have = local_resources(config, cpus=6, gpus=1)
    assert have == {"CPU": 6, "GPU": 1, "rollout_slot": 2}
    assert missing_resources(needed_resources(config, 2), have) == {"GPU": 3, "special": 2}


def test_without_an_address_there_is_what_this_machine_has(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load(["engine.resources={CPU: 1, rollout_slot: 1}"])
    found = look_at_resources(config)
    cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    assert found.where == "this machine"
    assert found.resources == local_resources(config, cpus=cpus, gpus=gpus)
    assert found.memory_gib == machine_gib()


def test_a_cluster_of_ones_own_has_role_slots_for_all_engines_that_the_pool_may_grow_to() -> None:
    config = load(
        ["engine.resources={rollout_slot: 2}", "engine.max_engines=3", "engine.max_trees=4"]
    )
    assert local_resources(config, cpus=1, gpus=0)["rollout_slot"] == 6


class GrownCluster:
    """A cluster as Ray tells of it, whose autoscaler adds the nodes that it is asked for if it has
    their kind."""

    def __init__(self, *kinds: dict[str, float]) -> None:
        self.kinds = kinds
        self.nodes = [Node({"CPU": 1.0}, {})]
        self.asked: list[list[dict[str, float]]] = []

    def request(self, *, bundles: list[dict[str, float]]) -> None:
        self.asked.append(bundles)
        for bundle in bundles:
            fitting = [kind for kind in self.kinds if missing_resources(bundle, kind) == {}]
            self.nodes.extend(Node(kind, {}) for kind in fitting[:1])

    def look(self) -> Capacity:
        resources: Counter[str] = Counter()
        for node in self.nodes:
            resources.update(node.resources)
        return Capacity(resources=dict(resources), most=None, nodes=self.nodes)

    def places_held(self) -> AbstractContextManager[None]:
        return places_held(
            load(GROWING), trains=True, look=self.look, request=self.request, look_every_s=0.01
        )


@pytest.fixture
def of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is told to use a cluster that is there."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")


GROWING = [
    *("learner.resources={CPU: 2, train_slot: 1}", "learner.num_workers=2"),
    *("learner.min_workers=1", "verifier.resources={CPU: 4, score_slot: 1}"),
    *("engine.resources={GPU: 1}", "engine.max_engines=4", "engine.max_trees=8"),
    "engine.start_timeout_s=0.2",
]


@pytest.mark.usefixtures("of_a_cluster")
def test_nodes_that_are_not_there_yet_are_asked_for_and_waited_for() -> None:
    """Those of the fewest workers and of the scoring; engines ask for their own later."""
    grown = GrownCluster({"CPU": 8.0, "train_slot": 1.0, "score_slot": 1.0})
    starting = [{"CPU": 2, "train_slot": 1}, {"CPU": 4, "score_slot": 1}]
    with grown.places_held():
        assert grown.asked == [starting], "they do not leave meanwhile"
    assert grown.asked == [starting, []], "nothing is held for a run that ends by itself"


@pytest.mark.ray
def test_rays_own_autoscaler_brings_the_nodes_that_a_run_starts_with() -> None:
    command = [sys.executable, "-m", "tests.support.stages.nodes_that_come"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["slots"] == 1
    assert told["refused"].startswith("the cluster lacks {") and "'gone': 1.0" in told["refused"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            {"CPU": 8.0, "train_slot": 1.0},
            r"lacks \{'score_slot': 1.0\} .*which verifier.re",
        ),
        ({"CPU": 8.0, "score_slot": 1.0}, r"lacks \{'train_slot': 1.0\} .*which learner.res"),
        ({"CPU": 1.0, "train_slot": 1.0, "score_slot": 1.0}, r"lacks .*learner.*, verifier"),
    ],
)
@pytest.mark.usefixtures("of_a_cluster")
def test_what_no_node_type_holds_is_one_line_after_a_while(kind, told) -> None:
    grown = GrownCluster(kind)
    with pytest.raises(ValueError, match=told), grown.places_held():
        pass
    assert grown.asked[-1] == []


def test_what_an_autoscaler_says_that_it_may_add_counts_and_needs_no_place_yet() -> None:
    starting = [Stage(key="learner.resources", count=2, resources={"CPU": 4.0})]
    there = Capacity(resources={"CPU": 1.0}, most={"CPU": 8.0}, nodes=[Node({"CPU": 1.0}, {})])
    check_capacity(starting, there)
    with pytest.raises(ValueError, match=r"^the cluster lacks \{'CPU': 1.0\} .*learner.resources"):
        check_capacity(starting, replace(there, most={"CPU": 7.0}))
    with pytest.raises(ValueError, match=r"learner\.resources"):
        check_capacity(starting, replace(there, resources={"CPU": 8.0}, most=None))


def test_a_cluster_that_does_not_answer_is_one_line_after_a_while(caplog) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"^RAY_ADDRESS={address}: nothing answers there"):
            await_head(address, patience_s=0.05)
        assert f"waiting for Ray at {address}, for 0 s more" in caplog.text
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS=head:port: "):
        await_head("head:port")
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS=ray://head:10001: .*`ray job submit`"):
        await_head("ray://head:10001")


class ControlStore(NodeInfoGcsServiceServicer):
    """Answers as the head of a cluster does, or with `code`."""

    def __init__(self, code: grpc.StatusCode | None) -> None:
        self.code = code

    def CheckAlive(self, request: object, context: grpc.ServicerContext) -> CheckAliveReply:
        if self.code is not None:
            context.abort(self.code, "no")
        return CheckAliveReply()


@contextmanager
def head(kind: str) -> Iterator[str]:
    """Something that listens; yields its address."""
    if kind == "silent":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        return
    if kind == "http":
        with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as web:
            threading.Thread(target=web.serve_forever, daemon=True).start()
            yield f"127.0.0.1:{web.server_port}"
            web.shutdown()
        return
    server = grpc.server(ThreadPoolExecutor(1))
    if kind != "grpc":
        code = grpc.StatusCode.UNAUTHENTICATED if kind == "token" else None
        add_NodeInfoGcsServiceServicer_to_server(ControlStore(code), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "silent",
            r"what listens there does not answer as Ray does \(\w+\); start the ",
        ),
        ("http", r"what listens there (does not answer as Ray does|is not Ray)"),
        ("grpc", r"what listens there is not Ray$"),
        ("token", r"Ray is there and asks for another token: set RAY_AUTH_MODE and"),
        ("ray", None),
    ],
)
def test_what_listens_at_the_address_must_be_ray(kind: str, told: str | None) -> None:
    with head(kind) as address:
        if told is None:
            return await_head(address, patience_s=600)
        with pytest.raises(ValueError, match=rf"^RAY_ADDRESS={address}: {told}") as caught:
            await_head(address, patience_s=0.5)
        assert "\n" not in str(caught.value)


def test_a_cluster_of_ones_own_is_not_waited_for() -> None:
    await_head("local", patience_s=0)


def test_no_cluster_on_this_machine_is_one_line(monkeypatch) -> None:
    """`auto` is the one that `ray start` began here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "get_ray_address_from_environment", lambda *_: None)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS=auto: Could not find any running Ray"):
        await_head("auto", patience_s=0)


def test_a_signal_while_a_session_of_ray_begins_is_heeded_once_it_can_be_ended() -> None:
    """Ray would put a handler of its own in the place of ours."""
    done: list[str] = []

    def begin(**_: object) -> None:
        ray._private.utils.set_sigterm_handler(signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        done.append("begun")

    with (
        Stop().at_work(),
        pytest.raises(KeyboardInterrupt),
        session(begin, lambda: done.append("ended")),
    ):
        done.append("used")
    assert done == ["begun", "ended"]
