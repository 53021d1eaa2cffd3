"""The GPU path, where there is a GPU: a whole run with engine and learner on one."""

import pytest
import torch

from tests.support.project import ROOT
from tests.support.whole_runs import run_training
from treerpo_ray.study.analysis import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_a_run_on_one_gpu_proves_its_weights_and_learns(small_config, ray_cluster) -> None:
    hardware = str(ROOT / "conf/hardware/one_gpu.yaml")
    config = small_config(hardware, "run.name=gpu", "run.num_steps=3", "sync.probe_every=1")
    outcome, _ = run_training(config)
    assert outcome.is_complete
    metrics = Run(config.folder).metrics().loc[1:]
    assert metrics["version"].tolist() == [1, 2, 3]
    assert metrics["mismatch/mean"].max() < 0.1
