"""The gate: admits tickets so that no tree can be trained staler than allowed.

A ticket is a pure function of its number, so the whole cursor is one integer: tickets
[k B, (k+1) B) are consumed by learner step k and by no other. Ticket t may be issued once
t < B (steps done + 1 + max_staleness), which bounds issued - consumed by B (1 + max_staleness)
and the age of every tree by max_staleness, without throwing any work away.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import numpy as np

from treerpo_ray.movement import Movement

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The right and duty to grow one tree."""

    number: int
    prompt: int
    """Row of the prompt in the training set."""
    seed: int
    """Seed of the tree."""


class Gate:
    """Issues tickets in order; see the module text for the rule.

    Args:
        num_prompts: Size of the training set; each epoch is a fresh permutation of it.
        trees_per_step: B, trees that one learner step consumes.
        max_staleness: Learner steps by which a tree may be behind; 0 is strictly on-policy.
        num_steps: Learner steps of the whole run; no ticket is issued for later ones.
        seed: Seed of the permutations and of every tree.
    """

    def __init__(
        self, num_prompts: int, trees_per_step: int, max_staleness: int, num_steps: int, seed: int
    ) -> None:
        self.num_prompts, self.trees_per_step = num_prompts, trees_per_step
        self.max_staleness, self.num_steps, self.seed = max_staleness, num_steps, seed
        self.steps_done = 0
        self.issued = 0
        self.session = 0
        self.is_stopping = False
        self._moved = asyncio.Event()
        self._moved_at = time.monotonic()

    def ticket(self, number: int) -> Ticket:
        """The ticket with that number; always the same for the same seed and data."""
        epoch, place = divmod(number, self.num_prompts)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_prompts)
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0])
        return Ticket(number=number, prompt=int(order[place]), seed=seed >> 1)

    def redrawn(self, number: int, num_redraws: int) -> Ticket:
        """The ticket with another prompt, any of the data set, drawn for the n-th time.

        It stays the same ticket: issued once, consumed once, by the same learner step.
        """
        sequence = np.random.SeedSequence((self.seed, number, num_redraws))
        prompt, seed = sequence.generate_state(2, np.uint64).tolist()
        return Ticket(number=number, prompt=prompt % self.num_prompts, seed=seed >> 1)

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

    def consumed(self, step: int) -> bool:
        """Learner step `step` has consumed its tickets and every engine serves what came of it.

        Returns whether the run is to end after this step.

        Raises:
            RuntimeError: steps were skipped or consumed twice.
        """
        if step != self.steps_done:
            raise RuntimeError(f"learner step {step} consumed, but step {self.steps_done} is due")
        self.steps_done = step + 1
        self._moved_at = time.monotonic()
        self._moved.set()
        return self.is_stopping or self.steps_done == self.num_steps

    def restart(self, step: int) -> int:
        """Begin again at learner step `step`: tickets from there on are issued anew.

        Returns the number of the session that begins.
        """
        log.info("gate restarts at step %d (was %d)", step, self.steps_done)
        self.steps_done, self.issued = step, step * self.trees_per_step
        self.session += 1
        self._moved.set()
        return self.session

    def movement(self) -> Movement:
        """What the gate waits for, and since when."""
        return Movement(
            stage="gate",
            doing=f"issued {self.issued} tickets and lets out {self.limit}; waits for learner "
            f"step {self.steps_done}",
            is_busy=False,
            age_s=time.monotonic() - self._moved_at,
        )

    def done(self) -> int:
        """Learner steps that are done."""
        return self.steps_done

    def stop(self) -> None:
        """End the run after the learner step that is under way."""
        self.is_stopping = True
