"""The gate: admits tickets so that no tree can be trained staler than allowed.

The whole cursor is one integer: tickets [k B, (k+1) B) are consumed by learner step k and by no
other. Ticket t may be issued once t < B (steps done + 1 + max_staleness), which bounds
issued - consumed by B (1 + max_staleness) and the age of every tree by max_staleness, without
throwing any work away.

A ticket is a pure function of its number and, where trees fork where it pays, of what was measured
in the learner steps that its admission waits for: up to k - 1 - max_staleness for batch k. So a run
that is resumed issues the same tickets.
"""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from treerpo_ray.algo.forks.adaptive_shape import Shape
from treerpo_ray.metrics.stage_status import StageStatus, WatchedStage
from treerpo_ray.prompts.mixture import Mixture, Turns
from treerpo_ray.search.shapes import AdaptiveShapes, ChosenShape
from treerpo_ray.task import GateState, Ticket

log = logging.getLogger(__name__)


class Gate(WatchedStage):
    """Issues tickets in order; see the module text for the rule.

    Args:
        mixture: The data sets that are trained on, one or several, whose prompts take turns as its
            module says.
        trees_per_step: B, trees that one learner step consumes.
        max_staleness: Learner steps by which a tree may be behind; 0 is strictly on-policy.
        num_steps: Learner steps of the whole run; no ticket is issued for later ones.
        seed: Seed of the permutations and of every tree.
        num_children: Shape of the trees; where it adapts, of those that measure.
        adapt_every: Learner steps between two that measure, where it adapts; see `AdaptiveShapes`.
    """

    def __init__(
        self,
        *,
        mixture: Mixture,
        trees_per_step: int,
        max_staleness: int,
        num_steps: int,
        seed: int,
        num_children: Shape,
        adapt_every: int = 0,
    ) -> None:
        self.trees_per_step, self.max_staleness = trees_per_step, max_staleness
        self.num_steps, self.seed = num_steps, seed
        self._turns = Turns(mixture=mixture, seed=seed)
        self.shapes = AdaptiveShapes(
            measuring=num_children, every=adapt_every, trees_per_step=trees_per_step
        )
        self.steps_done = 0
        self.issued = 0
        self.session = 0
        self.is_stopping = False
        self._moved = asyncio.Event()
        self._moved_at = time.monotonic()

    def __repr__(self) -> str:
        return "gate"

    def ticket(self, number: int) -> Ticket:
        """The ticket with that number, of a step that is not done; see the module text."""
        step, place = divmod(number, self.trees_per_step)
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0])
        return Ticket(
            number=number,
            prompt=self._turns.prompt(number),
            seed=seed >> 1,
            num_children=self.shapes.shape(step, place, self._last_measured(step)),
        )

    @property
    def limit(self) -> int:
        """First ticket number that may not be issued yet."""
        window = self.steps_done + 1 + self.max_staleness
        return self.trees_per_step * min(window, self.num_steps)

    async def next(self, session: int) -> Ticket | None:
        """The next ticket, as soon as the window lets it out; None if `session` is over.

        A session begins with each `restart`: whoever still waits from before gets no ticket.
        """
        while session == self.session and self.issued >= self.limit:
            self._moved.clear()
            await self._moved.wait()
        if session != self.session:
            return None
        ticket = self.ticket(self.issued)
        self.issued += 1
        self._moved_at = time.monotonic()
        return ticket

    def consumed(self, step: int, num_children: Shape | None = None) -> GateState:
        """Learner step `step` has consumed its tickets and every engine serves what came of it.

        Args:
            step: The learner step that is due.
            num_children: The shape that is chosen with what it measured; None: it measured none.

        Returns:
            What `restart` at the next step needs to issue the same tickets.

        Raises:
            RuntimeError: steps were skipped or consumed twice.
        """
        if step != self.steps_done:
            raise RuntimeError(f"learner step {step} consumed, but step {self.steps_done} is due")
        if num_children is not None:
            chosen = ChosenShape(step, tuple(num_children))
            self.shapes.add(chosen, self._last_measured(step + 1))
        self.steps_done = step + 1
        self._moved_at = time.monotonic()
        self._moved.set()
        return to_state(self.shapes.chosen)

    def restart(self, step: int, state: GateState | None) -> int:
        """Begin again at learner step `step`: tickets from there on are issued anew.

        Args:
            step: The first learner step that is due.
            state: What `consumed` gave when it became due before; None for the first one.

        Returns:
            The number of the session that begins.
        """
        log.info("gate restarts at step %d (was %d)", step, self.steps_done)
        self.steps_done, self.issued = step, step * self.trees_per_step
        self.shapes = AdaptiveShapes(
            measuring=self.shapes.measuring,
            every=self.shapes.every,
            trees_per_step=self.trees_per_step,
            chosen=from_state(state),
        )
        self.session += 1
        self._moved.set()
        return self.session

    def status(self) -> StageStatus:
        """What the gate waits for, and since when."""
        return StageStatus(
            stage="gate",
            doing=f"issued {self.issued} tickets and lets out {self.limit}; waits for learner "
            f"step {self.steps_done}",
            is_busy=False,
            age_s=time.monotonic() - self._moved_at,
        )

    def done(self) -> int:
        """Learner steps that are done."""
        return self.steps_done

    def close(self) -> None:
        """No further ticket is wanted: whoever waits for one gets none."""
        self.session += 1
        self._moved.set()

    def is_told_to_stop(self) -> bool:
        """Whether the run is to end after the learner step that is under way."""
        return self.is_stopping

    def stop(self) -> None:
        """End the run after the learner step that is under way."""
        self.is_stopping = True

    def _last_measured(self, step: int) -> int:
        """The last learner step that is done whenever tickets of learner step `step` are issued."""
        return step - 1 - self.max_staleness


def redrawn(ticket: Ticket, num_redraws: int, *, mixture: Mixture, seed: int) -> Ticket:
    """A ticket with another prompt, any of the data set, drawn for the n-th time; of several sets
    one is drawn by weight first.

    It stays the same ticket: issued once, consumed once, by the same learner step, for a tree of
    the same shape.
    """
    sequence = np.random.SeedSequence((seed, ticket.number, num_redraws))
    prompt, tree_seed = sequence.generate_state(2, np.uint64).tolist()
    return replace(ticket, prompt=mixture.at(prompt), seed=tree_seed >> 1)


def to_state(shapes: Sequence[ChosenShape]) -> GateState:
    """The shapes that were chosen, as text."""
    return GateState(json.dumps({"shapes": shapes}))


def from_state(state: GateState | None) -> list[ChosenShape]:
    """Those shapes; none of a gate that has not issued a ticket yet, nor in checkpoints from
    before shapes were chosen, which hold a list of prompts instead."""
    found = json.loads(state) if state else []
    if isinstance(found, list):
        return []
    return [ChosenShape(step, tuple(shape)) for step, shape in found["shapes"]]
