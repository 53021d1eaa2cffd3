"""Learner workers that go and come with their nodes: real Ray with several nodes, real vLLM."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.conftest import ROOT
from tests.test_training import run_training, trees_of
from treerpo_ray.analysis import Run
from treerpo_ray.metrics import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""Ray notices within seconds that a node is gone."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with room for an engine; train nodes are the test's to add."""
    assert not ray.is_initialized()
    head = {"num_cpus": 1, "resources": {"rollout_slot": 1}, "_system_config": QUICK}
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(
        address=made.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield made
    ray.shutdown()
    made.shutdown()


def wait_for_workers(folder: str, *numbers: int) -> None:
    """Wait until worker groups of these sizes, one after the other, have each done two steps."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        events = read_lines(folder, "events.jsonl")
        kinds = [e["kind"] for e in events if e["kind"] in ("learner_started", "consumed")]
        sizes = [e["workers"] for e in events if e["kind"] == "learner_started"]
        if sizes == list(numbers) and kinds[-2:] == ["consumed"] * 2:
            return
        time.sleep(0.1)
    raise TimeoutError(f"no groups of {numbers} workers")


def test_workers_go_and_come_with_their_nodes_and_every_ticket_is_trained(
    small_config, cluster
) -> None:
    config = small_config(
        "run.name=workers", "run.num_steps=1000", "checkpoint.every=1", "evaluate.data.path=''",
        "engine.resources={CPU: 0.5, rollout_slot: 1}", "learner.num_workers=2",
        "learner.min_workers=1", "learner.resources={CPU: 0.5, train_slot: 1}",
    )  # fmt: skip
    nodes = [cluster.add_node(num_cpus=1, resources={"train_slot": 1}) for _ in range(2)]

    def act() -> None:
        try:
            wait_for_workers(config.folder, 2)
            cluster.remove_node(nodes[1], allow_graceful=False)
            wait_for_workers(config.folder, 2, 1)
            cluster.add_node(num_cpus=1, resources={"train_slot": 1})
            wait_for_workers(config.folder, 2, 1, 2)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # the run ends after its step

    thread = threading.Thread(target=act)
    thread.start()
    run_training(config)
    thread.join()
    run = Run(config.folder)
    metrics, events = run.metrics(), run.events()
    assert events[events.kind == "learner_started"]["workers"].tolist() == [2, 1, 2]
    assert metrics["version"].max() == metrics["learner/grad_norm"].count()
    assert metrics["staleness/max"].max() <= 1
    assert sorted(trees_of(run)) == list(range(6 * int(metrics["step"].max())))
