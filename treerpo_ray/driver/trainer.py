"""Trainer: Ray Train's group of workers, and what it is told about resources and failures."""

import time

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from treerpo_ray.config import Config
from treerpo_ray.driver.plan import Inputs
from treerpo_ray.driver.worker_entry import run_worker
from treerpo_ray.task import STREAM, RunActors, WorkerTask
from treerpo_ray.tree_stream import tree_stream

PROBE_TOKENS = 256
"""Most tokens of the sequence that engines and learner are compared on."""


COLLECTIVE_TIMEOUT_S = 6 * 3600
"""Time after which a worker gives up waiting for the others."""


def make_trainer(config: Config, inputs: Inputs, actors: RunActors, storage: str) -> TorchTrainer:
    """Ray Train's group of workers; what it writes of its own goes to `storage`."""
    task = WorkerTask(
        config=config,
        probe_ids=max(inputs.prompts.token_ids, key=len)[:PROBE_TOKENS],
        held_out=inputs.held_out,
        actors=actors,
    )
    learner, resources = config.learner, dict(config.learner.resources)
    is_fixed = learner.min_workers is None
    workers = learner.num_workers if is_fixed else (learner.min_workers, learner.num_workers)
    return TorchTrainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # Ray's hint knows no range
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources,
        ),
        # Workers wait in collectives while the first one syncs weights or evaluates.
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        # Ray Train's own records are not ours: checkpoints and metrics lie in the run folder.
        run_config=ray.train.RunConfig(
            name=f"treerpo-{time.time_ns()}",
            storage_path=storage,
            # Whoever runs the trainer starts it again, and says so.
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
        datasets={STREAM: tree_stream(config, actors.pool, actors.run_log, actors.heartbeats)},
        dataset_config=ray.train.DataConfig(enable_shard_locality=False),
    )
