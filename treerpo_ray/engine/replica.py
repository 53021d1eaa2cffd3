"""Replica: one engine of the pool, from its start to its end.

    STARTING ──► SERVING ──► DRAINING ──► GONE        (and from each state to GONE)

It alone writes what is known of it; the pool, its autoscaler and the trees read that and ask it to
change.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto

from treerpo_ray.algo.search import SiblingGroup, TreeShape
from treerpo_ray.config.sections import EngineConfig
from treerpo_ray.engine._waits import Waits
from treerpo_ray.engine.background import Signal
from treerpo_ray.engine.types import EngineActor, EngineStats, Sampling
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import WeightsLost
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.source import Place, Receiver, WeightSource

LOOK_EVERY_S = 0.5
"""Time between looks for weights in place of lost ones."""
TRY_AGAIN_S = 300.0
"""Time after which lost weights are asked for once more, if there are no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """A version of the weights."""

    manifest: Manifest
    source: WeightSource
    probe: Probe

    @property
    def number(self) -> int:
        """Number of the version."""
        return self.manifest.version


class ReplicaState(Enum):
    """Where an engine is in its life."""

    STARTING = auto()
    """It has no node yet, or loads the model or the weights."""
    SERVING = auto()
    """It takes trees; it has proved the newest weights, if any were published yet."""
    DRAINING = auto()
    """It finishes its trees and takes no more."""
    GONE = auto()
    """Its process was ended."""


class Replica:
    """An engine of the pool; all its properties are read-only.

    Args:
        index: Number of the engine; the one that replaces it has the same.
        actor: Its actor, which Ray may not have placed yet.
        limits: The time that it has for each thing, and the trees that it may grow at a time.
        waits: Takes part in what is told of waits.
        num_starts: Engines of this number, with this one, since one of them finished a tree.
    """

    __slots__ = (
        "_actor",
        "_ends_at",
        "_index",
        "_left",
        "_limits",
        "_moved_at",
        "_node",
        "_num_starts",
        "_num_trees",
        "_start",
        "_state",
        "_stats",
        "_version",
        "_waits",
    )

    def __init__(
        self,
        *,
        index: int,
        actor: EngineActor,
        limits: EngineConfig,
        waits: Waits,
        num_starts: int = 1,
    ) -> None:
        self._index, self._actor, self._limits, self._waits = index, actor, limits, waits
        self._num_starts, self._start = num_starts, uuid.uuid4().hex
        self._state = ReplicaState.STARTING
        self._node = ""
        self._version = -1
        self._num_trees = 0
        self._moved_at = -math.inf
        """Time of the event loop at which a sibling group of any tree last came from it."""
        self._stats: EngineStats | None = None
        """Its last answer for its totals."""
        self._ends_at = math.inf
        """Time of the event loop at which its node will be gone."""
        self._left = Signal()
        """Of a tree that left it, and of a new time at which it ends."""

    @property
    def index(self) -> int:
        """Number of the engine."""
        return self._index

    @property
    def state(self) -> ReplicaState:
        """Where it is in its life."""
        return self._state

    @property
    def is_serving(self) -> bool:
        """Whether it takes trees."""
        return self._state is ReplicaState.SERVING

    @property
    def node(self) -> str:
        """Ray's id of its node; empty until it has one."""
        return self._node

    @property
    def receiver(self) -> Receiver:
        """What sources of weights know of it, once it has a node."""
        workers = self._limits.tensor_parallel
        return Receiver(start=self._start, node=self._node, num_workers=workers)

    @property
    def version(self) -> int:
        """Newest version that it has proved; -1 before the first."""
        return self._version

    @property
    def num_trees(self) -> int:
        """Trees that have a place on it."""
        return self._num_trees

    @property
    def num_starts(self) -> int:
        """Engines of this number, with this one, since one of them finished a tree."""
        return self._num_starts

    @property
    def has_room(self) -> bool:
        """Whether it takes one more tree now."""
        most = self._limits.max_trees
        return self.is_serving and (most is None or self._num_trees < most)

    @property
    def takes_weights(self) -> bool:
        """Whether trees are or will be sampled with the weights that it takes over now."""
        is_draining = self._state is ReplicaState.DRAINING
        return self.is_serving or (is_draining and self._num_trees > 0)

    def __str__(self) -> str:
        doing = {ReplicaState.SERVING: "serves", ReplicaState.DRAINING: "drains"}
        return (
            f"engine {self._index} {doing.get(self._state, 'starts')} with {self._num_trees} trees"
        )

    def _become(self, state: ReplicaState) -> None:
        if state not in NEXT_STATES[self._state]:
            raise RuntimeError(
                f"engine {self._index} is {self._state.name} and cannot be {state.name}"
            )
        self._state = state

    # Bring-up and weights ------------------------------------------------------------------------

    async def find_node(self, needed: str) -> None:
        """Wait for however long until Ray has placed it; `needed` says where, for people."""
        found = self._actor.api.node.remote()
        self._node = await self._waits.wait(found, f"{needed} for engine {self._index}", math.inf)

    async def start(
        self, newest: Callable[[], WeightVersion | None], tolerance: float | None
    ) -> tuple[int, int]:
        """Load the model, then the `newest` version; it serves once it has proved that.

        Returns:
            The ids of the actor's process and of vLLM's core.

        Raises:
            TimeoutError: it does not come up.
            NodeDiffers: its node has other versions than the run.
            RayError, RuntimeError: it failed, or serves something else.
        """
        processes = await self._waits.wait(
            self._actor.api.start.remote(),
            f"engine {self._index} to start",
            self._limits.start_timeout_s,
        )
        weights = None
        while weights is not (latest := newest()):  # one may come while another is loaded
            weights = latest
            assert weights is not None  # versions only ever replace each other
            [place] = weights.source.places([self.receiver])
            try:
                await self.load(weights, place, tolerance)
            except WeightsLost:  # the learner that lost them, too, will publish others
                with suppress(TimeoutError):
                    await self._waits.wait(
                        _another(weights, newest),
                        f"weights for engine {self._index}, since those of version "
                        f"{weights.number} are lost",
                        TRY_AGAIN_S,
                    )
                weights = None  # it may wait for this engine, after a group that failed
        self._become(ReplicaState.SERVING)
        return processes

    async def load(
        self, weights: WeightVersion, place: Awaitable[Place], tolerance: float | None
    ) -> None:
        """Take a version over, once it has its place, and prove it, each within `load_timeout_s`.

        It proves digests and version, and log-probabilities unless `tolerance` (nats a token)
        is None. Whatever is raised but `WeightsLost`, the engine must be replaced.

        Raises:
            WeightsLost: the bytes cannot be had any more; it has what it had before.
            TimeoutError: it does not answer.
            RayError, RuntimeError: it failed, or serves something else.
        """
        limit_s, name = self._limits.load_timeout_s, f"engine {self._index}"
        taken = await self._waits.wait(
            place,  # which may wait for room, for however long
            f"version {weights.number} to come to the node of {name}",
            math.inf,
        )
        load = self._actor.api.load.remote(weights.manifest, taken)
        await self._waits.wait(load, f"{name} to load version {weights.number}", limit_s)
        if tolerance is not None:
            probe = self._actor.api.probe.remote(weights.probe.token_ids)
            found: list[float] = await self._waits.wait(probe, f"{name} to be probed", limit_s)
            off = weights.probe.distance(found)
            if off > tolerance:
                raise RuntimeError(
                    f"{name} is {off:.2g} nats a token off the learner at version "
                    f"{weights.number} (sync.probe_tolerance={tolerance})"
                )
        self._version = weights.number

    async def sleep(self) -> None:
        """Have it give its GPU's memory back until the next `load`.

        Raises:
            TimeoutError: it does not answer within `load_timeout_s`.
            RayError, RuntimeError: it failed.
        """
        asked, what = self._actor.api.sleep.remote(), f"engine {self._index} to sleep"
        await self._waits.wait(asked, what, self._limits.load_timeout_s)

    # Trees ---------------------------------------------------------------------------------------

    def take_place(self) -> None:
        """A tree comes."""
        if not self.has_room:
            raise RuntimeError(f"engine {self._index} takes no tree now")
        self._num_trees += 1

    def give_place_back(self) -> None:
        """A tree has left."""
        if not self._num_trees:
            raise RuntimeError(f"engine {self._index} has no tree")
        self._num_trees -= 1
        self._left.notify()

    def finished_tree(self) -> None:
        """A tree was finished: the starts before it count no more."""
        self._num_starts = 1

    async def grow(
        self,
        prompt_ids: list[int],
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
        held: list[SiblingGroup],
    ) -> AsyncGenerator[SiblingGroup, None]:
        """Grow a tree from the groups held; yields groups as they come.

        Raises:
            TimeoutError: no group of any of its trees has come for `request_timeout_s`. One that is
                busy with others may leave this tree waiting for long; it hangs if none moves.
            RayError: it failed.
        """
        stream = self._actor.api.grow.options(num_returns="streaming").remote(
            prompt_ids, shape, sampling, seed, held
        )

        async def next_group() -> SiblingGroup | None:
            group: Awaitable[SiblingGroup] | None = await anext(stream, None)
            return None if group is None else await group

        async def arrived() -> SiblingGroup | None:
            # Quiet, since there are many trees and each says itself how long it has waited.
            return await self._waits.wait(
                next_group(),
                f"engine {self._index} to finish a step group",
                self._limits.request_timeout_s,
                is_quiet=True,
                moved_at=lambda: self._moved_at,
            )

        try:
            while (group := await arrived()) is not None:
                self._moved_at = _now()
                yield group
        except asyncio.CancelledError:
            self._actor.cancel(stream)
            raise

    async def totals(self, limit_s: float) -> EngineStats | None:
        """What it has done; its last answer, if there is one, where it answers late.

        Its version is the newest that it proved itself, which may be behind the pool's.

        Raises:
            RayError, RuntimeError: it failed.
        """
        answer = self._actor.api.stats.remote()
        try:
            self._stats = await self._waits.wait(answer, f"engine {self._index} to answer", limit_s)
        except TimeoutError:
            if self._stats is not None:
                self._stats = replace(self._stats, version=self._version)
        return self._stats

    # The end -------------------------------------------------------------------------------------

    def leave_by(self, ends_at_s: float) -> None:
        """Its node will be gone at that Unix time; infinite where nobody said when."""
        self._ends_at = _now() + ends_at_s - time.time()
        self._left.notify()

    def drain(self) -> None:
        """Take no more trees."""
        self._become(ReplicaState.DRAINING)

    async def drained(self, margin_s: float) -> None:
        """Wait until its trees have left, or until `margin_s` before its node ends."""
        while self._num_trees and (left_s := self._ends_at - margin_s - _now()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._left.wait()

    async def stop(self) -> None:
        """Have vLLM shut down; `kill` it in any case."""
        await self._actor.api.stop.remote()

    def kill(self) -> None:
        """End its process at once, unless that was done; its trees move on."""
        if self._state is not ReplicaState.GONE:
            self._become(ReplicaState.GONE)
            self._actor.kill()


NEXT_STATES = {
    ReplicaState.STARTING: {ReplicaState.SERVING, ReplicaState.GONE},
    ReplicaState.SERVING: {ReplicaState.DRAINING, ReplicaState.GONE},
    ReplicaState.DRAINING: {ReplicaState.GONE},
    ReplicaState.GONE: set[ReplicaState](),
}
"""The states that may follow each."""


async def _another(weights: WeightVersion, newest: Callable[[], WeightVersion | None]) -> None:
    """Wait until there is a newer one than `weights`."""
    while newest() is weights:
        await asyncio.sleep(LOOK_EVERY_S)


def _now() -> float:
    return asyncio.get_running_loop().time()
