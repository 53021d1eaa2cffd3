"""Movement: what a stage of a run does, and since when it has not moved; Ray is not needed."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
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


def stalled(movements: list[Movement], limit_s: float) -> list[Movement]:
    """The stages that hold up the run, the longest one first; none while something moves.

    A stage that is busy may take `limit_s`. Where none is busy each waits for another one, which is
    a hang of them all once nothing has moved for so long.
    """
    oldest_first = sorted(movements, key=lambda movement: -movement.age_s)
    if any(movement.is_busy for movement in movements):
        return [m for m in oldest_first if m.is_busy and m.age_s > limit_s]
    return oldest_first if all(m.age_s > limit_s for m in oldest_first) else []
