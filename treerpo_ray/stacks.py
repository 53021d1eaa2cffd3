"""Stacks: what all threads of a process do, written down in time if it stands still; without Ray.

A C thread writes them, whatever holds the interpreter.
"""

import faulthandler
import functools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EARLY = 0.9
"""Share of the limit after which a process writes its stacks, to have done so when it is over."""
STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """Those of the process that a stage is in.

    Args:
        stage: Name of the stage.
        folder: Run folder; the stacks of a local one go to its logs, else to standard error.
        limit_s: Time for which the stage may stand still.
    """

    stage: str
    folder: str
    limit_s: float

    def arm(self) -> None:
        """Have them written shortly before `limit_s`, unless this is called again before."""
        file = _opened(self.folder, f"stacks-{self.stage.replace(' ', '-')}.txt")
        faulthandler.dump_traceback_later(EARLY * self.limit_s, file=file)

    def disarm(self) -> None:
        """Have none written."""
        faulthandler.cancel_dump_traceback_later()


@functools.cache  # it must stay open, and is asked for again and again
def _opened(folder: str, name: str) -> int:
    """Descriptor of a file in the logs, or of standard error."""
    if "://" not in folder:
        with suppress(OSError):  # a full disk: standard error will do
            path = Path(folder) / "logs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    return STDERR
