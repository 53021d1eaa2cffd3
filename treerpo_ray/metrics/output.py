"""Output: the console that a command line asks for, for people or as JSON for programs.

--quiet   warnings alone; the result stands on stdout all the same
--json    one JSON object a line on stdout, each with its `kind` and `time`; the result comes
          last, without a kind. What goes wrong stands on stderr, as ever.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from treerpo_ray.metrics.console import Console

if TYPE_CHECKING:
    from treerpo_ray.metrics.events import Event
    from treerpo_ray.metrics.rows import Row

QUIET, JSON = "--quiet", "--json"


def console_for(arguments: Sequence[str]) -> tuple[Console, list[str]]:
    """The console that these arguments ask for, and the other arguments.

    Raises:
        ValueError: they ask for two.
    """
    asked = {QUIET, JSON} & set(arguments)
    if len(asked) > 1:
        raise ValueError(f"{QUIET} and {JSON} exclude each other")
    rest = [argument for argument in arguments if argument not in asked]
    return (JsonConsole() if JSON in asked else Console(is_quiet=QUIET in asked)), rest


class JsonConsole(Console):
    """Prints for programs: an object a line, of the kinds `step`, `event`, `note`, `warning`,
    `plan`, `command`, `stage` and `progress`.

    Args:
        file: Where to; standard output if not given.
        clock: Seconds since any time.
    """

    def __init__(
        self,
        *,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(clock=clock, is_quiet=True)
        self._file = file or sys.stdout

    def print_step(self, row: "Row") -> None:
        """The row as it stands in `metrics.jsonl`."""
        self._put("step", **row)

    def print_event(self, event: "Event") -> None:
        """An event as it stands in `events.jsonl`, ids and all."""
        if event.kind == "learner_started":
            self.end_stage()
        self._put("event", event=event.kind, **event.fields)

    def note(self, text: str) -> None:
        """Prose."""
        self._put("note", text=text)

    def warn(self, text: str) -> None:
        """Prose."""
        self._put("warning", text=text)

    def print_plan(self, lines: Sequence[str]) -> None:
        """The lines of the plan, each an object."""
        for line in lines:
            self._put("plan", text=line)

    def print_command(self, purpose: str, command: str) -> None:
        """A command."""
        self._put("command", purpose=purpose, command=command)

    def begin_stage(self, description: str) -> None:
        """See `Console`."""
        self._put("stage", stage=description, state="begun")
        self._stage = description, self._clock()

    def end_stage(self) -> None:
        """See `Console`."""
        if self._stage is not None:
            description, start = self._stage
            self._put("stage", stage=description, state="done", seconds=self._clock() - start)
        self._stage = None

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A stage, and a line for each quarter of the way."""
        start, done = self._clock(), 0
        self._put("stage", stage=description, state="begun")

        def advance(num_parts: int) -> None:
            nonlocal done
            before, done = done, done + num_parts
            if total and 4 * before // total < 4 * done // total:
                self._put("progress", stage=description, done=done, total=total)

        yield advance
        self._put("stage", stage=description, state="done", seconds=self._clock() - start)

    def _put(self, kind: str, **fields: object) -> None:
        line = {"kind": kind, "time": time.time()} | fields
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        print(json.dumps(known), file=self._file, flush=True)
