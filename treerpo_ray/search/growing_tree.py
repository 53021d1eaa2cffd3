"""Growing tree: one tree on its way from ticket to record, on as many engines as it takes.

A tree whose engine dies, hangs or turns out to be stale goes on at another one from the sibling
groups that had arrived.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

from treerpo_ray.actor import first_line
from treerpo_ray.algo.search import SiblingGroup, TreeShape, assemble, sibling_groups
from treerpo_ray.engine.pool import EnginePool
from treerpo_ray.engine.replica import Replica
from treerpo_ray.engine.types import Sampling
from treerpo_ray.metrics.health import StageStatus
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.search.gate import Ticket


@dataclass(eq=False, slots=True, kw_only=True)
class Flight:
    """A tree on an engine."""

    ticket: int
    engine: int
    num_groups: int
    """Step groups that are finished."""
    moved_at: float = field(default_factory=time.monotonic)

    def move(self, num_groups: int) -> None:
        """There are that many step groups now."""
        self.num_groups, self.moved_at = num_groups, time.monotonic()


class Flights:
    """All of them."""

    def __init__(self) -> None:
        self._flights: list[Flight] = []
        self._moved_at = time.monotonic()
        """When a tree last left an engine: with its only step group, in an evaluation."""

    @contextmanager
    def begin(self, ticket: int, engine: int, num_groups: int) -> Iterator[Flight]:
        """A tree is in flight for the while."""
        flight = Flight(ticket=ticket, engine=engine, num_groups=num_groups)
        self._flights.append(flight)
        try:
            yield flight
        finally:
            self._flights.remove(flight)
            self._moved_at = time.monotonic()

    def status(self, details: str) -> StageStatus:
        """What is in flight where, with further `details`, and since when nothing has moved."""
        now = time.monotonic()
        shown = "; ".join(
            f"ticket {flight.ticket} on engine {flight.engine}: {flight.num_groups} step groups, "
            f"the last {now - flight.moved_at:.0f} s ago"
            for flight in self._flights
        )
        moved_at = max([flight.moved_at for flight in self._flights] + [self._moved_at])
        return StageStatus(
            stage="engines",
            doing=f"{shown or 'waiting for tickets'}; {details}",
            is_busy=bool(self._flights),
            age_s=now - moved_at,
        )


@dataclass(eq=False, slots=True, kw_only=True)
class GrowingTree:
    """A tree that grows: what its ticket asks for, and the sibling groups that have arrived."""

    ticket: Ticket
    prompts: PromptSet
    shape: TreeShape
    sampling: Sampling
    num_redraws: int = 0
    redrawn_tokens: int = 0
    groups: list[SiblingGroup] = field(default_factory=list)
    attempt: int = 0
    engine: int = -1
    grow_s: float = 0.0
    """Seconds that were spent on `groups` before a resume."""
    started: float = field(default_factory=time.monotonic)
    finished_at_s: float = 0.0

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of the prompt."""
        return self.prompts.token_ids[self.ticket.prompt]

    def take_up(self, past: TreeRecord) -> bool:
        """Go on from a record, finished or not; False, and as before, if it is another tree's."""
        if past.seed != self.ticket.seed or past.tree.prompt_ids.tolist() != self.prompt_ids:
            return False
        self.groups = sibling_groups(past.tree)
        self.attempt, self.engine, self.grow_s = past.attempt, past.engine, past.grow_s
        self.num_redraws, self.redrawn_tokens = past.num_redraws, past.redrawn_tokens
        self.finished_at_s = past.finished_at_s
        return True

    def record(self) -> TreeRecord:
        """The tree as far as it has grown."""
        problem = self.prompts.problems[self.ticket.prompt]
        return TreeRecord(
            ticket=self.ticket.number,
            attempt=self.attempt,
            num_redraws=self.num_redraws,
            redrawn_tokens=self.redrawn_tokens,
            prompt_id=problem.id,
            question=problem.question,
            answers=problem.answers,
            seed=self.ticket.seed,
            engine=self.engine,
            grow_s=self.grow_s + time.monotonic() - self.started,
            finished_at_s=self.finished_at_s,
            tree=assemble(self.prompt_ids, self.groups),
            leaf_texts=(),
            verdicts=(),
        )

    async def finish(self, engines: EnginePool, flights: Flights) -> TreeRecord:
        """Grow what is missing, on one engine after the other; returns the finished tree."""
        while not self.finished_at_s:
            replica = await engines.pick()
            self.engine = replica.index
            try:
                await self._collect(engines, replica, flights)
                self.finished_at_s = time.time()
                engines.finished_tree(replica)
            except (RayError, TimeoutError, StaleEngine) as error:
                self.attempt += 1
                engines.note(
                    "tree_moved",
                    ticket=self.ticket.number,
                    engine=replica.index,
                    groups=len(self.groups),
                    reason=first_line(error),
                )
                engines.replace(replica, error)
            finally:
                engines.release(replica)
        return self.record()

    async def _collect(self, engines: EnginePool, replica: Replica, flights: Flights) -> None:
        """Take the groups that the engine finishes."""
        proved = replica.version
        stream = replica.actor.grow.options(num_returns="streaming").remote(
            self.prompt_ids, self.shape, self.sampling, self.ticket.seed, list(self.groups)
        )

        async def next_group() -> SiblingGroup | None:
            group: Awaitable[SiblingGroup] | None = await anext(stream, None)
            return None if group is None else await group

        name = f"engine {replica.index} to finish a step group"
        timeout = engines.config.engine.request_timeout_s

        async def arrived() -> SiblingGroup | None:
            # Quiet, since there are many trees and `flights` has them. An engine that is busy with
            # others may leave this one waiting for long; it hangs if none of them gets anything.
            return await engines.waits.wait(
                next_group(), name, timeout, is_quiet=True, moved_at=lambda: replica.moved_at
            )

        with flights.begin(self.ticket.number, replica.index, len(self.groups)) as flight:
            try:
                while (group := await arrived()) is not None:
                    replica.moved_at = time.monotonic()
                    # What is served goes back only when the learner does, after its own failure.
                    _check_version(group, min(proved, engines.version), replica)
                    self.groups.append(group)
                    flight.move(len(self.groups))
            except asyncio.CancelledError:
                ray.cancel(stream)
                raise


class StaleEngine(RuntimeError):
    """An engine sampled with older weights than it had proved."""


def _check_version(group: SiblingGroup, proved: int, replica: Replica) -> None:
    oldest = min((int(s.versions.min()) for s in group.steps if len(s.versions)), default=proved)
    if oldest < proved:
        raise StaleEngine(
            f"engine {replica.index} sampled with version {oldest} after it had proved {proved}"
        )
