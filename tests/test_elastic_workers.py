"""Learner workers that go and come with their nodes: real Ray with several nodes, real vLLM."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import ROOT, SMALL
from tests.test_elastic import HEALTH
from tests.test_training import assert_ledger, assert_versions_count_updates
from treerpo_ray.analysis import Run
from treerpo_ray.metrics import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

WORKERS = [
    *("run.num_steps=1000", "checkpoint.every=1", "evaluate.data.path=''"),
    "engine.resources={CPU: 0.5, rollout_slot: 1}",
    *("learner.num_workers=2", "learner.min_workers=1"),
    "learner.resources={CPU: 0.5, train_slot: 1}",
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with room for an engine; train nodes are the test's to add."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    head = {"num_cpus": 1, "resources": {"rollout_slot": 1}, "_system_config": HEALTH}
    made = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
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
    cluster: Cluster, tmp_path
) -> None:
    nodes = [cluster.add_node(num_cpus=1, resources={"train_slot": 1}) for _ in range(2)]
    folder, shown = tmp_path / "workers", tmp_path / "shown"
    command = [sys.executable, "jobs/train.py", *SMALL, f"run.root={tmp_path}", "run.name=workers"]
    with shown.open("w") as output:
        job = subprocess.Popen([*command, *WORKERS], cwd=ROOT, stderr=output)
    try:
        wait_for_workers(str(folder), 2)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for_workers(str(folder), 2, 1)
        cluster.add_node(num_cpus=1, resources={"train_slot": 1})
        wait_for_workers(str(folder), 2, 1, 2)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=120) == 130, shown.read_text()  # it ended after a step, as asked
    finally:
        job.kill()
    run = Run(str(folder))
    metrics, events = run.metrics(), run.events()
    assert events[events.kind == "learner_started"]["workers"].tolist() == [2, 1, 2]
    assert_versions_count_updates(metrics)
    assert metrics["staleness/max"].max() <= 1
    assert_ledger(str(folder), f"run.num_steps={metrics.index.max()}")
