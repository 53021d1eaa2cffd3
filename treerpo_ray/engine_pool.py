"""Engine pool: grows admitted tickets on the engines and hands out the finished trees.

    gate ──ticket──► least busy engine ──sibling groups──► finished trees ──► tree stream

Trees leave in whole batches: those of batch k (tickets [kB, (k+1)B)) before any of batch k + 1,
and within a batch as they finish. A tree whose engine dies or hangs goes on at another one from
the groups that had arrived.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace

import ray
from ray.exceptions import RayError

from treerpo_ray.actor import Actor
from treerpo_ray.algo.search import SiblingGroup, TreeShape, assemble, step_seed
from treerpo_ray.config import Config
from treerpo_ray.engine import EngineStats, Sampling
from treerpo_ray.engines import Engines, Member, first_line
from treerpo_ray.gate import Ticket
from treerpo_ray.prompts import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.weights import Manifest, Probe

log = logging.getLogger(__name__)


class EnginePool:
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
        self.engines = Engines(config, log_folder)
        self._changed = self.engines.changed
        self._finished: dict[int, TreeRecord] = {}
        self._released = 0
        self._work: set[asyncio.Task[None]] = set()
        self._reader = ""
        self._past_readers: set[str] = set()
        self._failure: Exception | None = None
        self._gate: Actor
        """Of the tickets that are grown; a tree can be redrawn only once there are any."""

    async def begin(
        self, config: Config, prompts: PromptSet, shape: TreeShape, run_log: Actor
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
        """Start every engine, unless that was done; returns once all of them can serve."""
        await self.engines.start()

    async def serve(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, should_probe: bool
    ) -> None:
        """Have the engines serve a version; see `Engines.serve`."""
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

    async def grow_tickets(self, gate: Actor, session: int, first: int) -> None:
        """Drop what is in flight and grow every ticket of a session of the gate, from `first`."""
        self._drop_work()
        self._released = first
        self._gate = gate
        self._spawn(self._admit(gate, session))

    def _drop_work(self) -> None:
        for task in list(self._work):
            task.cancel()
        self._finished.clear()
        self._reader = ""  # the one of the stream that ended may still be waiting
        self._failure = None

    async def _admit(self, gate: Actor, session: int) -> None:
        while (ticket := await gate.next.remote(session)) is not None:
            self._spawn(self._grow_ticket(ticket))

    async def redraw(self, reader: str, past: TreeRecord) -> None:
        """Grow the ticket of a tree that was taken anew, with another prompt."""
        if reader == self._reader:
            self._released -= 1
            self._spawn(self._redraw(past))

    async def _redraw(self, past: TreeRecord) -> None:
        num_redraws = past.num_redraws + 1
        tokens = past.redrawn_tokens + past.tree.num_sampled_tokens
        ticket = await self._gate.redrawn.remote(past.ticket, num_redraws)
        await self._grow_ticket(ticket, num_redraws, tokens)

    async def _grow_ticket(
        self, ticket: Ticket, num_redraws: int = 0, redrawn_tokens: int = 0
    ) -> None:
        problem = self.prompts.problems[ticket.prompt]
        record = await self._grow(
            ticket.number,
            ticket.prompt,
            self.prompts,
            self.shape,
            ticket.seed,
            Sampling(temperature=self.config.tree.temperature),
        )
        record = replace(record, num_redraws=num_redraws, redrawn_tokens=redrawn_tokens)
        self._finished[ticket.number] = record
        self.engines.note(
            "tree_finished",
            ticket=ticket.number,
            problem=problem.id,
            attempt=record.attempt,
            engine=record.engine,
            min_version=record.tree.min_version,
            max_version=record.tree.max_version,
        )
        await self._notify()

    async def _grow(
        self,
        number: int,
        prompt: int,
        prompts: PromptSet,
        shape: TreeShape,
        seed: int,
        sampling: Sampling,
    ) -> TreeRecord:
        """Grow one tree, on as many engines as it takes."""
        start = time.monotonic()
        groups: list[SiblingGroup] = []
        prompt_ids = prompts.token_ids[prompt]
        attempt = 0
        while True:
            member = await self.engines.pick()
            member.num_trees += 1
            try:
                await self._collect(member, groups, prompt_ids, shape, sampling, seed)
                break
            except (RayError, TimeoutError) as error:
                attempt += 1
                self.engines.note(
                    "tree_moved",
                    ticket=number,
                    engine=member.index,
                    groups=len(groups),
                    reason=first_line(error),
                )
                self.engines.replace(member, error)
            finally:
                member.num_trees -= 1
        member.num_starts = 1
        problem = prompts.problems[prompt]
        return TreeRecord(
            ticket=number,
            attempt=attempt,
            prompt_id=problem.id,
            question=problem.question,
            answers=problem.answers,
            seed=seed,
            engine=member.index,
            grow_s=time.monotonic() - start,
            finished_at_s=time.time(),
            tree=assemble(prompt_ids, groups),
            leaf_texts=(),
            verdicts=(),
        )

    async def _collect(
        self,
        member: Member,
        groups: list[SiblingGroup],
        prompt_ids: list[int],
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
    ) -> None:
        """Append the groups that the engine finishes to `groups`."""
        stream = member.actor.grow.options(num_returns="streaming").remote(
            prompt_ids, shape, sampling, seed, list(groups)
        )
        name = f"engine {member.index} to finish a step group"
        try:
            while True:
                arrived = self.engines.wait_for(
                    anext(stream, None), name, self.config.engine.request_timeout_s
                )
                if (group := await arrived) is None:
                    return
                groups.append(await group)
        except asyncio.CancelledError:
            ray.cancel(stream)
            raise

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
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    return []
        if reader != self._reader:
            return None
        taken = self._ready()[:max_trees]
        self._released += len(taken)
        return [self._finished.pop(number) for number in taken]

    def _ready(self) -> list[int]:
        """Finished tickets of the batch that is due."""
        size = self.config.gate.trees_per_step
        end = (self._released // size + 1) * size
        return [number for number in self._finished if number < end]

    async def evaluate(
        self, prompts: PromptSet, shape: TreeShape, sampling: Sampling, seed: int
    ) -> AsyncIterator[TreeRecord]:
        """One tree for each prompt, as they finish; used with depth 1, outside the gate."""
        grows = [
            asyncio.ensure_future(
                self._grow(number, number, prompts, shape, step_seed(seed, (number,)), sampling)
            )
            for number in range(len(prompts))
        ]
        try:
            for finished in asyncio.as_completed(grows):
                yield await finished
        finally:
            for task in grows:
                task.cancel()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside the others; a failure of it ends the run through `take`."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the engine pool failed", exc_info=error)
            self._failure = error if isinstance(error, Exception) else RuntimeError(str(error))
            self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
