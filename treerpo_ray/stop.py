"""Stop: what Ctrl-C, SIGTERM and SIGHUP do to a command, from its first line to its last.

- Before anything is started the command ends where it is (`ended_at_once`).
- At work (`Stop.at_work`) it ends by a KeyboardInterrupt in its main thread, so that whatever was
  started is ended.
- Where there is a better end, such as that of a learner step (`Stop.gently`), the first signal asks
  for it, and another one ends the command as before.

Python drops what is raised while it clears an object away, in a `__del__` say: an interrupt that
is dropped so is sent again, until one gets through.

A cluster manager, `timeout` and a terminal may send the same signal twice at once, to a process and
to its group: signals within a second count as one.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""Time within which several signals are one."""
AGAIN_S = 0.05
"""Time after which an interrupt that Python has dropped comes once more."""
STOPPED = 130
"""Exit status of a command that was stopped, by whichever signal."""


def _tell(line: str) -> None:
    """Say something from the handler of a signal, whatever its stream is in the middle of."""
    with suppress(OSError):  # nobody reads it any more
        os.write(2, f"{line}\n".encode())


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have the signals handled so for a while, where this is the main thread, which has them.

    A SIGHUP that is ignored stays so: that is what `nohup` is for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def held_back(*, same_s: float = SAME_S) -> Iterator[None]:
    """Meanwhile a signal waits, and another one raises KeyboardInterrupt; afterwards they are
    handled as before, whatever a library has put in their place below Python. Several within
    `same_s` seconds are one."""
    came: list[tuple[int, float]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if not came:
            _tell("stopping, once what is being started is there ...")
        came.append((number, time.monotonic()))
        if came[-1][1] - came[0][1] >= same_s:
            raise KeyboardInterrupt

    try:
        with _handled(hold):
            yield
    finally:
        if came:
            signal.raise_signal(came[0][0])


@contextmanager
def ended_at_once() -> Iterator[None]:
    """While there is nothing that would have to be ended, a signal ends the process, with a line,
    in the middle of whatever it imports or reads: an exception may be lost there, or be printed
    with the stacks of others."""

    def end(number: int, frame: FrameType | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # it is closed, gone, or in the middle of a line
                stream.flush()
        _tell("stopped")
        os._exit(STOPPED)

    with _handled(end):
        yield


class Stop:
    """What signals ask of a piece of work.

    Args:
        same_s: Time within which several signals are one.
    """

    def __init__(self, *, same_s: float = SAME_S) -> None:
        self._same_s = same_s
        self._ask: Callable[[], object] | None = None
        self._last = -math.inf
        self._terminals = [number for number in (0, 1, 2) if os.isatty(number)]
        self.is_asked = False
        """Whether a signal has come."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Meanwhile a signal raises KeyboardInterrupt in the main thread."""
        before = sys.unraisablehook
        sys.unraisablehook = partial(self._on_dropped, before)
        try:
            with _handled(self._on_signal):
                yield
        finally:
            sys.unraisablehook = before

    @contextmanager
    def gently(self, ask: Callable[[], object]) -> Iterator[None]:
        """Meanwhile the first signal calls `ask`, which is to return at once."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        now = time.monotonic()
        if now - self._last < self._same_s:
            return
        self._last = now
        was_asked, self.is_asked = self.is_asked, True
        if was_asked or self._ask is None:
            _tell("stopping ...")  # what has been started is ended first, which takes its time
            raise KeyboardInterrupt
        self._ask()

    def _on_dropped(
        self,
        others: Callable[["sys.UnraisableHookArgs"], object],
        dropped: "sys.UnraisableHookArgs",
    ) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            others(dropped)
            return
        # From another thread, since what is raised in here is dropped as well.
        threading.Timer(AGAIN_S, self._interrupt_again, [threading.get_ident()]).start()

    def _interrupt_again(self, thread: int) -> None:
        """Interrupt `thread`, so that whatever it waits for ends."""
        # Not sooner: until the hook has returned, one that comes at once with the first would be
        # raised in it, and dropped as well.
        self._last = -math.inf
        signal.pthread_kill(thread, signal.SIGINT)

    def _leave_terminal(self) -> None:
        """Send what would be printed there nowhere: it is closed, and printing would fail."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)
        os.close(nowhere)
        self._terminals = []
