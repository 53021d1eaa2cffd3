"""Engine pool: the engine actors of a run; starts them, keeps them current, replaces the failed.

An engine that the cluster has no room for is a pending actor, which is the demand that Ray's
autoscaler sees; nothing but the start of a run waits for it. One that fails time and again is
given up, at once if its node has other versions than the run, and the others go on.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from treerpo_ray.actor import first_line
from treerpo_ray.config.sections import EngineConfig
from treerpo_ray.engine._waits import Waits
from treerpo_ray.engine.background import BackgroundTasks, Signal
from treerpo_ray.engine.replica import Replica, ReplicaState, WeightVersion
from treerpo_ray.engine.router import Router
from treerpo_ray.engine.types import EngineActor, EngineStats
from treerpo_ray.errors import NodeDiffers
from treerpo_ray.metrics.events import Event, RunLogApi
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import WeightsLost
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.source import WeightSource

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_STARTS = 5
"""Starts of one engine, without a tree in between, after which it is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTimes:
    """Times of a pool that no run needs to set, in seconds."""

    answer_s: float = 5.0
    """That engines have to answer for their totals; the learner waits."""
    stop_s: float = 30.0
    """That engines have to shut down by themselves."""
    rest_s: float = 300.0
    """After which the pool may start another one in place of an engine that was given up."""
    margin_s: float = 5.0
    """Before the end of its node at which an engine's last trees move on."""
    report_every_s: float = 30.0
    """After which a wait is told of, and between two reports."""
    look_every_s: float = 2.0
    """Between looks of the autoscaler at the cluster and at the number of trees."""


TIMES = PoolTimes()


class EnginePool:
    """All engines of a run, or of several one after the other; each serves only what it proved.

    Args:
        limits: How many engines there are, and what time they have for each thing.
        probe_tolerance: Nats a token that an engine may be off the learner.
        make_engine: Asks Ray for an engine, by its number.
    """

    def __init__(
        self,
        *,
        limits: EngineConfig,
        probe_tolerance: float,
        make_engine: Callable[[int], EngineActor],
        times: PoolTimes = TIMES,
    ) -> None:
        self._limits, self._tolerance, self._times = limits, probe_tolerance, times
        self._make_engine = make_engine
        self.run_log: RunLogApi
        """Actor of the run's `RunLog`, told of engines that come, go or are waited for."""
        self._replicas: list[Replica] = []
        """Those that are not gone."""
        self._router = Router(self._replicas)
        self._changed = Signal()
        """Of an engine that has a node, begins to serve or goes."""
        self._failure: BaseException | None = None
        """Why an engine was given up, until trees have been finished without it."""
        self._rests_until = 0.0
        """Time of the event loop until which that counts in any case."""
        self._weights: WeightVersion | None = None
        self._serving = asyncio.Lock()
        self._is_asleep = False
        """Whether the learner has the engines' memory."""
        self._starting: set[Replica] = set()
        """Those that take memory and do not serve yet."""
        self._waits = Waits(
            report=lambda seconds, what: self.note("waiting", seconds=round(seconds), what=what),
            report_every_s=times.report_every_s,
        )
        self._background = BackgroundTasks(failed=self._work_failed)

    # What there is -------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Those that are not gone."""
        return tuple(self._replicas)

    @property
    def staying(self) -> list[Replica]:
        """Those that take trees, or will once they serve."""
        return [each for each in self._replicas if each.state is not ReplicaState.DRAINING]

    @property
    def num_waiting(self) -> int:
        """Trees without a place on an engine."""
        return self._router.num_waiting

    @property
    def num_growing(self) -> int:
        """Trees that have a place on an engine."""
        return sum(replica.num_trees for replica in self._replicas)

    @property
    def may_grow(self) -> bool:
        """Whether another engine is worth a try."""
        return self._failure is None

    @property
    def version(self) -> int:
        """Version that the engines serve."""
        return 0 if self._weights is None else self._weights.number

    def states(self) -> str:
        """Which engines serve, for people."""
        return ", ".join(map(str, self._replicas))

    def _is_serving(self) -> bool:
        return any(replica.is_serving for replica in self._replicas)

    # Engines come --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start `num_engines`; returns once all of them can serve.

        One that fails is replaced as it is later, which is waited for only if no other one serves.

        Raises:
            TimeoutError: one had no node after `start_timeout_s`.
            RuntimeError: all were given up.
        """
        for _ in range(self._limits.num_engines):
            self.add()

        def new() -> list[Replica]:
            return [each for each in self._replicas if each.num_starts == 1]

        limit_s = self._limits.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._until(lambda: all(replica.node for replica in new()))
        except TimeoutError:
            lacking = ", ".join(str(replica.index) for replica in new() if not replica.node)
            raise TimeoutError(
                f"waited {limit_s:.0f} s for {self._needed_node} for engine {lacking}"
            ) from None
        await self._until(lambda: self._is_serving() and all(each.is_serving for each in new()))

    @property
    def _needed_node(self) -> str:
        return f"a node with {self._limits.resources | self._limits.labels}"

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` on the engines beside everything else, until `stop`."""
        self._background.spawn(work)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something; RuntimeError once all engines were given up."""
        await self._changed.wait_for(lambda: not self.staying or is_so())
        if not self.staying:
            raise self._gave_up()

    def add(self) -> None:
        """Ask Ray for an engine, with the first free number; it serves when it is up."""
        taken = {replica.index for replica in self._replicas}
        self._add(next(index for index in range(len(taken) + 1) if index not in taken), 1)

    def _add(self, index: int, num_starts: int) -> None:
        replica = Replica(
            index=index,
            actor=self._make_engine(index),
            limits=self._limits,
            waits=self._waits,
            num_starts=num_starts,
        )
        self._replicas.append(replica)
        self._background.spawn(self._bring_up_or_replace(replica))

    async def _bring_up_or_replace(self, replica: Replica) -> None:
        try:
            await self._bring_up(replica)
        except Exception as error:  # whatever it is, this one will not serve
            self.replace(replica, error)

    async def _bring_up(self, replica: Replica) -> None:
        start = time.monotonic()
        await replica.find_node(self._needed_node)
        self._changed.notify()
        await self._changed.wait_for(lambda: not self._is_asleep)
        self._starting.add(replica)
        try:
            pid, core = await replica.start(lambda: self._weights, self._tolerance)
        finally:
            self._starting.discard(replica)
            self._changed.notify()
        self._router.fill()
        self.note(
            "engine_serving",
            engine=replica.index,
            pid=pid,
            core=core,
            starts=replica.num_starts,
            node=replica.node,
            version=self.version,
            trees=replica.num_trees,
            seconds=round(time.monotonic() - start),
        )
        self._changed.notify()

    # Weights and totals --------------------------------------------------------------------------

    async def serve(
        self, manifest: Manifest, source: WeightSource, probe: Probe, should_probe: bool
    ) -> None:
        """Have every serving engine take over a version and prove it; one at least must.

        Digests and version are proved each time, log-probabilities if `should_probe`, and by an
        engine that comes up later in any case.

        Raises:
            WeightsLost: an engine cannot have the bytes any more; it goes on with what it serves,
                and one that comes up waits for other weights.
            RuntimeError: engines cannot be replaced any more.
        """
        async with self._serving:  # a worker that died may have left a publication under way
            self._weights = weights = WeightVersion(manifest=manifest, source=source, probe=probe)
            self._is_asleep = False
            self._changed.notify()
            replicas = [replica for replica in self._replicas if replica.takes_weights]
            tolerance = self._tolerance if should_probe else None
            places = source.places([replica.receiver for replica in replicas])
            taken = zip(replicas, places, strict=True)
            loads = (replica.load(weights, place, tolerance) for replica, place in taken)
            for result in await self._asked(replicas, loads):
                if isinstance(result, WeightsLost):
                    raise result
        # One that comes up anew has loaded this version before it serves.
        await self._until(self._is_serving)

    async def sleep(self) -> None:
        """Have the engines give their GPUs' memory back until the next `serve` or `wake`; one that
        fails, and any other that is to come, starts after that.

        One that is loading into that memory is waited for, but for no longer than a start may take.
        """
        async with self._serving:
            self._is_asleep = True
            try:
                await self._waits.wait(
                    self._changed.wait_for(lambda: not self._starting),
                    "engines that start, before the learner takes their memory",
                    self._limits.start_timeout_s,
                )
            except TimeoutError as error:
                for replica in tuple(self._starting):
                    self.replace(replica, error)
            replicas = [replica for replica in self._replicas if replica.takes_weights]
            await self._asked(replicas, (replica.sleep() for replica in replicas))

    async def wake(self) -> None:
        """Have engines that sleep load what they served before.

        Raises:
            WeightsLost, RuntimeError: As of `serve`.
        """
        weights = self._weights
        if self._is_asleep and weights is not None:
            await self.serve(weights.manifest, weights.source, weights.probe, should_probe=False)

    async def stats(self) -> list[EngineStats]:
        """Totals of each serving engine; one that answers late counts as it last did.

        Whether it hangs is for the trees on it and for the next version to find out.
        """
        replicas = [replica for replica in self._replicas if replica.is_serving]
        asked = (replica.totals(self._times.answer_s) for replica in replicas)
        answers = await self._asked(replicas, asked)
        return [answer for answer in answers if isinstance(answer, EngineStats)]

    async def _asked(
        self, replicas: Sequence[Replica], works: Iterable[Awaitable[T]]
    ) -> list[T | BaseException]:
        """What came of the work of each; one that failed is replaced, unless it lost weights."""
        results = await asyncio.gather(*works, return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, WeightsLost):
                self.replace(replica, result)
        return results

    # Trees ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Replica]:
        """A place for a tree, at the engine with the fewest, as soon as there is one.

        Raises:
            RuntimeError: engines cannot be replaced any more.
        """
        if not self.staying:
            raise self._gave_up()
        replica = await self._router.take()
        try:
            yield replica
        finally:
            self._router.release(replica)

    def finished_tree(self, replica: Replica) -> None:
        """An engine has finished a tree: what failed before counts no more."""
        replica.finished_tree()
        if self.staying and asyncio.get_running_loop().time() >= self._rests_until:
            self._failure = None

    # Engines go ----------------------------------------------------------------------------------

    def replace(self, replica: Replica, error: BaseException) -> None:
        """End a failed engine and start another in its place; nothing if it is gone already."""
        if replica.state is ReplicaState.GONE:
            return
        was_draining = replica.state is ReplicaState.DRAINING
        self._end(replica)
        if was_draining:  # another was asked for, if one is needed
            self._note_end("engine_left", replica, f"it failed: {first_line(error)}")
            return
        self.note("engine_lost", engine=replica.index, reason=first_line(error))
        reason = f"it is given up after {MAX_STARTS} starts without a tree"
        if isinstance(error, NodeDiffers):  # another start there would differ, too
            reason = "it is given up, since its node differs"
        elif replica.num_starts < MAX_STARTS:
            self._add(replica.index, replica.num_starts + 1)
            return
        self.note("engine_left", engine=replica.index, node=replica.node, trees=0, reason=reason)
        now = asyncio.get_running_loop().time()
        self._failure, self._rests_until = error, now + self._times.rest_s
        if not self.staying:
            self._router.fail(self._gave_up())

    def _gave_up(self) -> RuntimeError:
        assert self._failure is not None  # it is why the last engine was not replaced
        what = f"an engine failed {MAX_STARTS} times in a row"
        if isinstance(self._failure, NodeDiffers):
            what = "no engine is left, and the node of the last one differs"
        return RuntimeError(f"{what}: {first_line(self._failure)}")

    def let_go(self, replica: Replica, reason: str) -> None:
        """Have an engine go: at once if it does not serve, else when its trees are finished."""
        if replica.is_serving:
            replica.drain()
            self._note_end("engine_draining", replica, reason)
            self._background.spawn(self._end_drained(replica))
        else:
            self._end(replica)
            self._note_end("engine_left", replica, reason)

    async def _end_drained(self, replica: Replica) -> None:
        await replica.drained(self._times.margin_s)
        if replica.state is ReplicaState.GONE:  # it failed meanwhile
            return
        reason = "its node ends" if replica.num_trees else "it is drained"
        self._note_end("engine_left", replica, reason)
        if not replica.num_trees:
            await self._stop([replica])
        self._end(replica)

    def _end(self, replica: Replica) -> None:
        """Let an engine go at once."""
        replica.kill()
        self._starting.discard(replica)
        if replica in self._replicas:
            self._replicas.remove(replica)
        self._changed.notify()

    async def stop(self) -> None:
        """End all work and shut the engines down."""
        self._background.cancel()
        await self._stop(
            [each for each in self._replicas if each.state is not ReplicaState.STARTING]
        )
        for replica in self._replicas:
            replica.kill()

    async def _stop(self, replicas: list[Replica]) -> None:
        """Shut engines down; those that fail to end by themselves are for `kill`."""
        stops = asyncio.gather(*(replica.stop() for replica in replicas), return_exceptions=True)
        try:
            await asyncio.wait_for(stops, self._times.stop_s)
        except TimeoutError:
            what = "engines to stop; they are killed"
            self.note("waiting", seconds=round(self._times.stop_s), what=what)

    # What is told --------------------------------------------------------------------------------

    def note(self, kind: str, **fields: str | int) -> None:
        """Append an event to the run's log."""
        self.run_log.event.remote(Event(kind=kind, fields=fields))

    def _note_end(self, kind: str, replica: Replica, reason: str) -> None:
        self.note(
            kind, engine=replica.index, node=replica.node, trees=replica.num_trees, reason=reason
        )

    def _work_failed(self, error: BaseException) -> None:
        log.error("work on the engines failed", exc_info=error)
        self.note("engine_work_failed", reason=first_line(error))
