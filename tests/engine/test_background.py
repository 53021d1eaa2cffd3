"""Work beside everything else: it is kept, told of when it fails, and ended together."""

import asyncio

import pytest

from tests.support.stages.virtual_time import run
from treerpo_ray.engine.background import BackgroundTasks, Signal


def test_what_fails_is_told_once_and_the_rest_goes_on() -> None:
    async def fail() -> None:
        raise KeyError("a mistake")

    async def scenario() -> None:
        told: list[BaseException] = []
        tasks = BackgroundTasks(failed=told.append)
        result = tasks.start(asyncio.sleep(5, 7))
        tasks.spawn(fail())
        assert await result == 7
        assert [str(error) for error in told] == ["'a mistake'"]

    run(scenario())


def test_what_is_awaited_fails_at_its_caller_alone() -> None:
    async def fail() -> None:
        raise KeyError("a mistake")

    async def scenario() -> None:
        told: list[BaseException] = []
        with pytest.raises(KeyError):
            await BackgroundTasks(failed=told.append).start(fail())
        assert told == []

    run(scenario())


def test_all_is_cancelled_together_which_is_no_failure_and_later_work_runs() -> None:
    async def scenario() -> None:
        told: list[BaseException] = []
        tasks = BackgroundTasks(failed=told.append)
        waiting = tasks.start(asyncio.sleep(1000))
        tasks.spawn(asyncio.sleep(1000))
        tasks.cancel()
        assert await tasks.start(asyncio.sleep(1, 7)) == 7
        assert waiting.cancelled() and told == []

    run(scenario())


def test_whoever_waits_looks_again_at_each_signal() -> None:
    async def scenario() -> None:
        signal, there = Signal(), set()
        waiting = [
            asyncio.create_task(signal.wait_for(lambda number=number: number in there))
            for number in range(3)
        ]
        for number in range(3):
            await asyncio.sleep(1)
            assert [task.done() for task in waiting] == [n < number for n in range(3)]
            there.add(number)
            signal.notify()
        await asyncio.gather(*waiting)

    run(scenario())
