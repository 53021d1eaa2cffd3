"""Engines and learner workers that leave with their nodes and come with new ones: a job on several
real Ray nodes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from jobs.drills.autoscale_demo import free_ports
from tests.support.project import PROJECT, SMALL
from tests.support.whole_runs import (
    Job,
    assert_no_tree_was_finished_twice,
    assert_promises_kept,
    assert_versions_count_updates,
)
from treerpo_ray.study.analysis import Run

ELASTIC = [
    *(str(PROJECT / "conf/methods/adaptive.yaml"), "learner.fork_every=2"),
    "tree.num_children=[4,4]",
    *("engine.resources={CPU: 0.2, rollout_slot: 1}", "engine.labels={role: rollout}"),
    *("engine.num_engines=1", "engine.max_engines=2", "engine.max_trees=1"),
    *("learner.num_workers=2", "learner.min_workers=1", "learner.shard=true"),
    *("learner.resources={CPU: 0.5, train_slot: 1}", "evaluate.data.path=''"),
    *(
        "checkpoint.every=1",
        "run.num_steps=5000",
        "verifier.check=tests.support.answers.slow_grades",
    ),
]
"""12 trees are in flight, so that two engines of one at a time are wanted at any time."""
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}
"""Ray notices within seconds that a node is gone."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without room for engines or workers; their nodes are the test's to add."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        # Ray tries it all the same, and leaves a socket open where another Ray has the port.
        "dashboard_port": free_ports(1)[0],
        "dashboard_agent_listen_port": 0,
        "_system_config": HEALTH,
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


def add_train_node(cluster: Cluster):
    return cluster.add_node(num_cpus=1, resources={"train_slot": 1})


def add_rollout_node(cluster: Cluster):
    return cluster.add_node(num_cpus=1, resources={"rollout_slot": 1}, labels={"role": "rollout"})


def drain(cluster: Cluster, node_id: str, seconds: float) -> None:
    """Tell Ray, as a cloud's agent does on a preemption notice."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    end_ms = int((time.time() + seconds) * 1000)
    client = GcsClient(address=cluster.address)
    is_accepted, why = client.drain_node(node_id, reason, "spot", end_ms)
    assert is_accepted, why


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nodes_of_workers_and_engines_come_and_go_and_cost_no_ticket(cluster, tmp_path) -> None:
    """A node for a second worker and one for a second engine come up; then that of the worker that
    was there first vanishes and the other is drained. Workers have parts of the model: those of two
    go on with one, and back. In `test_chaos` a node of an engine vanishes, and workers have the
    whole."""
    add_rollout_node(cluster)
    lost = add_train_node(cluster)
    command = [sys.executable, "jobs/train.py", *SMALL, f"run.root={tmp_path}", "run.name=nodes"]
    shown = tmp_path / "shown"
    with shown.open("w") as output:
        process = subprocess.Popen([*command, *ELASTIC], cwd=PROJECT, stderr=output)
    job = Job(process, tmp_path / "nodes")
    try:
        job.wait_for_workers(1)  # with one engine: a second of both is wanted, but has no node yet
        add_train_node(cluster)  # Ray Train looks for it every few seconds
        drained = add_rollout_node(cluster)
        job.wait_for("engine_serving", 2)
        job.wait_for_workers(1, 2)
        cluster.remove_node(lost, allow_graceful=False)
        drain(cluster, drained.node_id, seconds=60)
        job.wait_for("engine_left")
        job.wait_for_workers(1, 2, 1)
        process.send_signal(signal.SIGTERM)  # as `ray job stop` does
        assert process.wait(timeout=1800) == 130, shown.read_text()
    finally:
        process.kill()
    run = Run(str(job.folder))
    metrics, events = run.metrics(), run.events()
    # The shape of trees is chosen by what checkpoints hold, too.
    assert metrics["tree/next_children_depth_1"].notna().sum() >= 2
    told = events.reindex(columns=["kind", "from_step", "shape"])  # there need not be any
    chosen = told[told.kind == "shape_chosen"].drop_duplicates("from_step", keep="last")
    shapes = ["[1, 1]", *chosen["shape"]]
    assert all(before != after for before, after in pairwise(shapes))
    assert metrics["tree/answers"].loc[1] == 1, "nothing is known yet"
    assert metrics["tree/answers"].loc[2] == 16, "the trees of the second step measure"
    # Only nodes of workers disturb the learner.
    assert events[events.kind == "learner_started"]["workers"].tolist() == [1, 2, 1]
    assert_versions_count_updates(metrics)
    assert_no_tree_was_finished_twice(run)
    assert metrics["staleness/max"].max() <= 1
    assert_promises_kept(run.folder, f"run.num_steps={metrics.index.max()}")
    assert (events.kind == "engine_lost").sum() == 0
    [draining] = events[events.kind == "engine_draining"].itertuples()
    assert draining.node == drained.node_id
    # One that was asked for again may be let go, too: at the end, before it has a node, or if Ray
    # puts it on the same one, which is still there.
    leaving = events[(events.kind == "engine_left") & (events.node == drained.node_id)]
    left, *_ = leaving.itertuples()
    assert (leaving.trees == 0).all()
    assert draining.reason == "its node is drained"
    assert left.trees == 0 and left.reason == "it is drained"
    joined = events[events.kind == "engine_serving"]
    assert joined["engine"].tolist() == [0, 1]
    assert joined["version"].iloc[1] > 0  # it took over what had been learned
    assert "engine draining: " in shown.read_text()
    assert "stopped with a checkpoint" in shown.read_text()
