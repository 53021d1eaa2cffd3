"""Engines that leave with their nodes and come with new ones: a job on several real Ray nodes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.conftest import ROOT, SMALL
from tests.test_training import assert_ledger, assert_versions_count_updates
from treerpo_ray.analysis import Run
from treerpo_ray.metrics import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

ELASTIC = [
    *("engine.resources={CPU: 0.2, rollout_slot: 1}", "engine.labels={role: rollout}"),
    *("engine.num_engines=1", "engine.max_engines=2", "engine.max_trees=4"),
    *("learner.resources={CPU: 0.2, train_slot: 1}", "evaluate.data.path=''"),
    *("checkpoint.every=1000", "run.num_steps=5000"),
]
"""12 trees are in flight, so that two engines of at most 4 are wanted throughout."""
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}
"""Ray notices within seconds that a node is gone."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with room for the learner; rollout nodes are the test's to add."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    head = {
        "num_cpus": 1,
        "resources": {"train_slot": 1},
        "include_dashboard": False,
        "dashboard_agent_listen_port": 0,
        "_system_config": HEALTH,
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


def add_rollout_node(cluster: Cluster):
    return cluster.add_node(num_cpus=1, resources={"rollout_slot": 1}, labels={"role": "rollout"})


def drain(cluster: Cluster, node_id: str, seconds: float) -> None:
    """Tell Ray, as a cloud's agent does on a preemption notice."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    end_ms = int((time.time() + seconds) * 1000)
    client = GcsClient(address=cluster.address)
    is_accepted, why = client.drain_node(node_id, reason, "spot", end_ms)
    assert is_accepted, why


@dataclass
class Job:
    """A training that is under way."""

    process: subprocess.Popen
    folder: Path

    def wait_for(self, kind: str, count: int = 1) -> dict:
        """The event that is the `count`th of its kind, as soon as it is there."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            is_over = self.process.poll() is not None
            path = self.folder / "events.jsonl"
            events = read_lines(str(self.folder), "events.jsonl") if path.exists() else []
            found = [event for event in events if event["kind"] == kind]
            if len(found) >= count:
                return found[count - 1]
            assert not is_over, f"the job ended without {count} {kind}"
            time.sleep(0.1)
        raise TimeoutError(f"no {count} {kind}")


def check_ledger(run: Run) -> None:
    """Every ticket was consumed once, by its step, no tree too old, the learner not disturbed."""
    events = run.events()
    consumed = events[events.kind == "consumed"]["step"].tolist()
    num_steps = len(consumed)
    assert consumed == list(range(num_steps))
    assert_ledger(run.folder, f"run.num_steps={num_steps}")
    finished = sorted(events[events.kind == "tree_finished"]["ticket"])
    assert finished == sorted(set(finished)) and len(finished) >= 6 * num_steps
    assert_versions_count_updates(run.metrics())
    assert run.metrics()["staleness/max"].max() <= 1
    assert (events.kind == "learner_started").sum() == 1


def test_a_node_that_is_lost_or_drained_costs_no_tree(cluster, tmp_path) -> None:
    """One node vanishes, then the other is drained; engines come up on new nodes each time."""
    lost = add_rollout_node(cluster)
    command = [sys.executable, "jobs/train.py", *SMALL, f"run.root={tmp_path}", "run.name=nodes"]
    shown = tmp_path / "shown"
    with shown.open("w") as output:
        process = subprocess.Popen([*command, *ELASTIC], cwd=ROOT, stderr=output)
    job = Job(process, tmp_path / "nodes")
    try:
        job.wait_for("consumed")  # with one engine: the second is wanted, but has no node yet
        drained = add_rollout_node(cluster)
        job.wait_for("engine_serving", 2)
        cluster.remove_node(lost, allow_graceful=False)
        job.wait_for("engine_lost")
        add_rollout_node(cluster)
        job.wait_for("engine_serving", 3)
        drain(cluster, drained.node_id, seconds=30)
        job.wait_for("engine_left")
        add_rollout_node(cluster)
        job.wait_for("engine_serving", 4)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, (
            shown.read_text()
        )  # it ended after a step, as asked
    finally:
        process.kill()
    run = Run(str(job.folder))
    check_ledger(run)
    events = run.events()
    # More than once where Ray put it on the node that was gone and not yet missed.
    assert set(events[events.kind == "engine_lost"]["engine"]) == {0}
    [draining] = events[events.kind == "engine_draining"].itertuples()
    [left] = events[events.kind == "engine_left"].itertuples()
    assert draining.node == left.node == drained.node_id
    assert draining.reason == "its node is drained"
    assert left.trees == 0 and left.reason == "it is drained"
    joined = events[events.kind == "engine_serving"]
    assert joined["node"].nunique() == 4
    assert joined["version"].is_monotonic_increasing and joined["version"].iloc[-1] > 0
    assert "engine draining: " in shown.read_text()
