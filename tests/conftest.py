"""Fixtures that several tests share: one local Ray cluster, one real run, each once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("WANDB_MODE", "offline")
# By default workers of Ray give way to all others: beside other tests they would stand still.
os.environ.setdefault("RAY_worker_niceness", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores are for the other processes

from tests.support.planted_secrets import SECRETS
from tests.support.project import PROJECT, SMALL
from treerpo_ray.config import Config, load

os.environ |= SECRETS

pytest.register_assert_rewrite("tests.support.whole_runs")
# Property tests draw the same examples in each run and have no deadline on a busy machine.
settings.register_profile("reproducible", derandomize=True, database=None, deadline=None)
settings.load_profile("reproducible")


RUNS, CLUSTERS = "whole runs", "whole clusters"
TOGETHER = {
    "tests/runs/test_elastic.py": RUNS,
    "tests/runs/test_training.py": RUNS,
    "tests/runs/test_weights_on_nodes.py": CLUSTERS,
    "tests/jobs/test_autoscale_demo.py": CLUSTERS,
    "tests/jobs/test_chaos.py": CLUSTERS,
    "tests/jobs/test_first_gpu_run.py": CLUSTERS,
    "tests/jobs/test_jobs.py": CLUSTERS,
    "tests/learner/shards/": "learners in processes that are forked from one",
    "tests/learner/test_learner_workers.py": "learners in processes that are forked from one",
}
"""Files and folders that go to the same process, and what they share. Of runs, and of clusters, no
two are made at a time: each takes gigabytes."""


def shared_by(nodeid: str) -> str | None:
    """What the tests of the file share with others."""
    return next((what for start, what in TOGETHER.items() if nodeid.startswith(start)), None)


class SomeTogether(LoadFileScheduling):
    """Files go to whichever process is free, but those of TOGETHER to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        return shared_by(nodeid) or super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """How `-n` shares the tests out."""
    return SomeTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, in one process, and whole clusters in another; beside them what computes
    alone; then what starts engines, which takes longest, and what starts Ray."""

    def rank(item: pytest.Item) -> tuple[bool, bool, bool, bool, bool]:
        shared = shared_by(item.nodeid)
        is_slow, on_engine, on_ray = (
            item.get_closest_marker(name) is not None for name in ("slow", "engine", "ray")
        )
        starts_any = on_engine or on_ray
        return shared != RUNS, shared != CLUSTERS, starts_any, not on_engine, not is_slow

    items.sort(key=rank)


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Makes a small configuration with its run folder in a temporary place."""
    root = tmp_path_factory.mktemp("runs")

    def make(*overrides: str) -> Config:
        return load([*SMALL, f"run.root={root}", *overrides])

    return make


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection to Hugging Face, and nothing of it in a cache."""
    import datasets
    import huggingface_hub.constants

    from treerpo_ray.prompts.hub import offline_because

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline_because.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of two CPUs, as on a laptop."""
    import ray

    from treerpo_ray.driver.cluster import RUNTIME_ENV

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": RUNTIME_ENV["env_vars"] | {"PYTHONPATH": str(PROJECT)}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def hanging() -> Iterator[str]:
    """Root of runs on a store that hangs."""
    import fsspec

    from tests.support.saved_runs.run_folders import HangingStore

    fsspec.register_implementation("hanging", HangingStore, clobber=True)
    HangingStore.store.clear()
    HangingStore.hold.clear()
    yield "hanging://bucket"
    HangingStore.hold.set()
