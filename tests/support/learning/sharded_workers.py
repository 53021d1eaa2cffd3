"""Sharded learners in processes of their own: what they make of updates, and what they write."""

import multiprocessing
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from tests.support.learning.learner_runs import State, make_learner
from treerpo_ray.config import Config
from treerpo_ray.learner.learner import Learner
from treerpo_ray.records import TreeRecord

LIMIT_S = 60.0
"""Time after which workers that disagree fail, and do not wait for ever."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Consecutive updates of a learner."""

    config: Config
    batches: list[list[TreeRecord]]
    """Of each update all trees, in their order; each worker gets every so many-th."""
    start: Path | None = None
    """Checkpoint to go on from."""
    end: Path | None = None
    """Where a checkpoint is left."""

    def whole(self) -> "Case":
        """The same by a learner that has the whole model."""
        learner = replace(self.config.learner, shard=False, offload=False)
        return replace(self, config=replace(self.config, learner=learner), end=None)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a worker found in one case."""

    states: list[State]
    """After each update."""
    metrics: list[dict[str, float]]
    local_share: float
    """Of the model's numbers those that this worker keeps."""


def run_case(case: Case, rank: int = 0, num_workers: int = 1) -> Found:
    """What the worker `rank` makes of a case."""
    learner = make_learner(case.config, case.start)
    states, metrics = [], []
    for batch in case.batches:
        result = learner.update(batch[rank::num_workers])
        states.append(State.of(learner))
        metrics.append(result.metrics)
    return Found(states=states, metrics=metrics, local_share=local_share(learner))


def local_share(learner: Learner) -> float:
    """Of the model's numbers those that lie on this worker."""
    parameters = list(learner.policy.model.parameters())
    own = [p.to_local() if learner.sharding else p for p in parameters]
    return sum(map(Tensor.numel, own)) / sum(p.numel() for p in parameters)


def run_workers(num_workers: int, folder: Path, cases: dict[str, Case]) -> list[dict[str, Found]]:
    """What each of so many workers found of each case."""
    folder.mkdir()
    # The modules are imported once, and not by each process.
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        _work, args=(num_workers, folder, cases), nprocs=num_workers, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_workers)]


def _work(rank: int, num_workers: int, folder: Path, cases: dict[str, Case]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_workers,
        timeout=timedelta(seconds=LIMIT_S),
    )
    found = {name: run_case(case, rank, num_workers) for name, case in cases.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
