"""Growing tree: one tree on its way from ticket to record, on as many engines as it takes.

A tree whose engine dies, hangs or turns out to be stale goes on at another one from the sibling
groups that had arrived.
"""

import math
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from ray.exceptions import RayError

from treerpo_ray.actor import first_line
from treerpo_ray.algo.search import SiblingGroup, TreeShape, assemble, sibling_groups
from treerpo_ray.engine.pool import EnginePool
from treerpo_ray.engine.replica import Replica
from treerpo_ray.engine.types import Sampling
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.task import Ticket


@dataclass(eq=False, slots=True, kw_only=True)
class GrowingTree:
    """A tree that grows: what its ticket asks for, and the sibling groups that have arrived."""

    ticket: Ticket
    prompts: PromptSet
    shape: TreeShape
    sampling: Sampling
    is_evaluated: bool = False
    """Whether it is outside the gate, so that its ticket's number is no other's business."""
    groups: list[SiblingGroup] = field(default_factory=list)
    attempt: int = 0
    engine: int = -1
    is_on_engine: bool = False
    last_progress: float = -math.inf
    """Monotonic time in seconds at which it last came to an engine, grew there or left it."""
    grow_s: float = 0.0
    """Seconds that were spent on `groups` before a resume."""
    started: float = field(default_factory=time.monotonic)
    finished_at_s: float = 0.0
    num_redraws: int = 0
    redrawn_tokens: int = 0

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of the prompt."""
        return self.prompts.token_ids[self.ticket.prompt]

    def take_up(self, past: TreeRecord) -> bool:
        """Go on from a record, finished or not; False, and as before, if it is another tree's, or
        of another shape."""
        if past.seed != self.ticket.seed or past.tree.prompt_ids.tolist() != self.prompt_ids:
            return False
        groups = sibling_groups(past.tree)
        if not all(self.shape.has_group(group) for group in groups):
            return False
        self.groups = groups
        self.attempt, self.engine, self.grow_s = past.attempt, past.engine, past.grow_s
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
            row=problem.row,
        )

    async def finish(self, engines: EnginePool) -> TreeRecord:
        """Grow what is missing, on one engine after the other; returns the finished tree."""
        while not self.finished_at_s:
            async with engines.place() as replica:
                try:
                    with self._on_engine(replica):
                        await self._collect(engines, replica)
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
        return self.record()

    @contextmanager
    def _on_engine(self, replica: Replica) -> Iterator[None]:
        self.engine, self.is_on_engine, self.last_progress = replica.index, True, time.monotonic()
        try:
            yield
        finally:
            self.is_on_engine, self.last_progress = False, time.monotonic()

    async def _collect(self, engines: EnginePool, replica: Replica) -> None:
        """Take the groups that the engine finishes."""
        proved = replica.version
        groups = replica.grow(
            self.prompt_ids, self.shape, self.sampling, self.ticket.seed, list(self.groups)
        )
        async with aclosing(groups):
            async for group in groups:
                # What is served goes back only when the learner does, after its own failure.
                _check_version(group, min(proved, engines.version), replica)
                self.groups.append(group)
                self.last_progress = time.monotonic()

    def state(self) -> str:
        """Where it is and how far, for people."""
        return (
            f"ticket {self.ticket.number} on engine {self.engine}: {len(self.groups)} step groups, "
            f"the last {time.monotonic() - self.last_progress:.0f} s ago"
        )


class StaleEngine(RuntimeError):
    """An engine sampled with older weights than it had proved."""


def _check_version(group: SiblingGroup, proved: int, replica: Replica) -> None:
    oldest = min((int(s.versions.min()) for s in group.steps if len(s.versions)), default=proved)
    if oldest < proved:
        raise StaleEngine(
            f"engine {replica.index} sampled with version {oldest} after it had proved {proved}"
        )
