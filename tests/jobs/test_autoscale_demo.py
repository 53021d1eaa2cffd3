"""Ray's autoscaler and a real run: the demonstration as a user calls it."""

import os
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.project import PROJECT, load_script
from tests.support.whole_runs import (
    Job,
    assert_no_tree_was_finished_twice,
    assert_promises_kept,
    assert_versions_count_updates,
)
from treerpo_ray.metrics.console import Console
from treerpo_ray.run_folder.files import Scalar
from treerpo_ray.stop import STOPPED, Stop
from treerpo_ray.study.analysis import Run


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The demonstration as a module."""
    return load_script("jobs/drills/autoscale_demo.py")


def test_rays_autoscaler_takes_the_demonstrations_cluster(demo) -> None:
    """What its monitor does with the file; it dies of a field that is missing, and nobody hears."""
    config = prepare_config(demo._cluster_config("127.0.0.1:1"))
    validate_config(config)
    assert config["available_node_types"]["rollout"]["labels"] == {"role": "rollout"}


def test_the_demonstrations_nodes_ask_for_a_token_of_their_own(demo) -> None:
    started = []
    for _ in range(2):
        given = {"PATH": "/bin"}
        demo.ask_for_token(given)
        started.append(demo.head_environment(given, "mark"))
    assert {env["RAY_AUTH_MODE"] for env in started} == {"token"}
    assert len({env["RAY_AUTH_TOKEN"] for env in started}) == 2
    assert all(len(env["RAY_AUTH_TOKEN"]) == 64 for env in started)


@pytest.mark.parametrize("at", ["the start", "the run", "the wait for idle nodes"])
def test_a_signal_at_any_time_takes_the_demonstrations_cluster_down(demo, monkeypatch, at) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "set by the demonstration")
    heads: list[subprocess.Popen] = []
    done: list[str] = []

    def do(what: str) -> object:
        done.append(what)
        if what == at:
            signal.raise_signal(signal.SIGTERM)
        return SimpleNamespace(is_complete=True)

    def start(folder: str, environment: dict[str, str]) -> str:
        heads.append(subprocess.Popen(["sleep", "600"], env=environment))
        do("the start")
        return "host:6379"

    def train() -> object:
        with Stop().at_work():  # as a run has its own
            pass
        return do("the run")

    with pytest.raises(KeyboardInterrupt):
        demo.on_growing_cluster(
            train, Console(), start, lambda address: do("the wait for idle nodes")
        )
    assert done[-1] == at
    assert [head.wait(60) for head in heads] == [-signal.SIGKILL], "taken down"


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.slow
def test_ray_starts_and_takes_away_nodes_as_trees_come_and_go(tmp_path) -> None:
    """The demonstration, smaller: many trees in hand, then no more than one engine grows, and a
    Ctrl-C once the second node has come and gone."""
    command = [sys.executable, "jobs/drills/autoscale_demo.py", f"run.root={tmp_path}"]
    smaller = [
        *("run.name=scaled", "run.num_steps=1000", "gate.trees_per_step=2"),
        *("engine.max_engines=2", "engine.max_trees=4", "engine.shrink_after_s=4"),
        "evaluate.data.num_problems=150",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    shown = tmp_path / "shown"
    with shown.open("w") as output:
        process = subprocess.Popen(
            [*command, *smaller], cwd=PROJECT, env=environment, stderr=output
        )
    job = Job(process, tmp_path / "scaled")
    try:
        job.wait("second node that comes and goes, and two steps", has_shrunk_and_trained)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=1800) == STOPPED, shown.read_text()
    finally:
        process.terminate()  # it takes its cluster down
        process.wait(timeout=1800)
    assert "no rollout node is left" in shown.read_text()
    run = Run(str(job.folder))
    assert_promises_kept(run.folder, f"run.num_steps={run.metrics().index.max()}")
    assert_no_tree_was_finished_twice(run)
    assert_versions_count_updates(run.metrics())
    assert run.metrics()["staleness/max"].max() <= 1
    events = run.events()
    assert (events.kind == "learner_started").sum() == 1
    assert set(events[events.kind == "engine_serving"]["engine"]) <= {0, 1}
    # An engine that has not come up yet leaves at once, one that serves drains first.
    leaving = events[events.kind.isin(["engine_draining", "engine_left"])]
    assert 1 in set(leaving[leaving.reason == "fewer are enough"]["engine"])
    assert (job.folder / "pool.png").stat().st_size > 10_000


def has_shrunk_and_trained(events: list[dict[str, Scalar]]) -> bool:
    """Whether there were three nodes, then two, and steps."""
    nodes = [event["nodes"] for event in events if event["kind"] == "pool"]
    num_steps = sum(event["kind"] == "consumed" for event in events)
    return 3 in nodes and 2 in nodes[nodes.index(3) :] and num_steps >= 2
