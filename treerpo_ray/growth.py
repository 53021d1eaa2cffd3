"""Growth: one tree on its way from ticket to record, on as many engines as it takes.

A tree whose engine dies, hangs or turns out to be stale goes on at another one from the sibling
groups that had arrived.
"""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

from treerpo_ray.actor import first_line
from treerpo_ray.algo.search import SiblingGroup, TreeShape, assemble, sibling_groups
from treerpo_ray.engine_places import Member
from treerpo_ray.engines import Engines
from treerpo_ray.flights import Flights
from treerpo_ray.gate import Ticket
from treerpo_ray.prompts import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.sampling import Sampling


@dataclass(eq=False, slots=True, kw_only=True)
class Growth:
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

    async def finish(self, engines: Engines, flights: Flights) -> TreeRecord:
        """Grow what is missing, on one engine after the other; returns the finished tree."""
        while not self.finished_at_s:
            member = await engines.pick()
            self.engine = member.index
            try:
                await self._collect(engines, member, flights)
                self.finished_at_s = time.time()
                engines.finished_tree(member)
            except (RayError, TimeoutError, StaleEngine) as error:
                self.attempt += 1
                engines.note(
                    "tree_moved",
                    ticket=self.ticket.number,
                    engine=member.index,
                    groups=len(self.groups),
                    reason=first_line(error),
                )
                engines.replace(member, error)
            finally:
                engines.release(member)
        return self.record()

    async def _collect(self, engines: Engines, member: Member, flights: Flights) -> None:
        """Take the groups that the engine finishes."""
        proved = member.version
        stream = member.actor.grow.options(num_returns="streaming").remote(
            self.prompt_ids, self.shape, self.sampling, self.ticket.seed, list(self.groups)
        )

        async def next_group() -> SiblingGroup | None:
            group: Awaitable[SiblingGroup] | None = await anext(stream, None)
            return None if group is None else await group

        name = f"engine {member.index} to finish a step group"
        timeout = engines.config.engine.request_timeout_s

        async def arrived() -> SiblingGroup | None:
            # Quiet, since there are many trees and `flights` has them. An engine that is busy with
            # others may leave this one waiting for long; it hangs if none of them gets anything.
            return await engines.waits.wait(
                next_group(), name, timeout, is_quiet=True, moved_at=lambda: member.moved_at
            )

        with flights.begin(self.ticket.number, member.index, len(self.groups)) as flight:
            try:
                while (group := await arrived()) is not None:
                    member.moved_at = time.monotonic()
                    # What is served goes back only when the learner does, after its own failure.
                    _check_version(group, min(proved, engines.version), member)
                    self.groups.append(group)
                    flight.move(len(self.groups))
            except asyncio.CancelledError:
                ray.cancel(stream)
                raise


class StaleEngine(RuntimeError):
    """An engine sampled with older weights than it had proved."""


def _check_version(group: SiblingGroup, proved: int, member: Member) -> None:
    oldest = min((int(s.versions.min()) for s in group.steps if len(s.versions)), default=proved)
    if oldest < proved:
        raise StaleEngine(
            f"engine {member.index} sampled with version {oldest} after it had proved {proved}"
        )
