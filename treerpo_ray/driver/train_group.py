"""Train group: Ray Train's workers, and when a group that failed is started again."""

import time
from collections.abc import Callable
from functools import partial

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from treerpo_ray.actor import root_cause
from treerpo_ray.config import Config
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.driver.supervisor import Supervisor
from treerpo_ray.driver.versions import AgreedVersions
from treerpo_ray.driver.worker_entry import run_worker
from treerpo_ray.errors import NodeDiffers, UserCodeError, one_line
from treerpo_ray.metrics.events import Event
from treerpo_ray.preflight.inputs import Inputs
from treerpo_ray.run_folder.patience import DiskRefused
from treerpo_ray.task import STREAM, RunActors, WorkerTask
from treerpo_ray.tree_stream import tree_stream

PROBE_TOKENS = 256
"""Most tokens of the sequence that engines and learner are compared on."""
RESIZE_S = 15.0
"""Time between looks for room for further workers, and since the last start of a group."""
COLLECTIVE_TIMEOUT_S = 6 * 3600
"""Time after which a worker gives up waiting for the others."""


def make_trainer(
    config: Config, inputs: Inputs, actors: RunActors, storage: str, versions: AgreedVersions
) -> TorchTrainer:
    """Ray Train's group of workers; what it writes of its own goes to `storage`, and nodes that
    come later must have `versions`."""
    task = WorkerTask(
        config=config,
        probe_ids=max(inputs.prompts.token_ids, key=len)[:PROBE_TOKENS],
        held_out=inputs.held_out,
        actors=actors,
        check_node=versions.check_node,
    )
    learner, resources = config.learner, dict(config.learner.resources)
    is_fixed = learner.min_workers is None
    workers = learner.num_workers if is_fixed else (learner.min_workers, learner.num_workers)
    return TorchTrainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # Ray's hint knows no range
            elastic_resize_monitor_interval_s=RESIZE_S,  # type: ignore[call-arg]  # nor this
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources,
        ),
        # Workers wait in collectives while the first one syncs weights or evaluates.
        torch_config=TorchConfig(backend=_backend(config), timeout_s=COLLECTIVE_TIMEOUT_S),
        # Ray Train's own records are not ours: checkpoints and metrics lie in the run folder.
        run_config=ray.train.RunConfig(
            name=f"{config.run.name.replace('/', '-')}-{time.time_ns()}",
            storage_path=storage,
            # Whoever runs the trainer starts it again, and says so.
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
        datasets={STREAM: tree_stream(config, actors, versions.check_node)},
        dataset_config=ray.train.DataConfig(enable_shard_locality=False),
    )


def _backend(config: Config) -> str:
    """What workers talk to each other by: on GPUs also with what lies in main memory."""
    return "cpu:gloo,cuda:nccl" if config.learner.resources.get("GPU", 0) > 0 else "gloo"


class TrainGroup:
    """Train workers; a group that failed is started again from the last checkpoint, with whatever
    workers there are then.

    Args:
        limits: How many workers there may be, and failures without progress.
        fit_once: Runs one group to its end; returns what it failed of, None if it ended well.
        actors: Those of the run.
        supervisor: Follows the wait before a start.
        is_stopping: Whether the run is told to stop.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        *,
        limits: LearnerConfig,
        fit_once: Callable[[], Exception | None],
        actors: RunActors,
        supervisor: Supervisor,
        is_stopping: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.limits, self.fit_once = limits, fit_once
        self.actors, self.supervisor, self.sleep = actors, supervisor, sleep
        self.is_stopping = is_stopping

    def fit(self) -> int:
        """Train to the end of the run or to its stop; returns the learner steps that are done.

        Raises:
            ValueError: a worker refuses its input or its node, as it would again.
            KeyboardInterrupt: the run was told to stop before a group was started, or one failed
                that was: the last checkpoint is the end.
            Exception: what the last group failed of, after too many failures without progress.
        """
        failures = reached = 0
        fewest, most = self.limits.fewest_workers, self.limits.num_workers
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        while True:
            if self.is_stopping():
                raise KeyboardInterrupt
            self.supervisor.console.begin_stage(f"starting {number} train worker(s)")
            error = self.fit_once()
            done = self.actors.get(self.actors.gate.done.remote())
            if error is None:
                return done
            wrong_input = _wrong_input(error)
            failures = 1 if done > reached else failures + 1
            reached = max(done, reached)
            is_over = self.is_stopping() or wrong_input is not None or _is_refused(error)
            is_over |= failures > self.limits.max_failures
            wait_s = 0.0 if is_over else restart_wait_s(failures)
            lost: dict[str, str | float] = {"step": done, "failures": failures, "wait_s": wait_s}
            lost["cause"] = root_cause(error)
            self.actors.get(
                self.actors.run_log.event.remote(Event(kind="learner_lost", fields=lost))
            )
            if is_over:
                self.supervisor.show_last()
                if self.is_stopping():
                    raise KeyboardInterrupt from error
                raise wrong_input or error
            self.actors.get(self.actors.heartbeats.forget.remote("learner"))
            self.supervisor.run(partial(self.sleep, wait_s))


def _wrong_input(error: Exception) -> ValueError | None:
    """What a worker says of its input or its node, if that is why the group failed.

    The other workers of the group fail with it, of a collective that nobody joins. Other kinds of
    ValueError are left out: a file that a store gave in half is one, and comes whole
    the next time.
    """
    if isinstance(error, ray.train.WorkerGroupError):
        for failure in error.worker_failures.values():
            if isinstance(failure, UserCodeError):
                return failure  # with the user's own traceback
            if type(failure) in (ValueError, NodeDiffers):
                return ValueError(one_line(failure))
    return None


def _is_refused(error: Exception) -> bool:
    """Whether the group failed of a disk that was waited for in vain: it would train the same steps
    again, and fail of it again."""
    return isinstance(error, ray.train.WorkerGroupError) and any(
        isinstance(failure, DiskRefused) for failure in error.worker_failures.values()
    )


def restart_wait_s(failures: int) -> float:
    """Seconds before a group is started again that failed so many times without progress.

    The first time it may well be one machine that was lost, and nothing to wait for; later it is
    likely something that all need, such as the store, and takes a while to come back.
    """
    return 1.0 if failures == 1 else min(60.0, 5.0 * 2**failures)
