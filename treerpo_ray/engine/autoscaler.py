"""Autoscaler: keeps the number of engines right, as trees and nodes come and go.

The pool grows and shrinks with the trees in hand. An engine that is to go, since fewer are enough
or its node is drained, takes no new tree and ends once its trees are finished, or shortly before
its node does: what is unfinished then goes on elsewhere from its last finished sibling group. The
end of its engine leaves a node idle, for Ray's autoscaler to take away.
"""

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
from ray._private.state import state as ray_state

from treerpo_ray.actor import first_line
from treerpo_ray.engine.pool import EnginePool
from treerpo_ray.engine.replica import Replica, ReplicaState

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ScalingPolicy:
    """The rule of one pool; times are the caller's, in seconds from anywhere."""

    fewest: int
    most: int
    trees_per_engine: int | None
    """Trees that one engine grows at a time; None: any number, so `fewest` are always enough."""
    patience_s: float
    """Time that fewer engines must have been enough before the pool shrinks to them."""
    _needs: deque[tuple[float, int]] = field(default_factory=deque)

    def target(self, num_trees: int, now_s: float) -> int:
        """Engines to have at `now_s` with so many trees waiting or growing; call it in order."""
        need = self.needed(num_trees)
        # An entry below a later one can never be the most of a window that holds both.
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now_s, need))
        while self._needs[0][0] < now_s - self.patience_s:
            self._needs.popleft()
        return self._needs[0][1]

    def needed(self, num_trees: int) -> int:
        """Engines that hold so many trees without one waiting, within the bounds."""
        if self.trees_per_engine is None:
            return self.fewest
        return min(max(-(-num_trees // self.trees_per_engine), self.fewest), self.most)


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


def first_to_leave(replicas: list[Replica]) -> Replica:
    """The engine that a pool loses least by: not yet serving, on a node that will be empty soonest.

    Among equals the one with the fewest trees, and of these the one that came last.
    """
    on_node = Counter(replica.node for replica in replicas)

    def loss(replica: Replica) -> tuple[bool, bool, int, int, int]:
        has_node, companions = bool(replica.node), on_node[replica.node]
        return replica.is_serving, has_node, companions, replica.num_trees, -replica.index

    return min(replicas, key=loss)


class Autoscaler:
    """Adds engines to a pool and lets them go; `run` does it until it is cancelled.

    Args:
        pool: The engines.
        policy: How many of them there are to be.
        see_nodes: Tells of the cluster; called in a thread.
        look_every_s: Time between looks at the cluster and at the number of trees.
    """

    def __init__(
        self,
        *,
        pool: EnginePool,
        policy: ScalingPolicy,
        see_nodes: Callable[[], Nodes],
        look_every_s: float,
    ) -> None:
        self._pool, self._policy = pool, policy
        self._see_nodes, self._look_every_s = see_nodes, look_every_s
        self._seen: dict[str, int] = {}

    async def run(self) -> None:
        """Look at nodes and trees again and again, and do what is needed."""
        while True:
            try:
                nodes = await asyncio.to_thread(self._see_nodes)
                self._leave_nodes(nodes)
                self._resize()
                self._report(nodes)
            except Exception as error:  # engines that serve go on, and the next look may go well
                log.warning("no look at the cluster", exc_info=error)
                self._pool.note("autoscaler_failed", reason=first_line(error))
            await asyncio.sleep(self._look_every_s)

    def _leave_nodes(self, nodes: Nodes) -> None:
        """Replace the engines of nodes that are about to go."""
        leaving = [replica for replica in self._pool.replicas if replica.node in nodes.leaving]
        for replica in leaving:
            replica.leave_by(nodes.leaving[replica.node])
            if replica.state is not ReplicaState.DRAINING:
                self._pool.let_go(replica, "its node is drained")
                self._pool.add()

    def _resize(self) -> None:
        """Have as many engines as the trees in hand need."""
        pool = self._pool
        now_s = asyncio.get_running_loop().time()
        target = self._policy.target(pool.num_waiting + pool.num_growing, now_s)
        while len(pool.staying) < target and pool.may_grow:
            pool.add()
        while len(pool.staying) > target:
            pool.let_go(first_to_leave(pool.staying), "fewer are enough")

    def _report(self, nodes: Nodes) -> None:
        """Note how many nodes, engines and trees there are, if that has changed."""
        states = Counter(replica.state for replica in self._pool.replicas)
        seen = {
            "nodes": nodes.num_alive,
            "nodes_leaving": len(nodes.leaving),
            "serving": states[ReplicaState.SERVING],
            "starting": states[ReplicaState.STARTING],
            "draining": states[ReplicaState.DRAINING],
            "waiting": self._pool.num_waiting,
            "growing": self._pool.num_growing,
        }
        if seen != self._seen:
            self._pool.note("pool", **seen)
        self._seen = seen
