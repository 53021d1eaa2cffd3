"""Nodes: which nodes Ray has now, and which of them are about to go."""

import math
from dataclasses import dataclass

import ray
from ray._private.state import state as ray_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of the cluster at one time."""

    num_alive: int
    leaving: dict[str, float]
    """Unix time (s) at which a node will be gone, by its id; infinite where nobody said when."""


def see_nodes() -> Nodes:
    """Ask Ray; nodes leave on a preemption notice, or drained by an autoscaler or operator.

    Raises:
        ray.exceptions.RpcError: Ray's control store does not answer.
    """
    # Ray has no public call for what is drained; Ray Train's own watcher reads the same one.
    draining = ray_state.get_draining_nodes()
    return Nodes(
        num_alive=sum(node["Alive"] for node in ray.nodes()),
        leaving={node: end_ms / 1000 or math.inf for node, end_ms in draining.items()},
    )
