"""Engine keeper: keeps the number of engines right, as trees and nodes come and go.

The pool grows and shrinks with the trees in hand. An engine that is to go, since fewer are enough
or its node is drained, takes no new tree and ends once its trees are finished, or shortly before
its node does: what is unfinished then goes on elsewhere from its last finished sibling group. The
end of its engine leaves a node idle, for Ray's autoscaler to take away.
"""

import asyncio
import logging
import time

from treerpo_ray.actor import first_line
from treerpo_ray.engine_places import Member, first_to_leave
from treerpo_ray.engine_scaling import EngineScaling
from treerpo_ray.engines import Engines
from treerpo_ray.nodes import Nodes, see_nodes

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""Time between looks at the cluster and at the number of trees."""
DRAIN_POLL_S = 0.2
"""Time between looks at whether a draining engine has finished its trees."""
MARGIN_S = 5.0
"""Time before the end of its node at which an engine's last trees move on."""


class EngineKeeper:
    """Adds engines to a pool and lets them go; `run` does it until it is cancelled."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        engine = engines.config.engine
        self._scaling = EngineScaling(
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
        for member in (*self.engines.members, *self.engines.leaving):
            if member.node in nodes.leaving:
                member.ends_at_s = nodes.leaving[member.node]
        for member in [m for m in self.engines.members if m.node in nodes.leaving]:
            self._let_go(member, "its node is drained")
            self.engines.add(self._free_index())

    def _resize(self) -> None:
        """Have as many engines as the trees in hand need."""
        members = self.engines.members
        target = self._scaling.target(self._num_trees(), time.monotonic())
        while len(members) < target and self.engines.failure is None:
            self.engines.add(self._free_index())
        while len(members) > target:
            self._let_go(first_to_leave(members), "fewer are enough")

    def _num_trees(self) -> int:
        """Trees that wait for an engine or grow on one."""
        members = (*self.engines.members, *self.engines.leaving)
        return self.engines.places.num_waiting + sum(member.num_trees for member in members)

    def _free_index(self) -> int:
        taken = {member.index for member in (*self.engines.members, *self.engines.leaving)}
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def _let_go(self, member: Member, reason: str) -> None:
        """Have an engine go: at once if it does not serve, else when its trees are finished."""
        if not member.is_serving:
            self.engines.remove(member)
            self._note("engine_left", member, reason)
            return
        self.engines.members.remove(member)
        self.engines.leaving.append(member)
        self._note("engine_draining", member, reason)
        self.engines.spawn(self._drain(member))

    async def _drain(self, member: Member) -> None:
        """End an engine that takes no new tree."""
        while member.num_trees and time.time() < member.ends_at_s - MARGIN_S:
            await asyncio.sleep(DRAIN_POLL_S)
        member.is_serving = False  # it takes over no more weights
        self._note("engine_left", member, "its node ends" if member.num_trees else "it is drained")
        if not member.num_trees:
            await self.engines.stop_actors([member])
        member.kill()
        self.engines.leaving.remove(member)

    def _note(self, kind: str, member: Member, reason: str) -> None:
        self.engines.note(
            kind, engine=member.index, node=member.node, trees=member.num_trees, reason=reason
        )

    def _report(self, nodes: Nodes) -> None:
        """Note how many nodes, engines and trees there are, if that has changed."""
        members = self.engines.members
        num_waiting = self.engines.places.num_waiting
        seen = {
            "nodes": nodes.num_alive,
            "nodes_leaving": len(nodes.leaving),
            "serving": sum(member.is_serving for member in members),
            "starting": sum(not member.is_serving for member in members),
            "draining": len(self.engines.leaving),
            "waiting": num_waiting,
            "growing": self._num_trees() - num_waiting,
        }
        if seen != self._seen:
            self.engines.note("pool", **seen)
        self._seen = seen
