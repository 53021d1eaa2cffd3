"""The GPU path, where there is a GPU: a whole run with engine and learner on one.

`test_training` has the same run on a CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gpus import asks_for_gpus, gpu_fault
from tests.support.project import PROJECT, SMALL
from treerpo_ray.study.analysis import Run


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> None:
    """Skips without a GPU that can be used, or fails where `-m` asks for one."""
    if (fault := gpu_fault()) is not None:
        is_asked_for = asks_for_gpus(request.config.option.markexpr)
        (pytest.fail if is_asked_for else pytest.skip)(fault)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_a_run_on_one_gpu_proves_its_weights_and_learns(gpu: None, tmp_path: Path) -> None:
    """As a command, on a cluster of its own: what that lacks is one line and not a wait."""
    hardware = [str(PROJECT / "conf/hardware/one_gpu.yaml"), "engine.kv_cache_gib=1"]
    hardware += ["engine.gpu_memory_gib=null", "learner.gpu_memory_gib=null"]  # of any size
    own = [f"run.root={tmp_path}", "run.name=gpu", "run.num_steps=3", "sync.probe_every=1"]
    done = subprocess.run(
        [sys.executable, "jobs/train.py", *SMALL, *hardware, *own],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    metrics = Run(f"{tmp_path}/gpu").metrics().loc[1:]
    assert metrics["version"].tolist() == [1, 2, 3]
    assert metrics["mismatch/mean"].max() < 0.1
