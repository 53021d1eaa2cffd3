"""Stage status: what a stage says of itself, and stacks that its process writes if it hangs.

A C thread writes the stacks, whatever holds the interpreter.
"""

import faulthandler
import functools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from treerpo_ray.actor import actor_method

EARLY = 0.9
"""Share of the limit after which a process writes its stacks, to have done so when it is over."""
STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StackDump:
    """The stacks of the process that a stage runs in, written if the stage hangs.

    Args:
        stage: Name of the stage.
        folder: Run folder; the stacks of a local one go to its logs, else to standard error.
        limit_s: Time for which the stage may stand still.
    """

    stage: str
    folder: str
    limit_s: float

    def arm(self) -> None:
        """Have them written shortly before `limit_s`, unless this is called again before."""
        file = _opened(self.folder, f"stacks-{self.stage.replace(' ', '-')}.txt")
        faulthandler.dump_traceback_later(EARLY * self.limit_s, file=file)

    def disarm(self) -> None:
        """Have none written."""
        faulthandler.cancel_dump_traceback_later()


@functools.cache  # it must stay open, and is asked for again and again
def _opened(folder: str, name: str) -> int:
    """Descriptor of a file in the logs, or of standard error."""
    if "://" not in folder:
        with suppress(OSError):  # a full disk: standard error will do
            path = Path(folder) / "logs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    return STDERR


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """What a stage does since it last moved."""

    stage: str
    doing: str
    is_busy: bool
    """Whether it is at work itself; otherwise it waits for other stages."""
    age_s: float = 0.0
    """Seconds since it last moved."""
    where: str = ""
    """Host and process."""

    def __str__(self) -> str:
        state = "busy" if self.is_busy else "idle"
        return f"{self.stage} ({state} for {self.age_s:.0f} s{self.where}): {self.doing}"


class StageApi(Protocol):
    """Actor of any stage that can be asked what it does."""

    @actor_method
    def arm(self, stacks: StackDump) -> None:
        """Have its process write its stacks, unless this is asked again before."""

    @actor_method
    def status(self) -> StageStatus:
        """What it does, and since when."""


class WatchedStage:
    """A stage whose process writes its stacks where it hangs."""

    def arm(self, stacks: StackDump) -> None:
        """See `StackDump`."""
        stacks.arm()


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleTimes:
    """For how long each stage has waited for others, by one clock."""

    at_s: float
    """When, by a clock that began at any time."""
    idle_s: dict[str, float]
    """Seconds by the stage's name."""

    def shares_since(self, before: "IdleTimes") -> dict[str, float]:
        """Share of the time since `before` that each kind of stage was idle: the mean of its
        members, such as `learner` of `learner 0` and `learner 1`, that were there at both."""
        passed = self.at_s - before.at_s
        kinds: dict[str, list[float]] = {}
        for stage, idle_s in self.idle_s.items():
            if passed > 0 and stage in before.idle_s:
                share = (idle_s - before.idle_s[stage]) / passed
                kinds.setdefault(stage.partition(" ")[0], []).append(share)
        return {kind: sum(shares) / len(shares) for kind, shares in kinds.items()}


def stalled(statuses: list[StageStatus], limit_s: float) -> list[StageStatus]:
    """The stages that hold up the run, the longest one first; none while something moves.

    A stage that is busy may take `limit_s`. Where none is busy each waits for another one, which is
    a hang of them all once nothing has moved for so long.
    """
    oldest_first = sorted(statuses, key=lambda status: -status.age_s)
    if any(status.is_busy for status in statuses):
        return [one for one in oldest_first if one.is_busy and one.age_s > limit_s]
    return oldest_first if all(one.age_s > limit_s for one in oldest_first) else []
