"""Sharded learners in processes of their own: what they make of updates, and what they write."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.support.learning.learner_runs import State, forked, join_group, make_learner
from treerpo_ray.config import Config
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.shards import export
from treerpo_ray.learner.together import Together, once_a_machine
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.checkpoints import CheckpointContents, Checkpoints, CheckpointSaver
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.patience import Patience, PatienceTimes

LIMIT_S = 60.0
"""Time after which workers that disagree fail, and do not wait for ever."""
PROBE = [3, 14, 15, 92, 65, 35]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Consecutive updates of a learner."""

    config: Config
    batches: list[list[TreeRecord]]
    """Of each update all trees, in their order; each worker gets every so many-th."""
    start: Path | None = None
    """Checkpoint to go on from."""
    end: Path | None = None
    """Run folder in which a checkpoint and the model are left; a relative one is of the first
    worker alone, as the others have another working folder."""
    fault: str = ""
    """What befalls the second worker as it writes its moments: `full`, a disk that is full at the
    first attempt, as the first worker's is for weights at the next one, or `killed`."""

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
    weights: dict[str, Tensor] = field(default_factory=dict)
    """What the first worker publishes."""
    logprobs: Tensor | None = None
    """Of PROBE."""
    told: list[str] = field(default_factory=list)
    """What the first worker was told of the checkpoint."""


def run_case(case: Case, rank: int = 0, num_workers: int = 1) -> Found:
    """What the worker `rank` makes of a case."""
    learner = make_learner(case.config, case.start)
    states, metrics = [], []
    for batch in case.batches:
        result = learner.update(batch[rank::num_workers])
        states.append(State.of(learner))
        metrics.append(result.metrics)
    together = Together(learner)
    weights, logprobs, told = {}, None, []
    if rank == 0:
        if case.fault == "full":
            befall("full", export, "save_file")
        with together.leading():
            weights = dict(together.named_weights(torch.float32))
            logprobs = together.sequence_logprobs(PROBE)
            if case.end is not None:
                told = save(together, case.end)
    else:
        if rank == 1 and case.fault:
            befall(case.fault, dcp.HuggingFaceStorageWriter, "write_data")
        together.follow()
    return Found(
        states=states,
        metrics=metrics,
        local_share=local_share(learner),
        weights=weights,
        logprobs=logprobs,
        told=told,
    )


def local_share(learner: Learner) -> float:
    """Of the model's numbers those that lie on this worker."""
    parameters = list(learner.policy.model.parameters())
    own = [p.to_local() if learner.sharding else p for p in parameters]
    return sum(map(Tensor.numel, own)) / sum(p.numel() for p in parameters)


def save(together: Together, place: Path) -> list[str]:
    """Leave the checkpoint of step 1 and the model in a run folder; returns what was told."""
    told: list[str] = []
    folder = RunFolder(str(place))
    patience = Patience(
        folder=folder,
        waits=lambda what, reason: told.append(f"{what} waits: {reason}"),
        written=lambda what, seconds: told.append(f"{what} is written"),
        is_told_to_stop=lambda: False,
        moves=lambda what: None,
        times=PatienceTimes(retry=0.01, look=0.01),
    )
    saver = CheckpointSaver(
        Checkpoints(folder, 2),
        every=1,
        step=0,
        warn=lambda what, reason: told.append(f"{what}: {reason}"),
        patience=patience,
    )

    def attempt(staging: Path) -> None:
        try:
            together.write(staging)
        except OSError as error:
            told.append(f"refused: {error.filename}")
            raise

    contents = CheckpointContents(
        write=attempt,
        before_place=lambda staging: None,
        is_settled=lambda: True,
        placed=lambda: told.append("placed"),
        num_bytes=0,
    )
    saver.save(1, contents, is_last=False)
    saver.settle()
    folder.publish_model(together.save_pretrained)
    return told


def befall(fault: str, place: object, name: str) -> None:
    """Have a fault come upon this process as it calls what `place` has under a name."""
    plain: Callable[..., object] = getattr(place, name)

    def faulty(*arguments: object, **named: object) -> object:
        if fault == "killed":
            os._exit(1)
        setattr(place, name, plain)  # the next attempt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    setattr(place, name, faulty)


def opened_by(rank: int, num_workers: int) -> list[int]:
    """Who opened what each worker sees, of two machines with half of the workers each; all of it is
    open until the last one is done."""
    is_open: list[int] = []

    @contextmanager
    def open_here() -> Iterator[int]:
        is_open.append(rank)
        yield rank
        is_open.clear()

    half = -(-num_workers // 2)
    machine, is_first_here = f"machine-{rank // half}", rank % half == 0
    with once_a_machine(open_here, machine) as seen:
        assert (is_open == [rank]) == is_first_here
        dist.barrier()
        assert (is_open == [rank]) == is_first_here
    assert not is_open
    found = [0] * num_workers
    dist.all_gather_object(found, seen)
    return found


def run_workers(num_workers: int, folder: Path, cases: dict[str, Case]) -> list[dict[str, Found]]:
    """What each of so many workers found of each case; a case whose fault is `killed` is the last,
    and nothing is found of it."""
    folder.mkdir()
    for process in forked(_work, num_workers, num_workers, folder, cases).processes:
        process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_workers)]


def _work(rank: int, num_workers: int, folder: Path, cases: dict[str, Case]) -> None:
    join_group(rank, num_workers, folder, LIMIT_S)
    home = folder / f"home-{rank}"
    home.mkdir()
    os.chdir(home)
    found: dict[str, Found] = {}
    torch.save(opened_by(rank, num_workers), folder / f"opened-{rank}.pt")
    for name, case in cases.items():
        if case.fault == "killed":
            torch.save(found, folder / f"{rank}.pt")
        found[name] = run_case(case, rank, num_workers)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
