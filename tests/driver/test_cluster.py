"""What a run needs of a cluster and of vLLM, worked out without starting Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import HTTPServer, SimpleHTTPRequestHandler

import grpc
import pytest
import torch
from ray._private import services
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from tests.support.project import ROOT
from treerpo_ray.config import Config, load
from treerpo_ray.driver import cluster
from treerpo_ray.driver.cluster import await_head, local_resources, look_at_resources
from treerpo_ray.preflight.placement import (
    missing_resources,
    needed_resources,
)
from treerpo_ray.stop import Stop

CPU = "engine.resources={CPU: 0.5}"
GPU = "engine.resources={CPU: 0.5, GPU: 1}"


def test_role_slots_are_declared_on_a_cluster_of_ones_own(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load(
        ["engine.num_engines=2", "engine.resources={rollout_slot: 1, GPU: 2, special: 1}"]
    )
    have = local_resources(config)
    assert have == {"CPU": 6, "GPU": 1, "rollout_slot": 2}
    assert missing_resources(needed_resources(config, 2), have) == {"GPU": 3, "special": 2}


def test_a_cluster_of_ones_own_has_role_slots_for_all_engines_that_the_pool_may_grow_to() -> None:
    config = load(
        ["engine.resources={rollout_slot: 2}", "engine.max_engines=3", "engine.max_trees=4"]
    )
    assert local_resources(config)["rollout_slot"] == 6


@pytest.fixture
def grown_cluster(monkeypatch: pytest.MonkeyPatch):
    """A cluster as Ray tells of it, whose autoscaler adds the nodes that it is asked for if it has
    their kind; returns what it was asked."""
    asked: list[list[dict[str, float]]] = []
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {}}]

    def start(kinds: list[dict[str, float]]) -> list[list[dict[str, float]]]:
        def request(*, bundles: list[dict[str, float]]) -> None:
            asked.append(bundles)
            for bundle in bundles:
                fitting = [kind for kind in kinds if missing_resources(bundle, kind) == {}]
                nodes.extend({"Alive": True, "Resources": k, "Labels": {}} for k in fitting[:1])

        def resources() -> dict[str, float]:
            names = {name for node in nodes for name in node["Resources"]}
            return {n: sum(node["Resources"].get(n, 0.0) for node in nodes) for n in names}

        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        monkeypatch.setattr(cluster, "request_resources", request)
        monkeypatch.setattr(cluster, "LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(cluster.ray, "cluster_resources", resources)
        monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(cluster, "check_versions", lambda stages: None)  # none is a real one
        found = cluster.ray_state
        monkeypatch.setattr(found, "get_max_resources_from_cluster_config", lambda: None)
        return asked

    return start


GROWING = [
    *("learner.resources={CPU: 2, train_slot: 1}", "learner.num_workers=2"),
    *("learner.min_workers=1", "verifier.resources={CPU: 4, score_slot: 1}"),
    *("engine.resources={GPU: 1}", "engine.max_engines=4", "engine.max_trees=8"),
    "engine.start_timeout_s=0.2",
]


def test_nodes_that_are_not_there_yet_are_asked_for_and_waited_for(grown_cluster) -> None:
    """Those of the fewest workers and of the scoring; engines ask for their own later."""
    asked = grown_cluster([{"CPU": 8.0, "train_slot": 1.0, "score_slot": 1.0}])
    cluster._await_cluster(load(GROWING), trains=True)
    first, last = asked
    assert first == [{"CPU": 2, "train_slot": 1}, {"CPU": 4, "score_slot": 1}]
    assert last == [], "nothing is held for a run that ends by itself"


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_rays_own_autoscaler_brings_the_nodes_that_a_run_starts_with() -> None:
    command = [sys.executable, "-m", "tests.support.stages.nodes_that_come"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
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
def test_what_no_node_type_holds_is_one_line_after_a_while(grown_cluster, kind, told) -> None:
    asked = grown_cluster([kind])
    with pytest.raises(ValueError, match=told):
        cluster._await_cluster(load(GROWING), trains=True)
    assert asked[-1] == []


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
            return await_head(address, patience_s=60)
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


def use(config: Config) -> None:
    with cluster.connected(config):
        pass


@pytest.mark.parametrize("begin", [look_at_resources, use])
def test_a_signal_while_a_session_of_ray_begins_is_heeded_once_it_can_be_ended(
    begin, monkeypatch
) -> None:
    """Ray would put a handler of its own in the place of ours."""
    done: list[str] = []

    def init(**_: object) -> None:
        cluster.utils.set_sigterm_handler(signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        done.append("begun")

    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    monkeypatch.setattr(cluster, "await_head", lambda *_, **__: None)
    monkeypatch.setattr(cluster, "_await_cluster", lambda *_, **__: None)
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: done.append("ended"))
    with Stop().at_work(), pytest.raises(KeyboardInterrupt):
        begin(load([]))
    assert done == ["begun", "ended"]
