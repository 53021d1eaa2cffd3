"""Outbox: writes files in a thread, so that a store that is slow or gone holds nobody up.

A `Saver` does so with checkpoints, which come one at a time and behind what they continue.
"""

import queue
import threading
from collections.abc import Callable

Warn = Callable[[str, str], object]
"""Told what cannot be written, and the reason."""


MAX_WAITING = 8
"""Files that may wait; what comes on top is left out, and told."""


RETRY_S = 5.0
"""Time between attempts at a file."""


CLOSE_S = 60.0
"""Time that the files that wait get at the end."""


class Outbox:
    """Writes what it is handed in this order, and tries each until it succeeds.

    Args:
        warn: Told the name of a file and the reason, the first time that it cannot be written and
            when it is left out.
    """

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._waiting: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(MAX_WAITING)
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, name: str, write: Callable[[], None]) -> None:
        """Hand over a file and what writes it; never blocks."""
        try:
            self._waiting.put_nowait((name, write))
        except queue.Full:
            self._warn(name, f"left out: {MAX_WAITING} files before it still wait")

    def close(self) -> None:
        """Write the rest within a limited time; what fails now is left out."""
        self._is_closing.set()
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            pass
        else:
            self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._warn("the last files", f"left out: not written within {CLOSE_S:g} s")

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._write(*item)

    def _write(self, name: str, write: Callable[[], None]) -> None:
        is_first = True
        while True:
            try:
                return write()
            except Exception as error:  # any store's own
                if is_first:
                    self._warn(name, f"{type(error).__name__}: {error}")
                is_first = False
            if self._is_closing.wait(RETRY_S):
                return
