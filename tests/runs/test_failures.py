"""Whole runs in which what they run on fails: engines, a worker, the head, and the driver."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.project import ROOT, SMALL
from tests.support.whole_runs import (
    STRICT,
    assert_gone,
    assert_ledger,
    assert_no_tree_was_finished_twice,
    assert_same_trees,
    assert_saved_trees_were_reused,
    assert_versions_count_updates,
    process_of,
    run_training,
    wait_for_step,
)
from treerpo_ray.study.analysis import Run

pytestmark = [pytest.mark.ray, pytest.mark.engine]


def second_worker(folder: str) -> psutil.Process:
    """The train worker that is not the first one."""
    first = process_of(folder, "learner_started")
    raylet = first.ppid()
    [other] = [
        process
        for process in psutil.process_iter(["ppid", "cmdline"])
        if process.info["ppid"] == raylet
        and process != first
        and "ray::RayTrainWorker" in " ".join(process.info["cmdline"])
    ]
    return other


def test_a_run_of_two_workers_and_two_engines_outlives_a_lost_engine_a_lost_worker_and_a_hung_core(
    small_config, ray_cluster
) -> None:
    config = small_config(
        "run.name=two", "run.num_steps=8", "learner.num_workers=2", "engine.num_engines=2",
        "engine.resources.CPU=0.4", "learner.resources.CPU=0.4", "engine.request_timeout_s=20",
        "evaluate.data.path=''",
    )  # fmt: skip
    folder, cores = config.folder, list[psutil.Process]()

    def core(engine: int) -> psutil.Process:
        cores.append(process_of(folder, "engine_serving", "core", engine=engine))
        return cores[-1]

    def strike() -> None:
        wait_for_step(folder, 1)
        core(0)
        process_of(folder, "engine_serving", engine=0).kill()
        wait_for_step(folder, 3)
        worker = second_worker(folder)
        worker.suspend()
        time.sleep(3)  # until the first one waits for it in a collective
        worker.kill()
        wait_for_step(folder, 5)
        core(1).suspend()

    striker = threading.Thread(target=strike, daemon=True)
    striker.start()
    outcome, shown = run_training(config)
    striker.join()
    assert outcome.is_complete
    run = Run(folder)
    metrics, events = run.metrics(), run.events()
    assert set(events[events.kind == "engine_lost"]["engine"]) == {0, 1}
    assert shown.count("engine lost") >= 2 and shown.count("learner lost") == 1
    assert events[events.kind == "learner_started"]["workers"].tolist() == [2, 2]
    assert_no_tree_was_finished_twice(run)
    assert_saved_trees_were_reused(run)
    saved = events[events.kind == "learner_started"]["saved_trees"]
    assert saved.iloc[1] > 0  # these tickets were out a whole step before
    assert_ledger(folder)
    assert metrics["staleness/max"].max() <= 1
    assert_versions_count_updates(metrics)
    for process in cores:
        assert_gone(process)


def start_run(root: Path) -> subprocess.Popen[str]:
    """`jobs/train.py` with a cluster of its own, for the run that `strict` is without a break."""
    settings = ["run.num_steps=3", "checkpoint.every=1", "evaluate.data.path=''"]
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", *SMALL, *STRICT, *settings, f"run.root={root}"],
        cwd=ROOT,
        # Ray's processes wait so long for a head that is gone before they end; else a minute.
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_gcs_rpc_server_reconnect_timeout_s": "3"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_after_its_head_and_its_driver_were_killed_the_same_command_goes_on_with_the_same_trees(
    strict, tmp_path
) -> None:
    folder = tmp_path / "quickstart"
    headless = start_run(tmp_path)
    wait_for_step(str(folder), 1)
    core = process_of(str(folder), "engine_serving", "core")
    core.suspend()  # else the run might be over before Ray misses its head
    [head] = [p for p in psutil.Process(headless.pid).children() if p.name() == "gcs_server"]
    head.kill()
    _, shown = headless.communicate(timeout=300)
    assert headless.returncode > 0 and "GCS may have been killed" in shown
    core.resume()
    assert_gone(core)

    killed = start_run(tmp_path)
    wait_for_step(str(folder), 2)
    core = process_of(str(folder), "engine_serving", "core")
    killed.kill()
    killed.communicate()
    assert_gone(core)
    newest = max((folder / "checkpoints").glob("step=*"))
    os.truncate(newest / "optimizer.pt", 100)

    again = start_run(tmp_path)
    _, shown = again.communicate()
    assert again.returncode == 0, shown
    assert "checkpoint passed over: step" in shown
    assert "optimizer.pt is corrupt" in shown
    assert_ledger(str(folder))
    run = Run(str(folder))
    assert_same_trees(run, strict[0])
    metrics = run.metrics()
    assert metrics.index.tolist() == [1, 2, 3]
    assert_versions_count_updates(metrics)
    assert metrics["staleness/max"].max() == 0
    assert (run.events().kind == "learner_started").sum() == 3
