"""The failure drill, short: every kind of process is killed once in a real training."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


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
