"""A whole run in which what it runs on fails: engines and a worker."""

import threading
import time

import psutil
import pytest

from tests.support.whole_runs import (
    assert_gone,
    assert_no_tree_was_finished_twice,
    assert_promises_kept,
    assert_saved_trees_were_reused,
    assert_versions_count_updates,
    process_of,
    run_training,
    wait_for_step,
)
from treerpo_ray.study.analysis import Run

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]


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
        "engine.load_timeout_s=30",
        "evaluate.data.path=''", "verifier.check=tests.support.slow_grades",
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
    assert_promises_kept(folder)
    assert metrics["staleness/max"].max() <= 1
    assert_versions_count_updates(metrics)
    for process in cores:
        assert_gone(process)
