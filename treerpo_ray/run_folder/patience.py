"""Patience: what a run does while its disk or its store takes nothing: say so, wait and try again.

Whoever writes waits with its work in hand, so that nothing is trained twice for want of room. A
disk that is full and a quota that is used up are waited for without end: only people can mend
that. One that is broken, read-only or gone and a store that refuses may come back by themselves,
and are waited for as long as `PatienceTimes.away` says. After that, or once the run is told to
stop, the wait ends with `DiskRefused`.
"""

import errno
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from treerpo_ray.run_folder.disk import Refusal, explain, free_bytes, refusal_of
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import Warn

T = TypeVar("T")


class DiskRefused(RuntimeError):
    """Something of a run was not written, and is waited for no more; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatienceTimes:
    """Seconds of a wait for a disk or a store."""

    retry: float = 5.0
    """Between attempts."""
    tell: float = 300.0
    """Between two lines about the same wait."""
    away: float = 3600.0
    """For what is broken, gone or refuses."""
    look: float = 0.5
    """Between looks for a stop."""


class Patience:
    """Does what writes, again and again until it is written.

    Args:
        folder: The run folder.
        waits: Told what waits, and for what: once when it begins to, and now and then after that.
        written: Told what was waited for, and how many seconds, once it is written.
        is_told_to_stop: Whether the run is, which ends a wait.
        moves: Told in words what is waited for, at each attempt.
        times: How long each part lasts.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        waits: Warn,
        written: Callable[[str, float], object],
        is_told_to_stop: Callable[[], bool],
        moves: Callable[[str], object],
        times: PatienceTimes | None = None,
    ) -> None:
        self._is_local = folder.is_local
        # What goes to a store is made on this machine before.
        self.place = Path(folder.root if folder.is_local else tempfile.gettempdir())
        self._waits, self._written, self._moves = waits, written, moves
        self._is_told_to_stop = is_told_to_stop
        self._times = times or PatienceTimes()

    def until_written(self, what: str, write: Callable[[], T], num_bytes: int = 0) -> T:
        """Do `write` until it succeeds; returns what it did.

        Args:
            what: What it writes, for people.
            write: May be called many times.
            num_bytes: The room that it needs, about: it is not begun before there is so much, so
                that what is left is there for lines and logs.

        Raises:
            DiskRefused: it is not waited for any more.
            Exception: what `write` raised for another reason than its disk or store.
        """
        start, told_at = time.monotonic(), -float("inf")
        since = time.strftime("%H:%M:%S")
        while True:
            try:
                self._check_room(num_bytes)
                done = write()
            except Exception as error:
                refusal = refusal_of(error, is_local=self._is_local)
                if refusal is None:
                    raise
                fault = explain(error, self.place, num_bytes)
            else:
                if told_at > 0:
                    self._written(what, round(time.monotonic() - start))
                return done
            now = time.monotonic()
            if now - told_at >= self._times.tell:
                told_at = now
                self._waits(what, f"{fault}; {self._advice(refusal, since)}")
            self._moves(f"waiting since {since} to write the {what}: {fault}")
            if self._is_stopped_within(self._times.retry):
                raise DiskRefused(f"the {what} is not written, since the run was stopped: {fault}")
            if refusal is Refusal.AWAY and time.monotonic() - start >= self._times.away:
                raise DiskRefused(
                    f"the {what} is not written, after {self._times.away:.0f} s of attempts: "
                    f"{fault}"
                )

    def _check_room(self, num_bytes: int) -> None:
        if num_bytes and free_bytes(self.place) < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.place))

    def _advice(self, refusal: Refusal, since: str) -> str:
        if refusal is Refusal.FULL:
            return f"waiting since {since} until there is room; nothing is lost, free some"
        minutes = self._times.away / 60
        return f"tried again since {since}, for {minutes:.0f} minutes; nothing is lost"

    def _is_stopped_within(self, seconds: float) -> bool:
        """Wait so long; returns at once, and true, when the run is told to stop."""
        end = time.monotonic() + seconds
        while not (is_stopped := self._is_told_to_stop()):
            left_s = end - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(self._times.look, left_s))
        return is_stopped
