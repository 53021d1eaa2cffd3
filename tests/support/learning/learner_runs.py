"""Scored trees, configurations and updates for the learner's tests, here or in other processes."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from tests.support.learning.tiny_models import VOCAB_SIZE
from treerpo_ray.algo.loss_config import LossConfig
from treerpo_ray.algo.tree import Step, StopReason, Tree
from treerpo_ray.config import Config
from treerpo_ray.config.data import PromptsConfig
from treerpo_ray.config.sections import GateConfig, LearnerConfig, ModelConfig, TreeConfig
from treerpo_ray.learner.learner import Learner
from treerpo_ray.learner.shards.sharding import whole
from treerpo_ray.learner.update_result import UpdateResult
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Verdict

CPU = torch.device("cpu")
DEPTH_TWO = (-1, -1, -1, 0, 0, 1, 1)
"""Parents of a tree whose third step is an early leaf; its leaves are 2, 3, 4, 5 and 6."""
VERDICTS = {
    "c": Verdict.CORRECT,
    "w": Verdict.WRONG,
    "u": Verdict.CUT_OFF,
    "e": Verdict.ERRORED,
    "t": Verdict.TIMED_OUT,
}
FREE = LearnerConfig(learning_rate=1e-3, clip_grad_norm=1e9, weight_decay=0.01)
"""A learner whose gradient is not clipped."""
MIXED = ("ccwww", "wwccw", "cwwcw", "wcwwc")
"""Verdicts of four trees, each with a kept group; the first has a pruned one."""


def make_record(
    ticket: int, verdicts: str, *, parents: Sequence[int] = DEPTH_TWO, version: int = 0
) -> TreeRecord:
    """A random tree of `ticket`; `verdicts` has the first letter of each leaf's (u: cut off)."""
    rng = np.random.default_rng(ticket)
    steps = []
    for parent in parents:
        length = int(rng.integers(1, 6))
        steps.append(
            Step(
                parent=parent,
                token_ids=rng.integers(3, VOCAB_SIZE, length).astype(np.int32),
                logprobs=rng.uniform(-6, -3, length).astype(np.float32),
                versions=np.full(length, version, np.int32),
                stop=StopReason.END_OF_TEXT,
            )
        )
    prompt_ids = rng.integers(3, VOCAB_SIZE, int(rng.integers(2, 9))).astype(np.int32)
    return TreeRecord(
        ticket=ticket,
        attempt=0,
        prompt_id=str(ticket),
        question="?",
        answers=("a",),
        seed=ticket,
        engine=0,
        grow_s=1.0,
        finished_at_s=float(ticket),
        tree=Tree.from_steps(prompt_ids, tuple(steps)),
        leaf_texts=tuple("a" for _ in verdicts),
        verdicts=tuple(VERDICTS[letter] for letter in verdicts),
    )


def with_logprobs(record: TreeRecord, logprobs: Sequence[Tensor]) -> TreeRecord:
    """The same tree with other behaviour log-probs of its steps."""
    steps = tuple(
        replace(step, logprobs=own.numpy().astype(np.float32))
        for step, own in zip(record.tree.steps, logprobs, strict=True)
    )
    return replace(record, tree=Tree.from_steps(record.tree.prompt_ids, steps))


def mixed(*, first: int = 0, version: int = 0) -> list[TreeRecord]:
    """Four trees with the verdicts MIXED, from ticket `first` on."""
    return [make_record(first + i, v, version=version) for i, v in enumerate(MIXED)]


def all_wrong(*, first: int, count: int) -> list[TreeRecord]:
    """Trees without a kept group, from ticket `first` on."""
    return [make_record(first + i, "wwwuw") for i in range(count)]


def make_config(
    model_path: str, learner: LearnerConfig, loss: LossConfig | None = None, max_staleness: int = 1
) -> Config:
    """A configuration for `make_record`'s trees, packed into several forests, some of them cut."""
    return Config(
        model=ModelConfig(path=model_path),
        prompts=PromptsConfig(max_prompt_tokens=8),
        tree=TreeConfig(num_children=(3, 2), step_tokens=(5, 5), temperature=0.7),
        gate=GateConfig(trees_per_step=4, max_staleness=max_staleness),
        learner=replace(learner, token_budget=24),
        loss=loss or LossConfig(),
    )


def make_learner(config: Config, checkpoint: Path | None = None) -> Learner:
    """A learner of these settings on the CPU."""
    return Learner(
        model=config.model,
        learner=config.learner,
        loss=config.loss,
        tree=config.tree,
        gate=config.gate,
        max_tokens=config.max_model_tokens,
        device=CPU,
        sets=config.prompts.sets,
        lora=config.lora,
        checkpoint=checkpoint,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that an update may move."""

    version: int
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """As the optimizer saw them last; none before the first update."""
    moments: list[Tensor]
    """The optimizer's state."""
    num_steps: int
    """Optimizer steps."""
    learning_rate: float
    """Of the next one, at the start of a run."""

    @classmethod
    def of(cls, learner: Learner) -> "State":
        """A copy of the state of `learner`; of a sharded one all workers make it."""
        named = dict(learner.policy.model.named_parameters())
        return cls(
            version=learner.version,
            parameters={name: whole(p.detach()).clone() for name, p in named.items()},
            gradients={n: whole(p.grad).clone() for n, p in named.items() if p.grad is not None},
            moments=[
                whole(tensor).clone()
                for entry in learner.optimizer.adamw.state_dict()["state"].values()
                for tensor in entry.values()
            ],
            num_steps=learner.optimizer.num_steps,
            learning_rate=learner.optimizer.learning_rate(0.0),
        )


def assert_nothing_moved(before: State, after: State) -> None:
    """Bitwise."""
    assert (after.version, after.num_steps) == (before.version, before.num_steps)
    assert after.learning_rate == before.learning_rate
    torch.testing.assert_close(after.parameters, before.parameters, atol=0, rtol=0)
    torch.testing.assert_close(after.moments, before.moments, atol=0, rtol=0)


Updates = list[list[list[TreeRecord]]]
"""The batches of consecutive updates, each as the shares of the workers."""
Seen = list[tuple[UpdateResult, State]]
"""What each update returned and left."""


def run_updates(
    config: Config,
    updates: Updates,
    rank: int | None,
    *,
    start: Path | None = None,
    end: Path | None = None,
) -> Seen:
    """What a learner makes of the shares of `rank`; of all shares, without a rank.

    It goes on from the checkpoint `start` and leaves one at `end`.
    """
    learner = make_learner(config, start)
    seen = []
    for shares in updates:
        records = [r for share in shares for r in share] if rank is None else shares[rank]
        seen.append((learner.update(records), State.of(learner)))
    if end is not None and not rank:
        end.mkdir()
        learner.write(end)
    return seen


def join_group(rank: int, num_workers: int, folder: Path, limit_s: float) -> None:
    """Make this process a worker of a group, whose members that disagree fail, after `limit_s`, and
    do not wait for ever."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_workers,
        timeout=timedelta(seconds=limit_s),
    )


def forked(
    work: Callable[..., None], num_workers: int, *arguments: object
) -> torch.multiprocessing.ProcessContext:
    """Start `work` in so many processes, each with its rank and these arguments: forked from one
    that has imported the modules, once for all that a test process starts."""
    multiprocessing.set_forkserver_preload(["tests.support.learning.sharded_workers"])
    return torch.multiprocessing.start_processes(
        work, args=arguments, nprocs=num_workers, join=False, start_method="forkserver"
    )


def run_worker(rank: int, folder: Path, cases: dict[str, tuple[Config, Updates]]) -> None:
    """One of two workers: writes what it saw of each case to `folder`/`rank`.pt.

    A case goes on from the checkpoint `start-NAME` in `folder`, if there is one, and leaves its
    own at `end-NAME`.
    """
    join_group(rank, 2, folder, 60)
    seen = {}
    for name, case in cases.items():
        start = folder / f"start-{name}"
        checkpoint = start if start.exists() else None
        seen[name] = run_updates(*case, rank, start=checkpoint, end=folder / f"end-{name}")
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()
