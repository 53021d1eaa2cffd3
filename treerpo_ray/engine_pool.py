"""Engine pool: keeps engines alive and current, and grows admitted tickets on them.

    gate ──ticket──► least busy engine ──sibling groups──► finished trees ──► tree stream

Trees leave in whole batches: those of batch k (tickets [kB, (k+1)B)) before any of batch k + 1,
and within a batch as they finish. An engine that dies, hangs or cannot prove a version is
replaced; its trees go on elsewhere from the groups that had arrived.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass
from typing import TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from treerpo_ray.actor import Actor
from treerpo_ray.algo.search import SiblingGroup, TreeShape, assemble, step_seed
from treerpo_ray.config import Config
from treerpo_ray.engine import Engine, EngineStats
from treerpo_ray.gate import Ticket
from treerpo_ray.metrics import Event
from treerpo_ray.prompts import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.weights import LoadProof, Manifest, Probe

log = logging.getLogger(__name__)
T = TypeVar("T")

REPORT_EVERY_S = 30.0
"""Time between log lines about something that is being waited for."""
MAX_STARTS = 5
"""Starts of one engine, without a tree in between, after which the pool gives up."""


@dataclass(eq=False, slots=True)
class Member:
    """An engine of the pool."""

    index: int
    actor: Actor
    is_serving: bool = False
    num_trees: int = 0
    num_starts: int = 1

    def kill(self) -> None:
        """End its process at once."""
        ray.kill(cast(ActorHandle, self.actor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A version of the weights that the engines serve."""

    manifest: Manifest
    chunks: list[ray.ObjectRef]
    probe: Probe


class EnginePool:
    """Owns the engine actors; itself an actor with asynchronous methods.

    Args:
        config: The run's configuration.
        prompts: The training set.
        shape: Shape of the training trees, with the delimiter's token id.
        run_log: Actor of `RunLog`, told of every ticket and failure.
        log_folder: Where the engines' output goes; None leaves it to Ray.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptSet,
        shape: TreeShape,
        run_log: Actor,
        log_folder: str | None,
    ) -> None:
        self.config, self.prompts, self.shape = config, prompts, shape
        self.run_log, self.log_folder = run_log, log_folder
        self._members: list[Member] = []
        self._served: Served | None = None
        self._changed = asyncio.Condition()
        self._finished: dict[int, TreeRecord] = {}
        self._released = 0
        self._engine_work: set[asyncio.Task] = set()
        self._tree_work: set[asyncio.Task] = set()
        self._reader = ""
        self._past_readers: set[str] = set()
        self._failure: Exception | None = None

    # Engines ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every engine; returns once all of them can serve."""
        count = self.config.engine.num_engines
        self._members = [Member(index, self._make_actor(index)) for index in range(count)]
        await asyncio.gather(*(self._bring_up(member) for member in self._members))

    def _make_actor(self, index: int) -> Actor:
        resources = dict(self.config.engine.resources)
        actor = ray.remote(Engine).options(
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,  # what the two above left
            max_concurrency=10_000,
        )
        return cast(Actor, actor.remote(self.config, index, self.log_folder))

    async def _bring_up(self, member: Member) -> None:
        """Start an engine, give it the latest weights, and let it serve once it has proved them."""
        await self._wait_for(
            member.actor.start.remote(),
            f"engine {member.index} to start",
            self.config.engine.start_timeout_s,
        )
        served = None
        while served is not self._served:  # a newer version may come while one is loaded
            served = self._served
            assert served is not None  # versions only ever replace each other
            await self._load(member, served, should_probe=True)
        member.is_serving = True
        await self._note("engine_serving", engine=member.index, starts=member.num_starts)
        await self._notify()

    async def _load(self, member: Member, served: Served, *, should_probe: bool) -> LoadProof:
        timeout = self.config.engine.start_timeout_s
        name = f"engine {member.index} to load version {served.manifest.version}"
        load = member.actor.load.remote(served.manifest, served.chunks)
        proof: LoadProof = await self._wait_for(load, name, timeout)
        proof.check(served.manifest)
        if should_probe:
            probe = member.actor.probe.remote(served.probe.token_ids)
            found: list[float] = await self._wait_for(
                probe, f"engine {member.index} to be probed", timeout
            )
            pairs = zip(found, served.probe.logprobs, strict=True)
            worst = max(abs(ours - theirs) for ours, theirs in pairs)
            if worst > self.config.sync.probe_tolerance:
                raise RuntimeError(
                    f"engine {member.index} is {worst:.2g} nats a token off the learner at version "
                    f"{served.manifest.version} (sync.probe_tolerance="
                    f"{self.config.sync.probe_tolerance})"
                )
        return proof

    async def serve(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, should_probe: bool
    ) -> float:
        """Have every serving engine take over a version and prove it; returns the slowest load (s).

        Digests and version are proved each time, log-probabilities if `should_probe`, and by an
        engine that comes up later in any case.

        Raises:
            RuntimeError: no engine could take it over.
        """
        served = self._served = Served(manifest=manifest, chunks=chunks, probe=probe)
        members = [member for member in self._members if member.is_serving]
        loads = (self._load(member, served, should_probe=should_probe) for member in members)
        results = await asyncio.gather(*loads, return_exceptions=True)
        for member, result in zip(members, results, strict=True):
            if isinstance(result, BaseException):
                await self._replace(member, result)
        proofs = [result for result in results if isinstance(result, LoadProof)]
        if not proofs:
            raise RuntimeError(f"no engine took version {manifest.version}: {results}")
        return max(proof.load_s for proof in proofs)

    async def _replace(self, member: Member, error: BaseException) -> None:
        """Take an engine out and start another in its place."""
        if member not in self._members:
            return
        member.is_serving = False
        await self._note("engine_lost", engine=member.index, reason=_first_line(error))
        member.kill()
        place = self._members.index(member)
        if member.num_starts >= MAX_STARTS:
            raise RuntimeError(f"engine {member.index} failed {MAX_STARTS} times in a row: {error}")
        fresh = Member(
            member.index, self._make_actor(member.index), num_starts=member.num_starts + 1
        )
        self._members[place] = fresh
        self._spawn(self._bring_up_again(fresh), self._engine_work)

    async def _bring_up_again(self, member: Member) -> None:
        try:
            await self._bring_up(member)
        except (RayError, RuntimeError, TimeoutError) as error:
            await self._replace(member, error)

    async def version(self) -> int:
        """Version that the engines serve."""
        return 0 if self._served is None else self._served.manifest.version

    async def stats(self) -> list[EngineStats]:
        """Totals of each serving engine."""
        members = [member for member in self._members if member.is_serving]
        return list(await asyncio.gather(*(member.actor.stats.remote() for member in members)))

    async def stop(self) -> None:
        """End all work and shut the engines down."""
        for task in [*self._engine_work, *self._tree_work]:
            task.cancel()
        stops = (member.actor.stop.remote() for member in self._members)
        await asyncio.wait_for(asyncio.gather(*stops, return_exceptions=True), 30)
        for member in self._members:
            member.kill()

    # Trees -----------------------------------------------------------------------------------

    async def grow_tickets(self, gate: Actor, first: int) -> None:
        """Drop what is in flight and grow every ticket that the gate issues, from `first` on."""
        for task in list(self._tree_work):
            task.cancel()
        self._finished.clear()
        self._released = first
        self._spawn(self._admit(gate), self._tree_work)

    async def _admit(self, gate: Actor) -> None:
        while (ticket := await gate.next.remote()) is not None:
            self._spawn(self._grow_ticket(ticket), self._tree_work)

    async def _grow_ticket(self, ticket: Ticket) -> None:
        problem = self.prompts.problems[ticket.prompt]
        record = await self._grow(
            ticket.number,
            ticket.prompt,
            self.prompts,
            self.shape,
            ticket.seed,
            self.config.tree.temperature,
        )
        self._finished[ticket.number] = record
        await self._note(
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
        temperature: float,
    ) -> TreeRecord:
        """Grow one tree, on as many engines as it takes."""
        start = time.monotonic()
        groups: list[SiblingGroup] = []
        prompt_ids = prompts.token_ids[prompt]
        attempt = 0
        while True:
            member = await self._pick()
            member.num_trees += 1
            try:
                await self._collect(member, groups, prompt_ids, shape, temperature, seed)
                break
            except (RayError, TimeoutError) as error:
                attempt += 1
                await self._note(
                    "tree_moved",
                    ticket=number,
                    engine=member.index,
                    groups=len(groups),
                    reason=_first_line(error),
                )
                await self._replace(member, error)
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
        temperature: float,
        seed: int,
    ) -> None:
        """Append the groups that the engine finishes to `groups`."""
        stream = member.actor.grow.options(num_returns="streaming").remote(
            prompt_ids, shape, temperature, seed, list(groups)
        )
        name = f"engine {member.index} to finish a step group"
        try:
            while True:
                arrived = self._wait_for(
                    anext(stream, None), name, self.config.engine.request_timeout_s
                )
                if (group := await arrived) is None:
                    return
                groups += await group
        except asyncio.CancelledError:
            ray.cancel(stream)
            raise

    async def _pick(self) -> Member:
        """The serving engine with the fewest trees; waits for one if there is none."""
        start = time.monotonic()
        while not (serving := [m for m in self._members if m.is_serving]):
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), REPORT_EVERY_S)
                except TimeoutError:
                    waited = round(time.monotonic() - start)
                    await self._note("waiting", seconds=waited, what="an engine that serves")
        return min(serving, key=lambda member: member.num_trees)

    async def take(self, reader: str, max_trees: int, wait_s: float) -> list[TreeRecord] | None:
        """Up to `max_trees` finished trees in batch order; none after `wait_s` without any.

        Trees go to the newest reader only: one of a stream that has ended gets None.
        """
        if reader != self._reader:
            if reader in self._past_readers:
                return None
            self._past_readers.add(reader)
            self._reader = reader
        deadline = time.monotonic() + wait_s
        while not (ready := self._ready()):
            if self._failure is not None:
                raise self._failure
            if reader != self._reader:
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    return []
        taken = ready[:max_trees]
        self._released += len(taken)
        return [self._finished.pop(number) for number in taken]

    def _ready(self) -> list[int]:
        """Finished tickets of the batch that is due."""
        size = self.config.gate.trees_per_step
        end = (self._released // size + 1) * size
        return [number for number in self._finished if number < end]

    async def evaluate(
        self, prompts: PromptSet, shape: TreeShape, temperature: float, seed: int
    ) -> AsyncIterator[TreeRecord]:
        """One tree for each prompt, as they finish; used with depth 1, outside the gate."""
        grows = [
            asyncio.ensure_future(
                self._grow(number, number, prompts, shape, step_seed(seed, (number,)), temperature)
            )
            for number in range(len(prompts))
        ]
        try:
            for finished in asyncio.as_completed(grows):
                yield await finished
        finally:
            for task in grows:
                task.cancel()

    # Common ----------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None], beside: set[asyncio.Task]) -> None:
        """Run `work` beside the others; a failure of it ends the run through `take`."""
        task = asyncio.create_task(work)
        beside.add(task)
        task.add_done_callback(beside.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the engine pool failed", exc_info=error)
            self._failure = error if isinstance(error, Exception) else RuntimeError(str(error))
            self._spawn(self._notify(), self._engine_work)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait_for(self, result: Awaitable[T], name: str, timeout_s: float) -> T:
        """Await `result`, logging what is waited for; TimeoutError after `timeout_s`."""
        start = time.monotonic()
        task = asyncio.ensure_future(_awaited(result))
        while True:
            done, _ = await asyncio.wait([task], timeout=min(REPORT_EVERY_S, timeout_s))
            if done:
                return task.result()
            waited = time.monotonic() - start
            await self._note("waiting", seconds=round(waited), what=name)
            if waited >= timeout_s:
                task.cancel()
                raise TimeoutError(f"waited {waited:.0f} s for {name}")

    async def _note(self, kind: str, **fields: str | int) -> None:
        self.run_log.event.remote(Event(kind=kind, fields=fields))


async def _awaited(result: Awaitable[T]) -> T:
    return await result


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
