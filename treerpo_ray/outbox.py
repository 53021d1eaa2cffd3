"""Outbox: writes files in a thread, so that a store that is slow or gone holds nobody up.

A `Saver` does so with checkpoints, which come one at a time and behind what they continue.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from treerpo_ray.checkpoint import Checkpoints

Warn = Callable[[str, str], object]
"""Told what cannot be written, and the reason."""

MAX_WAITING = 8
"""Files that may wait; what comes on top is left out, and told."""
RETRY_S = 5.0
"""Time between attempts at a file."""
CLOSE_S = 60.0
"""Time that the files that wait get at the end."""
SLOW_S = 60.0
"""Time after which a disk that is still at a checkpoint, while training waits, is told."""
PLACE_S = 60.0
"""Time that the next checkpoint waits for one that is not in its place yet."""
SETTLE_S = 15.0
"""Time that what comes before a checkpoint gets to be in the run folder."""
POLL_S = 0.2
"""Time between looks for it."""


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


class Saver:
    """Saves checkpoints while training goes on: they are placed in a thread.

    One that fails is told, and due again at once; so is one that is left out, for the one before
    it is still on its way.

    Args:
        checkpoints: Where they go.
        every: Learner steps between two.
        step: Learner step that training begins at; it needs none.
        warn: Told what is not as it should be, and the reason.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, step: int, warn: Warn) -> None:
        self._checkpoints, self._every, self._warn = checkpoints, every, warn
        self._saved = step
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._is_late = False

    def is_due(self, step: int) -> bool:
        """Whether it is time for the checkpoint of `step`."""
        return step - self._saved >= self._every

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        is_settled: Callable[[], bool],
        placed: Callable[[], object],
        *,
        is_last: bool,
    ) -> None:
        """Save the checkpoint of `step`; returns once it is written here, if it is not the last.

        Args:
            step: Learner steps done.
            write: Fills its folder.
            is_settled: Whether the run folder holds what comes before the checkpoint; that is
                awaited for a limited time, in the thread.
            placed: Told, in the thread, that the checkpoint is in its place.
            is_last: Whether none comes after it, so that it is waited for.

        Raises:
            Exception: the last one failed; whatever the disk or the store raised.
        """
        name = f"checkpoint of step {step}"
        if not self._is_free(name, None if is_last else PLACE_S):
            return
        before, self._saved, self._error = self._saved, step, None
        is_written = threading.Event()

        def work() -> None:
            try:
                staging = self._checkpoints.stage(write)
                is_written.set()
                self._settle(name, is_settled)
                self._checkpoints.place(step, staging)
                placed()
            except Exception as error:  # any store's own
                self._saved, self._error = before, error
                self._warn(name, f"{type(error).__name__}: {error}")
            finally:
                is_written.set()

        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()
        if not is_written.wait(SLOW_S):
            self._warn(name, f"the disk has not taken it within {SLOW_S:g} s")
            is_written.wait()
        if is_last:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def _is_free(self, name: str, limit_s: float | None) -> bool:
        """Whether the last checkpoint is in its place, or has failed; awaited once for each."""
        if self._thread is not None:
            self._thread.join(0.0 if self._is_late and limit_s is not None else limit_s)
            if self._thread.is_alive():
                if not self._is_late:
                    why = f"{self._thread.name} is not in its place within {limit_s:g} s"
                    self._warn(name, f"left out: {why}")
                self._is_late = True
                return False
        self._is_late = False
        return True

    def _settle(self, name: str, is_settled: Callable[[], bool]) -> None:
        end = time.monotonic() + SETTLE_S
        while not is_settled():
            if time.monotonic() > end:
                why = f"not in the run folder within {SETTLE_S:g} s"
                self._warn(f"what comes before the {name}", why)
                return
            time.sleep(POLL_S)
