"""Engine pool: the engine actors of a run; starts them, keeps them current, replaces the failed.

An engine that the cluster has no room for is a pending actor, which is the demand that Ray's
autoscaler sees; nothing but the start of a run waits for it. One that fails time and again is
given up, and the others go on.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace

import ray

from treerpo_ray.actor import first_line
from treerpo_ray.config import Config
from treerpo_ray.engine.engine import make_engine
from treerpo_ray.engine.replica import Replica, WeightVersion
from treerpo_ray.engine.types import EngineStats
from treerpo_ray.engine.waits import Waits
from treerpo_ray.metrics.run_log import Event, RunLogApi
from treerpo_ray.weight_sync import Manifest, Probe


class Router:
    """Hands the router of the engines to trees, first come, first served.

    Args:
        replicas: The engines that take trees once they serve; the caller changes this list.
        max_trees: Trees that one engine grows at a time; None: any number.
    """

    def __init__(self, replicas: list[Replica], max_trees: int | None) -> None:
        self.replicas = replicas
        self.max_trees = math.inf if max_trees is None else max_trees
        self._waiting: deque[asyncio.Future[Replica]] = deque()

    @property
    def num_waiting(self) -> int:
        """Trees without a place."""
        return sum(not place.done() for place in self._waiting)

    async def take(self) -> Replica:
        """A place at the engine with the fewest trees, as soon as there is one."""
        place: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self.fill()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(place.result())
            raise

    def release(self, replica: Replica) -> None:
        """Give a place back."""
        replica.num_trees -= 1
        self.fill()

    def fill(self) -> None:
        """Let trees in while there are router; to be called whenever there may be more."""
        while self._waiting:
            free = [m for m in self.replicas if m.is_serving and m.num_trees < self.max_trees]
            if not free:
                return
            place = self._waiting.popleft()
            if not place.done():
                replica = min(free, key=lambda m: m.num_trees)
                replica.num_trees += 1
                place.set_result(replica)

    def fail(self, error: Exception) -> None:
        """Raise `error` in all who wait: no engine will serve any more."""
        while self._waiting:
            if not (place := self._waiting.popleft()).done():
                place.set_exception(error)


log = logging.getLogger(__name__)


ANSWER_S = 5.0
"""Time that engines have to answer for their totals; the learner waits."""


STOP_S = 30
"""Time that engines have to shut down by themselves."""


MAX_STARTS = 5
"""Starts of one engine, without a tree in between, after which it is given up."""


REST_S = 300.0
"""Time after which the pool may start another one in place of an engine that was given up."""


class EnginePool:
    """All engines of a run, or of several one after the other; each serves only what it proved.

    Args:
        config: The configuration that the engines are started for.
        log_folder: Where the engines' output goes; None leaves it to Ray.
    """

    def __init__(self, config: Config, log_folder: str | None) -> None:
        self.config, self.log_folder = config, log_folder
        self.run_log: RunLogApi
        """Actor of the run's `RunLog`, told of engines that come, go or are waited for."""
        self.changed = asyncio.Condition()
        """Notified whenever an engine begins to serve, and by the pool."""
        self.failure: BaseException | None = None
        """Why an engine was given up; none is added until trees have been finished without it."""
        self._rests_until = 0.0
        self.replicas: list[Replica] = []
        """Those that take trees, or will once they serve."""
        self.leaving: list[Replica] = []
        """Those that only finish their trees."""
        self.router = Router(self.replicas, config.engine.max_trees)
        self.waits = Waits(lambda s, what: self.note("waiting", seconds=round(s), what=what))
        self._served: WeightVersion | None = None
        self._serving = asyncio.Lock()
        self._work: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start `engine.num_engines`; returns once all of them can serve.

        One that fails is replaced as it is later, which is waited for only if no other one serves.

        Raises:
            TimeoutError: one had no node after `engine.start_timeout_s`.
            RuntimeError: all were given up.
        """
        for index in range(self.config.engine.num_engines):
            self.add(index)

        def new() -> list[Replica]:
            return [m for m in self.replicas if m.num_starts == 1]

        limit_s = self.config.engine.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._until(lambda: all(replica.node for replica in new()))
        except TimeoutError:
            lacking = ", ".join(str(replica.index) for replica in new() if not replica.node)
            raise TimeoutError(
                f"waited {limit_s:.0f} s for {self._needed_node} for engine {lacking}"
            ) from None
        await self._until(lambda: self._is_serving() and all(m.is_serving for m in new()))

    @property
    def _needed_node(self) -> str:
        return f"a node with {self.config.engine.resources | self.config.engine.labels}"

    async def _bring_up(self, replica: Replica) -> None:
        """Start an engine, give it the latest weights, and let it serve once it has proved them."""
        start = time.monotonic()
        limits = self.config.engine
        node_name = f"{self._needed_node} for engine {replica.index}"
        replica.node = await self.waits.wait(replica.actor.node.remote(), node_name, math.inf)
        await self._notify()
        pid, core = await self.waits.wait(
            replica.actor.start.remote(), f"engine {replica.index} to start", limits.start_timeout_s
        )
        served = None
        while served is not self._served:  # a newer version may come while one is loaded
            served = self._served
            assert served is not None  # versions only ever replace each other
            tolerance = self.config.sync.probe_tolerance
            await served.load_into(replica, self.waits, limits.load_timeout_s, tolerance)
        replica.is_serving = True
        self.router.fill()
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
        await self._notify()

    async def serve(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, should_probe: bool
    ) -> None:
        """Have every serving engine take over a version and prove it; one at least must.

        Digests and version are proved each time, log-probabilities if `should_probe`, and by an
        engine that comes up later in any case.
        """
        async with self._serving:  # a worker that died may have left a publication under way
            served = self._served = WeightVersion(manifest=manifest, chunks=chunks, probe=probe)
            replicas = [m for m in (*self.replicas, *self.leaving) if m.is_serving]
            limit_s = self.config.engine.load_timeout_s
            tolerance = self.config.sync.probe_tolerance if should_probe else None
            loads = (served.load_into(m, self.waits, limit_s, tolerance) for m in replicas)
            results = await asyncio.gather(*loads, return_exceptions=True)
            for replica, result in zip(replicas, results, strict=True):
                if isinstance(result, BaseException):
                    self.replace(replica, result)
        # One that comes up anew has loaded this version before it serves.
        await self._until(self._is_serving)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something; RuntimeError once all engines were given up."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.replicas or is_so())
        if not self.replicas:
            raise self._gave_up()

    def _is_serving(self) -> bool:
        return any(replica.is_serving for replica in self.replicas)

    def _gave_up(self) -> RuntimeError:
        assert self.failure is not None  # it is why the last engine was not replaced
        return RuntimeError(
            f"an engine failed {MAX_STARTS} times in a row: {first_line(self.failure)}"
        )

    def replace(self, replica: Replica, error: BaseException) -> None:
        """Take an engine out and start another in its place; nothing if that was done already."""
        if replica in self.leaving:  # another was asked for, if one is needed
            replica.kill()
        if replica not in self.replicas:
            return
        self.note("engine_lost", engine=replica.index, reason=first_line(error))
        self.remove(replica)
        if replica.num_starts == MAX_STARTS:
            reason = f"it is given up after {MAX_STARTS} starts without a tree"
            self.note(
                "engine_left", engine=replica.index, node=replica.node, trees=0, reason=reason
            )
            self.failure, self._rests_until = error, time.monotonic() + REST_S
            if not self.replicas:
                self.router.fail(self._gave_up())
        else:
            self.add(replica.index, replica.num_starts + 1)
        self.spawn(self._notify())

    def add(self, index: int, num_starts: int = 1) -> None:
        """Ask Ray for an engine; it serves when it is up."""
        actor = make_engine(self.config, index, self.log_folder)
        replica = Replica(index, actor, num_starts=num_starts)
        self.replicas.append(replica)
        self.spawn(self._bring_up_or_replace(replica))

    def remove(self, replica: Replica) -> None:
        """Let an engine go at once."""
        replica.is_serving = False
        self.replicas.remove(replica)
        replica.kill()

    async def _bring_up_or_replace(self, replica: Replica) -> None:
        try:
            await self._bring_up(replica)
        except Exception as error:  # whatever it is, this one will not serve
            self.replace(replica, error)

    def finished_tree(self, replica: Replica) -> None:
        """An engine has finished a tree: what failed before counts no more."""
        replica.num_starts = 1
        if self.replicas and time.monotonic() >= self._rests_until:
            self.failure = None

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside everything else, until `stop`."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work on the engines failed", exc_info=error)
            self.note("engine_work_failed", reason=first_line(error))

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    @property
    def version(self) -> int:
        """Version that the engines serve."""
        return 0 if self._served is None else self._served.manifest.version

    def states(self) -> str:
        """Which engines serve, for people."""
        return ", ".join(
            f"engine {m.index} {'serves' if m.is_serving else 'starts'} with {m.num_trees} trees"
            for m in (*self.replicas, *self.leaving)
        )

    async def stats(self) -> list[EngineStats]:
        """Totals of each serving engine; one that answers late counts as it last did.

        Its version is the newest that it proved itself, which may be behind the pool's. Whether it
        hangs is for the trees on it and for the next version to find out.
        """
        replicas = [replica for replica in self.replicas if replica.is_serving]
        asked = (
            self.waits.wait(m.actor.stats.remote(), f"engine {m.index} to answer", ANSWER_S)
            for m in replicas
        )
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for replica, answer in zip(replicas, answers, strict=True):
            if isinstance(answer, EngineStats):
                replica.stats = answer
            elif not isinstance(answer, TimeoutError):
                replica.stats = None
                self.replace(replica, answer)
            elif replica.stats is not None:
                replica.stats = replace(replica.stats, version=replica.version)
        return [replica.stats for replica in replicas if replica.stats is not None]

    async def stop(self) -> None:
        """End all work and shut the engines down."""
        for task in self._work:
            task.cancel()
        replicas = [*self.replicas, *self.leaving]
        await self.stop_actors([replica for replica in replicas if replica.is_serving])
        for replica in replicas:
            replica.kill()

    async def stop_actors(self, replicas: list[Replica]) -> None:
        """Shut engines down; those that fail to end by themselves are for `kill`."""
        stops = (replica.actor.stop.remote() for replica in replicas)
        try:
            await asyncio.wait_for(asyncio.gather(*stops, return_exceptions=True), STOP_S)
        except TimeoutError:
            self.note("waiting", seconds=STOP_S, what="engines to stop; they are killed")

    async def pick(self) -> Replica:
        """The engine with the fewest trees, for one more tree; `release` gives the place back.

        Raises:
            RuntimeError: engines cannot be replaced any more.
        """
        if not self.replicas:
            raise self._gave_up()
        return await self.router.take()

    def release(self, replica: Replica) -> None:
        """A tree has left an engine that `pick` gave it."""
        self.router.release(replica)

    def note(self, kind: str, **fields: str | int) -> None:
        """Append an event to the run's log."""
        self.run_log.event.remote(Event(kind=kind, fields=fields))


def can_serve(started: Config, config: Config) -> bool:
    """Whether engines that were started for one configuration can serve a run of another."""
    parts = [(each.model, each.engine, each.sync) for each in (started, config)]
    return parts[0] == parts[1] and started.max_model_tokens >= config.max_model_tokens
