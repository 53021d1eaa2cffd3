"""Ray's autoscaler and a real run: the demonstration as a user calls it."""

import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.project import ROOT, load_script
from tests.support.whole_runs import (
    Job,
    assert_no_tree_was_finished_twice,
    assert_promises_kept,
    assert_versions_count_updates,
    process_of,
)
from treerpo_ray.run_folder.files import Scalar
from treerpo_ray.study.analysis import Run


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The demonstration as a module."""
    return load_script("jobs/autoscale_demo.py")


def test_rays_autoscaler_takes_the_demonstrations_cluster(demo) -> None:
    """What its monitor does with the file; it dies of a field that is missing, and nobody hears."""
    config = prepare_config(demo._cluster_config("127.0.0.1:1"))
    validate_config(config)
    assert config["available_node_types"]["rollout"]["labels"] == {"role": "rollout"}


def test_the_demonstrations_nodes_ask_for_a_token_of_their_own(demo, monkeypatch, tmp_path) -> None:
    started: list[dict[str, str]] = []

    def start(command: list[str], env: dict[str, str], **_: object) -> object:
        started.append(env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", start)
    for _ in range(2):
        with monkeypatch.context() as environment:
            environment.setattr(os, "environ", {"PATH": "/bin"})
            demo._ask_for_token()
            demo._start_head(str(tmp_path), "mark")
    assert {env["RAY_AUTH_MODE"] for env in started} == {"token"}
    assert len({env["RAY_AUTH_TOKEN"] for env in started}) == 2
    assert all(len(env["RAY_AUTH_TOKEN"]) == 64 for env in started)


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_ray_starts_and_takes_away_nodes_as_trees_come_and_go(tmp_path) -> None:
    """The demonstration, without its long evaluations: twelve trees in hand, which two engines
    grow, none while its learner stands still, and twelve again."""
    command = [sys.executable, "jobs/autoscale_demo.py", f"run.root={tmp_path}"]
    smaller = [
        *("run.name=scaled", "run.num_steps=5000", "evaluate.data.path=''"),
        *("engine.max_engines=2", "engine.max_trees=4", "engine.shrink_after_s=20"),
        "verifier.check=tests.support.slow_grades",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    shown = tmp_path / "shown"
    with shown.open("w") as output:
        process = subprocess.Popen([*command, *smaller], cwd=ROOT, env=environment, stderr=output)
    job = Job(process, tmp_path / "scaled")
    try:
        job.wait_for("engine_serving", 2)
        worker = process_of(str(job.folder), "learner_started")
        worker.suspend()
        job.wait_for("engine_left")
        job.wait("fewer nodes", lambda events: nodes_of(events)[-1] == 2)
        worker.resume()
        job.wait("more nodes again", lambda events: nodes_of(events)[-1] == 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=1800) == 1, shown.read_text()
    finally:
        process.kill()
    assert "stopped with a checkpoint" in shown.read_text()
    assert "no rollout node is left" in shown.read_text()
    run = Run(str(job.folder))
    metrics, events = run.metrics(), run.events()
    assert_promises_kept(run.folder, f"run.num_steps={metrics.index.max()}")
    assert_no_tree_was_finished_twice(run)
    assert_versions_count_updates(metrics)
    assert metrics["staleness/max"].max() <= 1
    assert (events.kind == "learner_started").sum() == 1
    assert set(events[events.kind == "engine_serving"]["engine"]) == {0, 1}
    # An engine that serves is drained before it leaves.
    leaving = events[events.kind.isin(["engine_draining", "engine_left"])]
    assert leaving.iloc[0]["kind"] == "engine_draining"
    assert leaving.iloc[0]["reason"] == "fewer are enough"
    assert (job.folder / "pool.png").stat().st_size > 10_000


def nodes_of(events: list[dict[str, Scalar]]) -> list[Scalar]:
    """Nodes of the cluster, at each look of the pool."""
    return [event["nodes"] for event in events if event["kind"] == "pool"]
