"""Kills: their schedule, and when one is made good."""

from collections import Counter

import pytest

from jobs.drills.kills import Kill, Victim, draw_schedule, recovery_s, serving, victims


def event(time, kind, **fields):
    return {"time": float(time), "kind": kind, **fields}


def test_a_schedule_is_fair_ascending_inside_the_run_and_always_the_same() -> None:
    schedule = draw_schedule(24, 32, seed=0)
    steps, drawn = zip(*schedule, strict=True)
    assert Counter(drawn) == dict.fromkeys(Victim, 4)
    assert list(steps) == sorted(steps) and steps[0] == 1 and steps[-1] < 31
    assert schedule == draw_schedule(24, 32, seed=0) != draw_schedule(24, 32, seed=1)
    two = draw_schedule(4, 32, seed=0, among=victims("node,hung core"))
    assert Counter(victim for _, victim in two) == {Victim.NODE: 2, Victim.HUNG_CORE: 2}
    with pytest.raises(ValueError, match="too few"):
        draw_schedule(1, 2, seed=0)
    with pytest.raises(ValueError, match="disk"):
        victims("node,disk")


def test_the_time_to_recovery_is_that_of_the_same_engine_after_the_kill() -> None:
    events = [
        event(1, "engine_serving", engine=0, pid=7),
        event(2, "engine_serving", engine=1, pid=8),
        event(4, "engine_lost", engine=0),
        event(9, "engine_serving", engine=1, pid=9),
        event(11, "engine_serving", engine=0, pid=10),
    ]
    kill = Kill(time=3.0, victim=Victim.CORE, pid=7, engine=0)
    assert recovery_s(kill, events) == 8.0
    assert recovery_s(kill, events[:-1]) is None
    learner = Kill(time=3.0, victim=Victim.LEARNER, pid=1)
    assert recovery_s(learner, [event(2, "consumed", step=0), event(5, "consumed", step=1)]) == 2.0


def test_an_engine_that_was_lost_does_not_serve_until_it_says_so_again() -> None:
    events = [
        event(1, "engine_serving", engine=0, pid=7),
        event(2, "engine_serving", engine=1, pid=8),
        event(3, "engine_lost", engine=0),
    ]
    assert {engine: found["pid"] for engine, found in serving(events).items()} == {1: 8}
    events.append(event(4, "engine_serving", engine=0, pid=9))
    assert serving(events)[0]["pid"] == 9
