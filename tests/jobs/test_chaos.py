"""The failure drill, short: every kind of process is killed once in a real training."""

import json
import subprocess
import sys
import time

import pytest

from jobs.chaos import Victim
from tests.support.project import ROOT, load_script
from treerpo_ray.config import load


def test_a_drill_ends_a_run_that_takes_too_long(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "else the drill sets one for all tests")
    chaos = load_script("jobs/chaos.py")
    drill = chaos.Drill(load([f"run.root={tmp_path}"]), None, [(1, Victim.CORE), (2, Victim.NODE)])
    training = subprocess.Popen(["sleep", "60"])
    drill.run(training, time.monotonic() + 0.5)
    assert training.returncode == -9 and drill.kills == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_a_run_keeps_its_promises_while_its_parts_are_killed(tmp_path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "jobs/chaos.py", "--kills", "5", "--steps", "8"),
            *(f"run.root={tmp_path}", "run.name=drill"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["broken"] == []
    assert result["kills"] == dict.fromkeys(("engine", "core", "learner", "verifier", "node"), 1)
