"""Flights: the trees that grow on engines at this moment, and when each last moved."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from treerpo_ray.movement import Movement


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

    def movement(self, details: str) -> Movement:
        """What is in flight where, with further `details`, and since when nothing has moved."""
        now = time.monotonic()
        shown = "; ".join(
            f"ticket {flight.ticket} on engine {flight.engine}: {flight.num_groups} step groups, "
            f"the last {now - flight.moved_at:.0f} s ago"
            for flight in self._flights
        )
        moved_at = max([flight.moved_at for flight in self._flights] + [self._moved_at])
        return Movement(
            stage="engines",
            doing=f"{shown or 'waiting for tickets'}; {details}",
            is_busy=bool(self._flights),
            age_s=now - moved_at,
        )
