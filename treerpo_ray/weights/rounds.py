"""Rounds: who sends weights to a group, and who receives them, find each other here.

    engines ──► open ─┐                      ┌─► Round ──► learner joins and sends
                      ├─ one after the other ┤
    learner ──► next ─┘                      └─► Group ──► engines join and receive

A group is used again as long as the same engines receive; one in which anything failed is not.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from treerpo_ray.weights.files import WeightsLost
from treerpo_ray.weights.source import Group, Receiver

POLL_S = 5.0
"""Time that a sender's question waits for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """A learner that is ready to send."""

    sender: str
    """Which start of which learner it is."""
    address: str
    port: int
    """Where it listens, for a new group."""
    failed: str = ""
    """Name of the group of the round before, if that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A publication to be sent once."""

    group: Group
    stamp: bytes


@dataclass(slots=True, kw_only=True)
class _Asked:
    """Engines that are ready to receive."""

    sender: str
    stamp: bytes
    engines: tuple[Receiver, ...]
    group: asyncio.Future[Group] = field(default_factory=asyncio.Future)


class Rounds:
    """The rounds of a run's learners, one after the other; for one event loop."""

    def __init__(self) -> None:
        self._asked: list[_Asked] = []
        self._came = asyncio.Event()
        self._group: Group | None = None
        self._made_for: tuple[str, tuple[Receiver, ...]] = ("", ())
        """Sender and receivers of the group."""

    async def open(
        self, sender: str, stamp: bytes, engines: Sequence[Receiver], limit_s: float
    ) -> Group:
        """The group in which `engines` receive a publication, once its sender is to send it.

        Raises:
            WeightsLost: the sender does not come within `limit_s`.
        """
        asked = _Asked(sender=sender, stamp=stamp, engines=tuple(engines))
        self._asked.append(asked)
        self._came.set()
        try:
            async with asyncio.timeout(limit_s):
                return await asked.group
        except TimeoutError:
            raise WeightsLost(f"the learner did not send them within {limit_s:.0f} s") from None
        finally:
            if asked in self._asked:
                self._asked.remove(asked)

    async def next(self, poll: Poll) -> Round | None:
        """The next round of a sender; None if none came for a while: it is to ask again."""
        if self._group is not None and poll.failed == self._group.name:
            self._group = None
        try:
            async with asyncio.timeout(POLL_S):
                while not (mine := self._asked_of(poll.sender)):
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            return None
        asked = mine[0]
        self._asked.remove(asked)
        made_for = poll.sender, asked.engines
        if self._group is None or self._made_for != made_for:
            self._group = Group(
                name=uuid.uuid4().hex,
                address=poll.address,
                port=poll.port,
                world_size=1 + sum(engine.num_workers for engine in asked.engines),
            )
            self._made_for = made_for
        asked.group.set_result(self._group)
        return Round(group=self._group, stamp=asked.stamp)

    def _asked_of(self, sender: str) -> list[_Asked]:
        # Whose time is over is done, and leaves a moment later.
        return [each for each in self._asked if each.sender == sender and not each.group.done()]
