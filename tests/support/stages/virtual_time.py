"""An event loop whose time passes at once where nothing else is to be done: hours take no time,
and nothing depends on the pace of the machine."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine


class VirtualLoop(asyncio.SelectorEventLoop):
    """Work for threads is done in the loop, so that no time passes meanwhile."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(Selector(self._advance))

    def _advance(self, seconds: float) -> None:
        self._now += seconds

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: object, func: Callable[..., object], *args: object):
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class Selector(selectors.DefaultSelector):
    """Waits for nothing, but tells for how long it was to wait."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list:
        events = super().select(0 if timeout is not None else None)
        if timeout and not events:
            self._advance(timeout)
        return events


def run(work: Coroutine[None, None, None]) -> None:
    """Run `work`, which may take ten thousand virtual seconds."""

    async def limited() -> None:
        async with asyncio.timeout(10_000):
            await work

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(limited())
