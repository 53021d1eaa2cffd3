"""The failure drill, short: most kinds of processes are killed, or hang, in a real training."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.drills.kills import Victim
from tests.support.project import PROJECT, load_script
from tests.support.whole_runs import (
    assert_no_tree_was_finished_twice,
    assert_promises_kept,
    assert_versions_count_updates,
)
from treerpo_ray.config import load
from treerpo_ray.study.analysis import Run


def test_a_drill_ends_a_run_that_takes_too_long(tmp_path) -> None:
    chaos = load_script("jobs/drills/chaos.py")
    schedule = [(1, Victim.CORE), (2, Victim.NODE)]
    drill = chaos.Drill(
        config=load([f"run.root={tmp_path}"]), cluster=None, schedule=schedule, num_steps=3
    )
    training = subprocess.Popen(["sleep", "60"])
    drill.run(training, time.monotonic() + 0.5)
    assert training.returncode == -9 and drill.kills == []


@pytest.mark.parametrize("at", ["a node", "the job"])
def test_a_signal_at_any_time_ends_a_drills_job_and_takes_its_cluster_down(monkeypatch, at) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "else the drill sets one for all tests")
    monkeypatch.setenv("RAY_ADDRESS", "set by the drill")
    chaos = load_script("jobs/drills/chaos.py")
    done: list[object] = []
    jobs: list[subprocess.Popen] = []

    def do(what: str) -> None:
        done.append(what)
        if what == at and done.count(what) == 1:
            signal.raise_signal(signal.SIGTERM)

    def work(cluster: object, job: subprocess.Popen) -> None:
        jobs.append(job)
        do("the job")

    def shutdown() -> None:
        done.extend(job.returncode for job in jobs)
        done.append("taken down")

    cluster = SimpleNamespace(
        address="host:6379", add_node=lambda **_: do("a node"), shutdown=shutdown
    )
    with pytest.raises(KeyboardInterrupt):
        chaos.train_on_cluster(["sleep", "60"], chaos.small_cluster(lambda: cluster), work)
    nodes = ["a node", "a node"]  # both are there before any is ended
    more = [] if at == "a node" else ["the job", -signal.SIGKILL]
    assert done == [*nodes, *more, "taken down"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.timeout(3600)
def test_a_run_keeps_its_promises_while_its_parts_are_killed(tmp_path) -> None:
    """One of each kind but an engine's actor, which goes with its node, a core that is killed,
    which `test_engine_faults` has, and a learner, which `test_training` has, and `test_elastic`."""
    kinds = (Victim.HUNG_CORE, Victim.VERIFIER, Victim.NODE)
    done = subprocess.run(
        [
            *(sys.executable, "jobs/drills/chaos.py", "--kills", "3", "--steps", "5"),
            *("--victims", ",".join(kinds)),
            *(f"run.root={tmp_path}", "run.name=drill", "engine.request_timeout_s=30"),
            "verifier.check=tests.support.answers.slow_grades",
            "--minutes=55",  # a drill's own limit is for a machine with nothing else to do
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["broken"] == []
    assert result["kills"] == {kind: int(kind in kinds) for kind in Victim}
    run = Run(str(tmp_path / "drill"))
    metrics, events = run.metrics(), run.events()
    assert_promises_kept(run.folder, f"run.num_steps={metrics.index.max()}")
    assert_versions_count_updates(metrics)
    assert metrics["staleness/max"].max() <= 1
    assert_no_tree_was_finished_twice(run)
    # Neither a verifier nor an engine takes the workers with it.
    assert events[events.kind == "learner_started"]["workers"].tolist() == [2]
    # That of the core, and the one that was on the node.
    assert (events.kind == "engine_lost").sum() >= 2
    assert "engine lost: " in done.stderr
    # The drill ends it by Ctrl-C, as `test_elastic` does by SIGTERM.
    assert "stopped with a checkpoint" in done.stderr
    last = run.folder + f"/checkpoints/step={metrics.index.max():06d}/files.json"
    assert Path(last).exists()
