"""What is waited for: how long, and what is told of it."""

import asyncio
import time

import pytest

from treerpo_ray.engine import waits
from treerpo_ray.engine.waits import Waits


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """Reports, which may come every 0.2 s."""
    monkeypatch.setattr(waits, "REPORT_EVERY_S", 0.2)
    return []


def test_one_line_tells_of_the_longest_wait_and_how_many_others_there_are(told) -> None:
    async def run() -> None:
        all_waits = Waits(lambda seconds, what: told.append((seconds, what)))
        start = time.monotonic()
        names = [f"engine {index} to start" for index in range(100)]
        await asyncio.gather(*(all_waits.wait(asyncio.sleep(1.1), name, 60) for name in names))
        assert 0 < len(told) <= (time.monotonic() - start) / 0.2
        assert told[0][1] == "engine 0 to start, and for 99 more"
        # One that began later, on a busy machine, may be the longest of those due at its turn.
        assert all(what.endswith(" to start, and for 99 more") for _, what in told)
        told.clear()
        await all_waits.wait(asyncio.sleep(0.3), "the last one", 60)
        assert [what for _, what in told] == ["the last one"]

    asyncio.run(run())


def test_a_long_wait_is_told_of_ever_more_rarely_and_hides_no_other_one(told) -> None:
    async def run() -> None:
        all_waits = Waits(lambda seconds, what: told.append((seconds, what)))
        long = asyncio.create_task(all_waits.wait(asyncio.sleep(3.4), "a node", 60))
        await asyncio.sleep(1.9)
        assert await all_waits.wait(asyncio.sleep(1.0, 7), "engine 3 to load", 60) == 7
        await long

    asyncio.run(run())
    assert len([what for _, what in told if what == "a node"]) <= 5  # 0.2, 0.4, 0.8, 1.6, 3.2 s
    assert "engine 3 to load, and for 1 more" in [what for _, what in told]


def test_quiet_and_short_waits_are_not_told_of(told) -> None:
    async def run() -> None:
        all_waits = Waits(lambda seconds, what: told.append((seconds, what)))
        quiet = all_waits.wait(asyncio.sleep(0.5, 7), "a step group", 60, is_quiet=True)
        assert await quiet == 7
        for number in range(5):
            await all_waits.wait(asyncio.sleep(0.05), str(number), 60)

    asyncio.run(run())
    assert told == []


def test_what_takes_too_long_is_cancelled_and_named() -> None:
    async def run() -> None:
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError, match="waited 0 s for engine 3 to answer"):
            await Waits(print).wait(never, "engine 3 to answer", 0.05)
        assert never.cancelled()

    asyncio.run(run())


def test_an_error_of_what_is_waited_for_is_raised_as_it_is() -> None:
    async def fail() -> None:
        raise KeyError("no such engine")

    with pytest.raises(KeyError, match="no such engine"):
        asyncio.run(Waits(print).wait(fail(), "engine 3", 60))
