"""Engine pool: grows admitted tickets on the engines and hands out the finished trees.

    gate ──ticket──► least busy engine ──sibling groups──► finished trees ──► tree stream

Trees leave in whole batches: those of batch k (tickets [kB, (k+1)B)) before any of batch k + 1,
and within a batch as they finish. What no learner step has consumed is kept for checkpoints.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import TypeVar

import ray

from treerpo_ray.algo.search import TreeShape, step_seed
from treerpo_ray.config import Config
from treerpo_ray.engine.autoscaler import Autoscaler
from treerpo_ray.engine.pool import EnginePool
from treerpo_ray.engine.types import EngineStats, Sampling
from treerpo_ray.metrics.health import StackDump, StageStatus
from treerpo_ray.metrics.run_log import RunLogApi
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.search.gate import Ticket
from treerpo_ray.search.growing_tree import Flights, GrowingTree
from treerpo_ray.task import GateApi
from treerpo_ray.weight_sync import Manifest, Probe

T = TypeVar("T")


log = logging.getLogger(__name__)


class TreePool:
    """The stage between gate and tree stream; an actor with asynchronous methods.

    It serves one run at a time: `begin` it, then `start`.

    Args:
        config: The configuration that the engines are started for.
        log_folder: Where the engines' output goes; None leaves it to Ray.
    """

    def __init__(self, config: Config, log_folder: str | None) -> None:
        self.config = config
        self.prompts: PromptSet
        self.shape: TreeShape
        self.engines = EnginePool(config, log_folder)
        self._changed = self.engines.changed
        self._saved: dict[int, TreeRecord] = {}
        """Trees of a checkpoint whose tickets have not been issued again."""
        self._growing: dict[int, GrowingTree] = {}
        self._finished: dict[int, TreeRecord] = {}
        self._taken: dict[int, TreeRecord] = {}
        """Trees in the stream, at least all that no learner step has consumed."""
        self._released = 0
        self._num_workers = 1
        self._work: set[asyncio.Task] = set()
        self._reader = ""
        self._past_readers: set[str] = set()
        self._failure: Exception | None = None
        self._flights = Flights()
        self._gate: GateApi
        """Of the tickets that are grown; a tree can be redrawn only once there are any."""

    async def begin(
        self, config: Config, prompts: PromptSet, shape: TreeShape, run_log: RunLogApi
    ) -> None:
        """Turn to a run. Engines that served another one keep its weights until the next `serve`.

        Args:
            config: The run's configuration; see `can_serve`.
            prompts: The training set.
            shape: Shape of the training trees, with the delimiter's token id.
            run_log: Actor of `RunLog`, told of every tree and failure.
        """
        self._drop_work()
        self.config, self.prompts, self.shape = config, prompts, shape
        self.engines.run_log = run_log

    async def start(self) -> None:
        """Start the engines, unless that was done, and from then on keep their number right."""
        if self.engines.replicas:
            return
        await self.engines.start()
        self.engines.spawn(Autoscaler(self.engines).run())

    async def serve(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, should_probe: bool
    ) -> None:
        """Have the engines serve a version; see `EnginePool.serve`."""
        await self.engines.serve(manifest, chunks, probe, should_probe)

    async def version(self) -> int:
        """Version that the engines serve."""
        return self.engines.version

    async def stats(self) -> list[EngineStats]:
        """Totals of each serving engine."""
        return await self.engines.stats()

    async def stop(self) -> None:
        """End all work and shut the engines down."""
        for task in self._work:
            task.cancel()
        await self.engines.stop()

    async def grow_tickets(
        self, gate: GateApi, session: int, first: int, num_workers: int, saved: list[TreeRecord]
    ) -> None:
        """Drop what is in flight, evaluations too, and grow all tickets of a session from `first`.

        Args:
            gate: Actor of `Gate`.
            session: The session that its `restart` began.
            first: The first ticket of the session.
            num_workers: Learner workers, between whom the trees of a step are shared out.
            saved: Trees of a checkpoint, finished or partly grown, that tickets go on from.
        """
        self._drop_work()
        self._saved = {tree.ticket: tree for tree in saved}
        self._released = first
        self._num_workers = num_workers
        self._gate = gate
        self._spawn(self._admit(gate, session))

    def _drop_work(self) -> None:
        for task in list(self._work):
            task.cancel()
        for trees in (self._saved, self._growing, self._finished, self._taken):
            trees.clear()
        self._reader = ""  # the one of the stream that ended may still be waiting
        self._failure = None

    async def share_size(self) -> int:
        """Trees that each learner worker consumes in a step."""
        return self.config.gate.trees_per_step // self._num_workers

    async def _admit(self, gate: GateApi, session: int) -> None:
        size, staleness = self.config.gate.trees_per_step, self.config.gate.max_staleness
        while (ticket := await gate.next.remote(session)) is not None:
            due = (ticket.number // size - staleness) * size  # the gate lets no ticket out sooner
            self._taken = {n: tree for n, tree in self._taken.items() if n >= due}
            self._spawn(self._grow_ticket(ticket))

    async def redraw(self, reader: str, past: TreeRecord) -> None:
        """Grow the ticket of a tree that was taken anew, with another prompt."""
        if reader == self._reader:
            self._released -= 1
            del self._taken[past.ticket]
            self._spawn(self._redraw(past))

    async def _redraw(self, past: TreeRecord) -> None:
        num_redraws = past.num_redraws + 1
        tokens = past.redrawn_tokens + past.tree.num_sampled_tokens
        ticket = await self._gate.redrawn.remote(past.ticket, num_redraws)
        await self._grow(self._growth(ticket, num_redraws=num_redraws, redrawn_tokens=tokens))

    async def _grow_ticket(self, ticket: Ticket) -> None:
        past = self._saved.get(ticket.number)
        if past is not None and past.num_redraws:
            ticket = await self._gate.redrawn.remote(ticket.number, past.num_redraws)
        growth = self._growth(ticket)
        self._saved.pop(ticket.number, None)
        if past is not None and growth.take_up(past):
            self.engines.note(
                "tree_reused",
                ticket=ticket.number,
                groups=len(growth.groups),
                is_finished=bool(growth.finished_at_s),
            )
        await self._grow(growth)

    def _growth(self, ticket: Ticket, num_redraws: int = 0, redrawn_tokens: int = 0) -> GrowingTree:
        return GrowingTree(
            ticket=ticket,
            prompts=self.prompts,
            shape=self.shape,
            sampling=Sampling(temperature=self.config.tree.temperature),
            num_redraws=num_redraws,
            redrawn_tokens=redrawn_tokens,
        )

    async def _grow(self, growth: GrowingTree) -> None:
        number = growth.ticket.number
        self._growing[number] = growth
        record = await growth.finish(self.engines, self._flights)
        del self._growing[number]
        self._finished[number] = record
        self.engines.note(
            "tree_finished",
            ticket=number,
            problem=record.prompt_id,
            attempt=record.attempt,
            engine=record.engine,
            min_version=record.tree.min_version,
            max_version=record.tree.max_version,
        )
        await self._notify()

    async def unconsumed(self, first: int) -> list[TreeRecord]:
        """The trees of tickets from `first` on, finished or partly grown, for a checkpoint."""
        growing = [growth.record() for growth in self._growing.values() if growth.groups]
        held = [*self._saved.values(), *self._taken.values(), *self._finished.values(), *growing]
        return [tree for tree in held if tree.ticket >= first]

    async def status(self, stacks: StackDump) -> StageStatus:
        """What is in flight, and since when nothing has moved."""
        stacks.arm()
        finished = f"finished and not taken: {sorted(self._finished)}"
        return self._flights.status(f"{finished}; {self.engines.states()}")

    async def take(self, reader: str, max_trees: int, wait_s: float) -> list[TreeRecord] | None:
        """Up to `max_trees` finished trees in batch order; none after `wait_s` without any.

        Trees go to the newest reader only: one of a stream that has ended gets None.
        """
        if reader not in self._past_readers:
            self._past_readers.add(reader)
            self._reader = reader
        deadline = time.monotonic() + wait_s
        while reader == self._reader and not self._ready():
            if self._failure is not None:
                raise self._failure
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            async with self._changed:
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    return []
        if reader != self._reader:
            return None
        taken = self._ready()[:max_trees]
        self._released += len(taken)
        trees = {number: self._finished.pop(number) for number in taken}
        self._taken |= trees
        return list(trees.values())

    def _ready(self) -> list[int]:
        """Finished tickets of the batch that is due."""
        size = self.config.gate.trees_per_step
        end = (self._released // size + 1) * size
        return [number for number in self._finished if number < end]

    async def evaluate(
        self, prompts: PromptSet, shape: TreeShape, sampling: Sampling, seed: int
    ) -> AsyncIterator[TreeRecord]:
        """One tree for each prompt, as they finish; used with depth 1, outside the gate.

        Raises:
            RuntimeError: the pool began other work, or ended.
        """
        grows = [
            self._start(
                GrowingTree(
                    ticket=Ticket(number=number, prompt=number, seed=step_seed(seed, (number,))),
                    prompts=prompts,
                    shape=shape,
                    sampling=sampling,
                ).finish(self.engines, self._flights)
            )
            for number in range(len(prompts))
        ]
        try:
            for finished in asyncio.as_completed(grows):
                yield await finished
        except asyncio.CancelledError:
            if any(task.cancelled() for task in grows):
                raise RuntimeError("the pool gave this evaluation up") from None
            raise
        finally:
            for task in grows:
                task.cancel()

    def _start(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """Run `work` beside the others, until `_drop_work` at the latest."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside the others; a failure of it ends the run through `take`."""
        self._start(work).add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the engine pool failed", exc_info=error)
            self._failure = error if isinstance(error, Exception) else RuntimeError(str(error))
            self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
