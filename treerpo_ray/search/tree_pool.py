"""Tree pool: grows admitted tickets on the engines and hands out the finished trees.

    gate ──ticket──► least busy engine ──sibling groups──► finished trees ──► tree stream

Trees leave in whole batches: those of batch k (tickets [kB, (k+1)B)) before any of batch k + 1,
and within a batch as they finish. What no learner step has consumed is kept for checkpoints.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from treerpo_ray.actor import MakeActor, make_actor
from treerpo_ray.algo.search import TreeShape, step_seed
from treerpo_ray.config import Config
from treerpo_ray.config.sections import GateConfig
from treerpo_ray.engine.autoscaler import Autoscaler, Nodes, ScalingPolicy, see_nodes
from treerpo_ray.engine.background import BackgroundTasks, Signal
from treerpo_ray.engine.engine import make_engine
from treerpo_ray.engine.pool import TIMES, EnginePool, PoolTimes
from treerpo_ray.engine.types import EngineActor, EngineSetup, EngineStats, Sampling
from treerpo_ray.metrics.events import RunLogApi
from treerpo_ray.metrics.stage_status import StageStatus, WatchedStage
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.search.gate import redrawn
from treerpo_ray.search.growing_tree import GrowingTree
from treerpo_ray.task import GateApi, Ticket, TreePoolApi
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.source import WeightSource

log = logging.getLogger(__name__)


class TreePool(WatchedStage):
    """The stage between gate and tree stream; an actor with asynchronous methods.

    It serves one run at a time: `begin` it, then `start`.

    Args:
        setup: What the engines are started for.
        log_folder: Where the engines' output goes; None leaves it to Ray.
        make_engine: Asks Ray for an engine, by its number.
        see_nodes: Tells of the nodes of the cluster.
        times: Those of the engines that no run needs to set.
    """

    def __init__(
        self,
        *,
        setup: EngineSetup,
        log_folder: str | None,
        make_engine: Callable[[EngineSetup, int, str | None], EngineActor] = make_engine,
        see_nodes: Callable[[], Nodes] = see_nodes,
        times: PoolTimes = TIMES,
    ) -> None:
        self.setup = setup
        self.gate: GateConfig
        self.sampling: Sampling
        self.seed: int
        self.prompts: PromptSet
        self.shape: TreeShape
        engine = setup.engine
        self.engines = EnginePool(
            limits=engine,
            probe_tolerance=setup.probe_tolerance,
            make_engine=lambda index: make_engine(setup, index, log_folder),
            times=times,
        )
        policy = ScalingPolicy(
            fewest=engine.num_engines,
            most=engine.most,
            trees_per_engine=engine.max_trees,
            patience_s=engine.shrink_after_s,
        )
        self._autoscaler = Autoscaler(
            pool=self.engines,
            policy=policy,
            see_nodes=see_nodes,
            look_every_s=times.look_every_s,
        )
        self.growing: list[GrowingTree] = []
        """Those that wait for an engine or grow on one, evaluated ones too."""
        # A ticket's tree lies in one of these while it does not grow.
        self._saved: dict[int, TreeRecord] = {}
        """Trees of a checkpoint whose tickets have not been issued again."""
        self._finished: dict[int, TreeRecord] = {}
        self._taken: dict[int, TreeRecord] = {}
        """Trees in the stream, at least all that no learner step has consumed."""
        self._tickets: dict[int, Ticket] = {}
        """Those of all these trees, as the gate issued them."""
        self._released = 0
        self._num_workers = 1
        self._reader = ""
        self._past_readers: set[str] = set()
        self._has_ended = False
        """Whether a reader that comes now is of a run that has no further step."""
        self._changed = Signal()
        """Of a tree that is finished, a new reader, and a failure."""
        self._failure: Exception | None = None
        self._last_progress = time.monotonic()
        """When a tree last ended to grow: with its only step group, in an evaluation."""
        self._work = BackgroundTasks(failed=self._fail)

    async def begin(
        self,
        *,
        gate: GateConfig,
        prompts: PromptSet,
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
        run_log: RunLogApi,
    ) -> None:
        """Turn to a run. Engines that served another one keep its weights until the next `serve`.

        Args:
            gate: How many trees a learner step has, and how stale they may be.
            prompts: The training set.
            shape: Shape of the training trees, with the delimiter's token id; how many children
                each has its ticket says.
            sampling: How their tokens are drawn.
            seed: Of the run.
            run_log: Actor of `RunLog`, told of every tree and failure.
        """
        self._drop_work()
        self.gate, self.prompts, self.shape = gate, prompts, shape
        self.sampling, self.seed = sampling, seed
        self.engines.run_log = run_log

    async def start(self) -> None:
        """Start the engines, unless that was done, and from then on keep their number right."""
        if self.engines.replicas:
            return
        await self.engines.start()
        self.engines.spawn(self._autoscaler.run())

    async def serve(
        self, manifest: Manifest, source: WeightSource, probe: Probe, should_probe: bool
    ) -> None:
        """Have the engines serve a version; see `EnginePool.serve`."""
        await self.engines.serve(manifest, source, probe, should_probe)

    async def sleep(self) -> None:
        """Have the engines give their memory back; see `EnginePool.sleep`."""
        await self.engines.sleep()

    async def wake(self) -> None:
        """Have them go on with what they served; see `EnginePool.wake`."""
        await self.engines.wake()

    def __repr__(self) -> str:
        return "tree pool"

    async def version(self) -> int:
        """Version that the engines serve."""
        return self.engines.version

    async def stats(self) -> list[EngineStats]:
        """Totals of each serving engine."""
        return await self.engines.stats()

    async def stop(self) -> None:
        """End all work and shut the engines down."""
        self._work.cancel()
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
        self._has_ended = False
        self._saved = {tree.ticket: tree for tree in saved}
        self._released = first
        self._num_workers = num_workers
        self._work.spawn(self._admit(gate, session))

    def _drop_work(self) -> None:
        self._work.cancel()
        for held in (self._saved, self.growing, self._finished, self._taken, self._tickets):
            held.clear()
        self._reader = ""  # the one of the stream that ended may still be waiting
        self._failure = None

    async def end_stream(self) -> None:
        """No learner step is due any more: the reader of the stream gets no further trees."""
        self._drop_work()
        self._has_ended = True
        self._changed.notify()

    async def worker_batch_size(self) -> int:
        """Trees that each learner worker consumes in a step."""
        return self.gate.trees_per_step // self._num_workers

    async def _admit(self, gate: GateApi, session: int) -> None:
        size, staleness = self.gate.trees_per_step, self.gate.max_staleness
        while (ticket := await gate.next.remote(session)) is not None:
            due = (ticket.number // size - staleness) * size  # the gate lets no ticket out sooner
            self._taken = {n: tree for n, tree in self._taken.items() if n >= due}
            self._tickets = {n: each for n, each in self._tickets.items() if n >= due}
            self._tickets[ticket.number] = ticket
            self._work.spawn(self._grow_ticket(ticket))

    async def _grow_ticket(self, ticket: Ticket) -> None:
        past = self._saved.pop(ticket.number, None)
        if past is None:
            await self._grow_trained(self._tree(ticket))
            return
        # Even if it is not taken up: the prompt is that of these redraws.
        if past.num_redraws:
            ticket = self._redrawn(ticket, past.num_redraws)
        tree = self._tree(ticket, past.num_redraws, past.redrawn_tokens)
        if tree.take_up(past):
            self.engines.note(
                "tree_reused",
                ticket=ticket.number,
                groups=len(tree.groups),
                is_finished=bool(tree.finished_at_s),
            )
        await self._grow_trained(tree)

    def _tree(self, ticket: Ticket, num_redraws: int = 0, redrawn_tokens: int = 0) -> GrowingTree:
        return GrowingTree(
            ticket=ticket,
            num_redraws=num_redraws,
            redrawn_tokens=redrawn_tokens,
            prompts=self.prompts,
            shape=replace(self.shape, num_children=ticket.num_children),
            sampling=self.sampling,
        )

    async def _grow_trained(self, tree: GrowingTree) -> None:
        record = await self._grow(tree)
        self._finished[record.ticket] = record
        self.engines.note(
            "tree_finished",
            ticket=record.ticket,
            problem=record.prompt_id,
            attempt=record.attempt,
            engine=record.engine,
            min_version=record.tree.min_version,
            max_version=record.tree.max_version,
        )
        self._changed.notify()

    async def _grow(self, tree: GrowingTree) -> TreeRecord:
        self.growing.append(tree)
        try:
            return await tree.finish(self.engines)
        finally:
            self._last_progress = time.monotonic()
            if tree in self.growing:  # unless all work was dropped
                self.growing.remove(tree)

    async def recall(self, first: int) -> list[TreeRecord]:
        """Drop what is in flight, evaluations too; returns what was `unconsumed` till then."""
        trees = await self.unconsumed(first)
        self._drop_work()
        return trees

    async def unconsumed(self, first: int) -> list[TreeRecord]:
        """The trees of tickets from `first` on, finished or partly grown, for a checkpoint."""
        growing = [t.record() for t in self.growing if t.groups and not t.is_evaluated]
        held = [*self._saved.values(), *self._taken.values(), *self._finished.values(), *growing]
        return [tree for tree in held if tree.ticket >= first]

    async def status(self) -> StageStatus:
        """What is in flight, and since when nothing has moved."""
        on_engines = [tree for tree in self.growing if tree.is_on_engine]
        shown = "; ".join(tree.state() for tree in on_engines) or "waiting for tickets"
        finished = f"finished and not taken: {sorted(self._finished)}"
        last = max([self._last_progress, *(tree.last_progress for tree in self.growing)])
        return StageStatus(
            stage="engines",
            doing=f"{shown}; {finished}; {self.engines.states()}",
            is_busy=bool(on_engines),
            age_s=time.monotonic() - last,
        )

    async def take(self, reader: str, max_trees: int, wait_s: float) -> list[TreeRecord] | None:
        """Up to `max_trees` finished trees in batch order; none after `wait_s` without any.

        Trees go to the newest reader only: one of a stream that has ended gets None.
        """
        if self._has_ended:
            return None
        if reader not in self._past_readers:
            self._past_readers.add(reader)
            self._reader = reader
            self._changed.notify()

        def is_answered() -> bool:
            return reader != self._reader or bool(self._ready()) or self._failure is not None

        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._changed.wait_for(is_answered)
        if reader != self._reader:
            return None
        if self._failure is not None and not self._ready():
            raise self._failure
        taken = self._ready()[:max_trees]
        self._released += len(taken)
        trees = {number: self._finished.pop(number) for number in taken}
        self._taken |= trees
        return list(trees.values())

    def _ready(self) -> list[int]:
        """Finished tickets of the batch that is due."""
        size = self.gate.trees_per_step
        end = (self._released // size + 1) * size
        return [number for number in self._finished if number < end]

    async def evaluate(
        self, prompts: PromptSet, shape: TreeShape, sampling: Sampling, seed: int
    ) -> AsyncIterator[TreeRecord]:
        """One tree for each prompt, as they finish; used with depth 1, outside the gate.

        Raises:
            RuntimeError: the pool began other work, or ended.
        """
        trees = [
            GrowingTree(
                ticket=Ticket(
                    number=number,
                    prompt=number,
                    seed=step_seed(seed, (number,)),
                    num_children=shape.num_children,
                ),
                prompts=prompts,
                shape=shape,
                sampling=sampling,
                is_evaluated=True,
            )
            for number in range(len(prompts))
        ]
        grows = [self._work.start(self._grow(tree)) for tree in trees]
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

    def _fail(self, error: BaseException) -> None:
        """End the run, through `take`."""
        log.error("the tree pool failed", exc_info=error)
        self._failure = error if isinstance(error, Exception) else RuntimeError(str(error))
        self._changed.notify()

    # Redraws: a tree that teaches nothing is grown anew with another prompt ----------------------

    async def redraw(self, reader: str, past: TreeRecord) -> None:
        """Grow the ticket of a tree that was taken anew, with another prompt."""
        if reader == self._reader:
            self._released -= 1
            del self._taken[past.ticket]
            ticket = self._tickets[past.ticket]
            count = past.num_redraws + 1
            tokens = past.redrawn_tokens + past.tree.num_sampled_tokens
            tree = self._tree(self._redrawn(ticket, count), count, tokens)
            self._work.spawn(self._grow_trained(tree))

    def _redrawn(self, ticket: Ticket, num_redraws: int) -> Ticket:
        return redrawn(ticket, num_redraws, mixture=self.prompts.sets, seed=self.seed)


def make_pool(
    config: Config, check_node: Callable[[], None], make_actor: MakeActor = make_actor
) -> TreePoolApi:
    """An actor with a run's engines, each of which starts where `check_node` raises nothing."""
    return make_actor(TreePool, name=f"tree pool of {config.run.name}")(
        setup=EngineSetup.of(config),
        log_folder=config.log_folder,
        make_engine=partial(make_engine, check_node=check_node),
    )
