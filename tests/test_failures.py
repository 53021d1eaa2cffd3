"""Whole runs in which what they run on fails: engine cores, and the driver with its cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, SMALL
from tests.test_training import (
    assert_ledger,
    assert_versions_count_updates,
    run_training,
    sampled,
    trees_of,
)
from treerpo_ray.analysis import Run
from treerpo_ray.metrics import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

STEPS = 3
STRICT = [
    *("gate.max_staleness=0", "checkpoint.every=1", "evaluate.data.path=''"),
    f"run.num_steps={STEPS}",
]


def wait_for_step(folder: str, step: int) -> None:
    """Wait until the metrics of learner step `step` are written."""
    while not any(row["step"] >= step for row in read_lines(folder, "metrics.jsonl")):
        time.sleep(0.02)


def actor_of(folder: str, engine: int) -> psutil.Process:
    """The newest actor of an engine."""
    serving = [e for e in read_lines(folder, "events.jsonl") if e["kind"] == "engine_serving"]
    return psutil.Process([event["pid"] for event in serving if event["engine"] == engine][-1])


def core_of(folder: str, engine: int) -> psutil.Process:
    """The process of vLLM's core under the newest actor of an engine."""
    (core,) = [
        child
        for child in actor_of(folder, engine).children(recursive=True)
        if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())
    ]
    return core


def assert_gone(process: psutil.Process) -> None:
    """It must not go on holding an engine's memory."""
    psutil.wait_procs([process], timeout=30)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_engines_that_are_killed_or_hang_cost_no_ticket_and_leave_no_core(
    small_config, ray_cluster
) -> None:
    config = small_config(
        "run.name=cores", "run.num_steps=8", "engine.num_engines=2", "engine.resources.CPU=0.4",
        "engine.request_timeout_s=20", "evaluate.data.path=''",
    )  # fmt: skip
    hit: list[psutil.Process] = []

    def strike() -> None:
        for step, number, engine in ((1, signal.SIGKILL, 0), (3, signal.SIGSTOP, 1)):
            wait_for_step(config.folder, step)
            hit.append(core_of(config.folder, engine))
            hit[-1].send_signal(number)
        wait_for_step(config.folder, 5)
        hit.append(core_of(config.folder, 0))
        actor_of(config.folder, 0).kill()  # its core must not outlive it

    striker = threading.Thread(target=strike, daemon=True)
    striker.start()
    outcome, shown = run_training(config)
    striker.join()
    assert outcome.is_complete
    run = Run(config.folder)
    metrics, events = run.metrics(), run.events()
    assert set(events[events.kind == "engine_lost"]["engine"]) == {0, 1}
    assert shown.count("engine lost") >= 2
    assert events[events.kind == "consumed"]["step"].tolist() == list(range(8))
    assert_ledger(config.folder)
    assert metrics["staleness/max"].max() <= 1
    assert_versions_count_updates(metrics)
    for core in hit:
        assert_gone(core)


def start_run(root: Path, name: str) -> subprocess.Popen[str]:
    """`jobs/train.py` with a cluster of its own."""
    arguments = [*SMALL, *STRICT, f"run.root={root}", f"run.name={name}"]
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_after_its_driver_was_killed_the_same_command_goes_on_with_the_same_trees(tmp_path) -> None:
    whole = start_run(tmp_path, "whole")
    _, shown = whole.communicate()
    assert whole.returncode == 0, shown

    killed, folder = start_run(tmp_path, "killed"), str(tmp_path / "killed")
    wait_for_step(folder, STEPS - 1)
    core = core_of(folder, 0)
    killed.kill()
    killed.communicate()
    assert_gone(core)
    newest = max((tmp_path / "killed/checkpoints").glob("step=*"))
    os.truncate(newest / "optimizer.pt", 100)

    again = start_run(tmp_path, "killed")
    _, shown = again.communicate()
    assert again.returncode == 0, shown
    assert "checkpoint passed over: step" in shown
    assert "optimizer.pt is corrupt" in shown
    assert_ledger(folder)
    run = Run(folder)
    ours, theirs = trees_of(run), trees_of(Run(str(tmp_path / "whole")))
    for ticket, record in ours.items():
        assert record.seed == theirs[ticket].seed
        assert sampled(record) == sampled(theirs[ticket])
    metrics = run.metrics()
    assert metrics.index.tolist() == [1, 2, 3]
    assert_versions_count_updates(metrics)
    assert metrics["staleness/max"].max() == 0
    assert (run.events().kind == "learner_started").sum() == 2
