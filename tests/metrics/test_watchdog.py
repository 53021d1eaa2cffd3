"""The watchdog: looks at the stages, and reports and ends a run that hangs."""

import threading
import time
from dataclasses import replace

import pytest
import ray

from tests.support.stages.hung_stage import Stage
from treerpo_ray.metrics.stage_status import StackDump, StageStatus
from treerpo_ray.metrics.watchdog import Heartbeats, Stages, Watchdog
from treerpo_ray.run_folder.files import RunFolder

LIMIT_S = 60.0
PATIENCE_S = 600.0
"""Far more than anything takes that is waited for."""


def status(stage: str, age_s: float, is_busy: bool = True) -> StageStatus:
    return StageStatus(stage=stage, doing="something", is_busy=is_busy, age_s=age_s)


def test_ages_are_told_by_the_clock_of_the_one_that_collects() -> None:
    now = 100.0
    watch = Heartbeats(clock=lambda: now)
    watch.moved(status("scoring", 0.0))
    watch.moved(status("learner 0", 0.0))
    now = 107.0
    watch.moved(status("learner 0", 0.0))
    now = 110.0
    assert {m.stage: m.age_s for m in watch.statuses()} == {"scoring": 10.0, "learner 0": 3.0}


def test_the_idle_time_of_a_stage_is_what_it_has_waited_for_others_until_now() -> None:
    now = 100.0
    watch = Heartbeats(clock=lambda: now)
    for at, is_busy in ((100.0, False), (103.0, True), (110.0, False)):
        now = at
        watch.moved(status("scoring", 0.0, is_busy))
    watch.moved(status("learner 0", 0.0))
    now = 112.0
    idle = watch.idle()
    assert (idle.at_s, idle.idle_s) == (112.0, {"scoring": 3.0 + 2.0, "learner 0": 0.0})
    watch.forget("learner")
    assert watch.idle().idle_s == {"scoring": 5.0}


def test_workers_that_are_no_more_are_forgotten() -> None:
    watch = Heartbeats()
    for stage in ("learner 0", "learner 1", "scoring"):
        watch.moved(status(stage, 0.0))
    watch.forget("learner")
    watch.moved(status("learner 0", 0.0))
    assert [m.stage for m in watch.statuses()] == ["scoring", "learner 0"]


def test_a_look_that_fails_is_no_stall(tmp_path, caplog) -> None:
    looks = iter([RuntimeError("no answer"), [status("learner 0", 5.0)]])

    def look() -> list[StageStatus]:
        result = next(looks)
        if isinstance(result, RuntimeError):
            raise result
        return result

    watchdog = Watchdog(limit_s=0.2, look=look, folder=RunFolder(str(tmp_path)))
    end = time.monotonic() + PATIENCE_S
    while watchdog.failure is None and time.monotonic() < end:
        time.sleep(0.01)
    watchdog.close()
    assert watchdog.failure is not None
    assert "cannot look: no answer" in caplog.text


def failure_in(folder: str, **times: float) -> str:
    """What a watchdog says of a learner that stands still in the run of that folder."""
    learner = replace(status("learner 0", 5.0), where=", here process 7")
    statuses = [learner, status("gate", 9.0, False)]
    watchdog = Watchdog(limit_s=0.2, look=lambda: statuses, folder=RunFolder(folder), **times)
    end = time.monotonic() + PATIENCE_S
    while watchdog.failure is None and time.monotonic() < end:
        time.sleep(0.01)
    watchdog.close()
    assert watchdog.failure is not None
    return watchdog.failure


@pytest.mark.parametrize("place", ["local", "store"])
def test_a_stall_is_reported_with_all_stages_and_the_stacks_of_this_process(
    place, tmp_path
) -> None:
    folder = str(tmp_path) if place == "local" else f"memory:/{tmp_path}"
    failure = failure_in(folder)
    [report] = RunFolder(folder).glob("logs/stall-*.txt")
    assert failure.startswith("nothing moved for 5 s: learner 0 (busy for 5 s): something; see ")
    assert failure.endswith(f"{folder}/{report}")
    text = RunFolder(folder).read_text(report)
    assert "stalled: learner 0 (busy for 5 s, here process 7)" in text  # ids are for the logs
    assert "stalled: learner 0" in text and "gate (idle for 9 s): something" in text
    assert "test_a_stall_is_reported" in text  # this very frame


def test_a_store_that_hangs_does_not_keep_the_report_of_a_stall(hanging, capfd) -> None:
    assert failure_in(f"{hanging}/run", report_s=0.2).endswith("see standard error")
    assert "stalled: learner 0" in capfd.readouterr().err


def test_a_run_that_moves_is_left_alone(tmp_path) -> None:
    looks = threading.Semaphore(0)

    def look() -> list[StageStatus]:
        looks.release()
        return [status("learner 0", 0.1)]

    watchdog = Watchdog(limit_s=0.2, look=look, folder=RunFolder(str(tmp_path)))
    for _ in range(30):
        assert looks.acquire(timeout=PATIENCE_S)
    watchdog.close()
    assert watchdog.failure is None


@pytest.mark.ray
def test_a_stage_that_does_not_answer_counts_as_busy_and_a_hung_one_writes_its_stacks(
    ray_cluster, tmp_path
) -> None:
    kind = ray.remote(num_cpus=0)(Stage)
    gate, scoring = kind.remote(), kind.remote()
    watch = ray.remote(num_cpus=0)(Heartbeats).remote()
    stages = Stages(actors={"gate": gate}, heartbeats=watch, folder=str(tmp_path), limit_s=3.0)
    end = time.monotonic() + PATIENCE_S
    found = stages()
    while any(m.is_busy for m in found):  # they are starting
        assert time.monotonic() < end, found
        found = stages()
    scoring.hang.remote(watch, str(tmp_path))
    gate.sleep.remote(StackDump(stage="gate", folder=str(tmp_path), limit_s=3.0))
    while {m.stage for m in stages() if m.is_busy} != {"gate", "scoring"}:
        assert time.monotonic() < end
    silent = next(m for m in stages() if m.stage == "gate" and m.is_busy)
    assert "does not answer" in silent.doing and silent.age_s > 0
    for stage, doing in (("scoring", "in hang"), ("gate", "in sleep")):
        stacks = tmp_path / f"logs/stacks-{stage}.txt"
        while doing not in (stacks.read_text() if stacks.exists() else ""):
            assert time.monotonic() < end
            time.sleep(0.05)
    ray.kill(gate)
    ray.kill(scoring)
