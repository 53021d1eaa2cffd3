"""What is waited for: how long, and what is told of it."""

import asyncio

import pytest

from tests.support.stages.virtual_time import run
from treerpo_ray.engine._waits import Waits

Told = list[tuple[float, str]]


def reporting(told: Told) -> Waits:
    """Waits that may be told of every 30 s."""
    return Waits(
        report=lambda seconds, what: told.append((round(seconds), what)), report_every_s=30.0
    )


def test_one_line_tells_of_the_longest_wait_and_how_many_others_there_are() -> None:
    async def scenario() -> None:
        told: Told = []
        waits = reporting(told)
        names = [f"engine {index} to start" for index in range(100)]
        await asyncio.gather(*(waits.wait(asyncio.sleep(200), name, 600) for name in names))
        what = "engine 0 to start, and for 99 more"
        assert told == [(30, what), (60, what), (120, what)]
        told.clear()
        await waits.wait(asyncio.sleep(40), "the last one", 600)
        assert told == [(30, "the last one")]

    run(scenario())


def test_a_long_wait_is_told_of_ever_more_rarely_and_hides_no_other_one() -> None:
    async def scenario() -> None:
        told: Told = []
        waits = reporting(told)
        long = asyncio.create_task(waits.wait(asyncio.sleep(510), "a node", 600))
        await asyncio.sleep(290)
        assert await waits.wait(asyncio.sleep(150, 7), "engine 3 to load", 600) == 7
        await long
        assert [s for s, what in told if what == "a node"] == [30, 60, 120, 240, 480]
        assert (30, "engine 3 to load, and for 1 more") in told

    run(scenario())


def test_quiet_and_short_waits_are_not_told_of() -> None:
    async def scenario() -> None:
        told: Told = []
        waits = reporting(told)
        assert await waits.wait(asyncio.sleep(500, 7), "a step group", 600, is_quiet=True) == 7
        for number in range(50):
            await waits.wait(asyncio.sleep(5), str(number), 600)
        assert told == []

    run(scenario())


def test_what_takes_too_long_is_cancelled_and_named() -> None:
    async def scenario() -> None:
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError, match="waited 50 s for engine 3 to answer"):
            await reporting([]).wait(never, "engine 3 to answer", 50)
        assert never.cancelled()

    run(scenario())


def test_a_limit_counts_from_the_last_move() -> None:
    async def scenario() -> None:
        clock = asyncio.get_running_loop()
        start = clock.time()
        never = clock.create_future()
        with pytest.raises(TimeoutError):
            await reporting([]).wait(never, "a group", 50, moved_at=lambda: start + 300)
        assert clock.time() - start == pytest.approx(350)

    run(scenario())


def test_an_error_of_what_is_waited_for_is_raised_as_it_is() -> None:
    async def fail() -> None:
        raise KeyError("no such engine")

    async def scenario() -> None:
        with pytest.raises(KeyError, match="no such engine"):
            await reporting([]).wait(fail(), "engine 3", 60)

    run(scenario())
