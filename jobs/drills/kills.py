"""Kills: what a failure drill kills and when, and whether that was made good."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from treerpo_ray.study.audit import Fields, as_float, as_int


class Victim(StrEnum):
    """What a failure drill kills."""

    ENGINE = "engine"
    """The actor of an engine."""
    CORE = "core"
    """vLLM's core process of an engine."""
    HUNG_CORE = "hung core"
    """The same, but it is stopped and stays: nothing tells Ray of it."""
    LEARNER = "learner"
    """The first of the Ray Train workers, while others may wait for it."""
    VERIFIER = "verifier"
    """A process that grades."""
    NODE = "node"
    """A node of the cluster, with the engine on it."""


def victims(names: str) -> list[Victim]:
    """Several, by their names with commas between; raises ValueError where one is unknown."""
    return [Victim(name) for name in names.split(",")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A process that was killed, at a Unix time in seconds."""

    time: float
    victim: Victim
    pid: int
    engine: int | None = None
    """Engine that it belonged to."""


def draw_schedule(
    num_kills: int, num_steps: int, seed: int, among: Sequence[Victim] = tuple(Victim)
) -> list[tuple[int, Victim]]:
    """Learner steps after which something dies, ascending, all victims `among` these equally often.

    The first and the last step are left alone, so that every kill hits a run that is going on.

    Raises:
        ValueError: there are fewer than three steps.
    """
    if num_steps < 3:
        raise ValueError(f"{num_steps} steps are too few for a drill: at least 3")
    rng = random.Random(seed)
    drawn = [among[number % len(among)] for number in range(num_kills)]
    rng.shuffle(drawn)
    room = num_steps - 2
    steps = [1 + number * room // num_kills for number in range(num_kills)]
    return list(zip(steps, drawn, strict=True))


RECOVERED = {
    Victim.ENGINE: "engine_serving",
    Victim.CORE: "engine_serving",
    Victim.HUNG_CORE: "engine_serving",
    Victim.NODE: "engine_serving",
    Victim.LEARNER: "consumed",
    Victim.VERIFIER: "verifier_started",
}
"""Event that shows that what was killed is made good."""


def recovery_s(kill: Kill, events: Sequence[Fields]) -> float | None:
    """Seconds until what was killed was there again; None if it never was."""
    for event in events:
        is_late = as_float(event["time"]) > kill.time
        is_same = kill.engine is None or event.get("engine") == kill.engine
        if is_late and is_same and event["kind"] == RECOVERED[kill.victim]:
            return as_float(event["time"]) - kill.time
    return None


def serving(events: Sequence[Fields]) -> dict[int, Fields]:
    """Of each engine that serves, the event that says so."""
    found: dict[int, Fields] = {}
    for event in events:
        if event["kind"] == "engine_serving":
            found[as_int(event["engine"])] = event
        elif event["kind"] == "engine_lost":
            found.pop(as_int(event["engine"]), None)
    return found
