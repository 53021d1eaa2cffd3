"""Busy time: closed forms with a clock that the test sets."""

from contextlib import ExitStack

from treerpo_ray.metrics.busy_time import BusyTime


def test_work_that_overlaps_counts_once_and_what_goes_on_counts_until_now() -> None:
    now = 5.0
    time = BusyTime(clock=lambda: now)
    now = 7.0
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(time.work())
        now = 8.0
        second.enter_context(time.work())
        now = 11.0
        first.close()
        now = 12.0
        assert time.busy_s == 12.0 - 7.0
        second.close()
    now = 20.0
    assert (time.busy_s, time.total_s) == (5.0, 15.0)


def test_work_that_fails_ends() -> None:
    now = 0.0
    time = BusyTime(clock=lambda: now)
    try:
        with time.work():
            now = 2.0
            raise ZeroDivisionError
    except ZeroDivisionError:
        now = 9.0
    assert time.busy_s == 2.0
