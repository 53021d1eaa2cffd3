"""Engine keeper: keeps the number of engines right, as trees and nodes come and go.

The pool grows and shrinks with the trees in hand. An engine that is to go, since fewer are enough
or its node is drained, takes no new tree and ends once its trees are finished, or shortly before
its node does: what is unfinished then goes on elsewhere from its last finished sibling group. The
end of its engine leaves a node idle, for Ray's autoscaler to take away.
"""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import ray
from ray._private.state import state as ray_state

from treerpo_ray.actor import first_line
from treerpo_ray.engine.pool import EnginePool
from treerpo_ray.engine.replica import Replica


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
    return min(
        replicas, key=lambda m: (m.is_serving, bool(m.node), on_node[m.node], m.num_trees, -m.index)
    )


log = logging.getLogger(__name__)


LOOK_EVERY_S = 2.0
"""Time between looks at the cluster and at the number of trees."""


DRAIN_POLL_S = 0.2
"""Time between looks at whether a draining engine has finished its trees."""


MARGIN_S = 5.0
"""Time before the end of its node at which an engine's last trees move on."""


class Autoscaler:
    """Adds engines to a pool and lets them go; `run` does it until it is cancelled."""

    def __init__(self, engines: EnginePool) -> None:
        self.engines = engines
        engine = engines.config.engine
        self._scaling = ScalingPolicy(
            fewest=engine.num_engines,
            most=engines.config.most_engines,
            trees_per_engine=engine.max_trees,
            patience_s=engine.shrink_after_s,
        )
        self._seen: dict[str, int] = {}

    async def run(self) -> None:
        """Look at nodes and trees again and again, and do what is needed."""
        while True:
            try:
                nodes = await asyncio.to_thread(see_nodes)
                self._leave_nodes(nodes)
                self._resize()
                self._report(nodes)
            except Exception as error:  # engines that serve go on, and the next look may go well
                log.warning("no look at the cluster", exc_info=error)
                self.engines.note("keeper_failed", reason=first_line(error))
            await asyncio.sleep(LOOK_EVERY_S)

    def _leave_nodes(self, nodes: Nodes) -> None:
        """Replace the engines of nodes that are about to go."""
        for replica in (*self.engines.replicas, *self.engines.leaving):
            if replica.node in nodes.leaving:
                replica.ends_at_s = nodes.leaving[replica.node]
        for replica in [m for m in self.engines.replicas if m.node in nodes.leaving]:
            self._let_go(replica, "its node is drained")
            self.engines.add(self._free_index())

    def _resize(self) -> None:
        """Have as many engines as the trees in hand need."""
        replicas = self.engines.replicas
        target = self._scaling.target(self._num_trees(), time.monotonic())
        while len(replicas) < target and self.engines.failure is None:
            self.engines.add(self._free_index())
        while len(replicas) > target:
            self._let_go(first_to_leave(replicas), "fewer are enough")

    def _num_trees(self) -> int:
        """Trees that wait for an engine or grow on one."""
        replicas = (*self.engines.replicas, *self.engines.leaving)
        return self.engines.router.num_waiting + sum(replica.num_trees for replica in replicas)

    def _free_index(self) -> int:
        taken = {replica.index for replica in (*self.engines.replicas, *self.engines.leaving)}
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def _let_go(self, replica: Replica, reason: str) -> None:
        """Have an engine go: at once if it does not serve, else when its trees are finished."""
        if not replica.is_serving:
            self.engines.remove(replica)
            self._note("engine_left", replica, reason)
            return
        self.engines.replicas.remove(replica)
        self.engines.leaving.append(replica)
        self._note("engine_draining", replica, reason)
        self.engines.spawn(self._drain(replica))

    async def _drain(self, replica: Replica) -> None:
        """End an engine that takes no new tree."""
        while replica.num_trees and time.time() < replica.ends_at_s - MARGIN_S:
            await asyncio.sleep(DRAIN_POLL_S)
        replica.is_serving = False  # it takes over no more weights
        self._note(
            "engine_left", replica, "its node ends" if replica.num_trees else "it is drained"
        )
        if not replica.num_trees:
            await self.engines.stop_actors([replica])
        replica.kill()
        self.engines.leaving.remove(replica)

    def _note(self, kind: str, replica: Replica, reason: str) -> None:
        self.engines.note(
            kind, engine=replica.index, node=replica.node, trees=replica.num_trees, reason=reason
        )

    def _report(self, nodes: Nodes) -> None:
        """Note how many nodes, engines and trees there are, if that has changed."""
        replicas = self.engines.replicas
        num_waiting = self.engines.router.num_waiting
        seen = {
            "nodes": nodes.num_alive,
            "nodes_leaving": len(nodes.leaving),
            "serving": sum(replica.is_serving for replica in replicas),
            "starting": sum(not replica.is_serving for replica in replicas),
            "draining": len(self.engines.leaving),
            "waiting": num_waiting,
            "growing": self._num_trees() - num_waiting,
        }
        if seen != self._seen:
            self.engines.note("pool", **seen)
        self._seen = seen
