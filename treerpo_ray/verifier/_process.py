"""Worker process: one process that grades, as the verifier holds it."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Pipe, wait
from typing import Any

from treerpo_ray.user_code import MAX_TRACE
from treerpo_ray.verifier._worker import Settings
from treerpo_ray.verifier.verdict import Verdict

START_TIMEOUT_S = 120.0
MAX_REPLY_BYTES = 2**24
TRACE_WAIT_S = 1.0
"""Time that a worker gets to write down where it hangs, and to end behind its pipe."""
WORKER = "import sys, json; a = json.loads(sys.argv[1]); sys.path[:] = a.pop(0)\n" + (
    "from treerpo_ray.verifier._worker import serve; serve(*a)"
)
ENVIRONMENT = (
    *("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR"),
    *("TZ", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
)
"""What a worker gets of the environment; the checks in this package need none of it."""
ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""Each thread would map 64 MiB of its own, which count as memory that a worker takes."""
MACHINERY = (
    *("/treerpo_ray/verifier/_worker.py", "/treerpo_ray/verifier/check.py", "/asyncio/"),
    *('"<string>"', "<frozen "),
)
"""In what a worker writes down, the frames that are above the check's own."""

Reply = dict[str, Any]
"""A worker's: the `number` of a request with its `value`, or with the `verdict` of a fault, its
`place` and its `trace`; `is_last` if the worker ends behind it."""


class WorkerProcess:
    """A process that grades; it starts at construction.

    Args:
        settings: What it is told.
        env: Names of variables that it gets beside ENVIRONMENT.
    """

    def __init__(self, *, settings: Settings, env: tuple[str, ...]) -> None:
        self.connection, theirs = Pipe()
        self.trace_fd = os.memfd_create("trace")
        """File in memory that it writes to where it hangs or crashes."""
        arguments = json.dumps([sys.path, theirs.fileno(), self.trace_fd])
        self.process = subprocess.Popen(
            # -P: a file of the working folder must not stand for a module of Python's.
            [sys.executable, "-P", "-c", WORKER, arguments],
            env=environment(os.environ, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), self.trace_fd],
            start_new_session=True,  # Ctrl-C is for the parent
        )
        theirs.close()
        # A message fails that a worker doesn't read, as one that hangs with its pipe full.
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            limit = struct.pack("ll", int(START_TIMEOUT_S), 0)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.deadline = time.monotonic() + START_TIMEOUT_S
        """Monotonic time at which the start or the first pending answer is over time."""
        self.is_ready = self.is_async = False
        self.pending: deque[int] = deque()
        """Numbers of the requests that it is at."""
        with suppress(OSError):  # it died at once, which is seen when it is waited for
            self.send(asdict(settings))

    def send(self, message: object) -> None:
        """Send a message.

        Raises:
            OSError: the process is gone, or has read nothing for START_TIMEOUT_S.
        """
        self.connection.send_bytes(json.dumps(message).encode())

    def read(self) -> Reply:
        """Its message: the greeting, or a reply to what it is at.

        Raises:
            EOFError, OSError: there is none, or one too long.
            ValueError: it is none of a worker, as what it runs may write to its pipe.
        """
        reply = json.loads(self.connection.recv_bytes(MAX_REPLY_BYTES))
        if not isinstance(reply, dict):
            raise ValueError("not a reply")
        if not self.is_ready:
            return reply
        number, value = reply.get("number"), reply.get("value")
        if type(number) is not int or number not in self.pending:
            raise ValueError("not a reply to what was asked")
        clean: Reply = {"number": number, "is_last": reply.get("is_last") is True}
        if "verdict" in reply:
            told = {name: str(reply.get(name, "")) for name in ("place", "trace")}
            return clean | told | {"verdict": Verdict(reply["verdict"])}
        if "value" not in reply or not isinstance(value, bool | float | int | list | None):
            raise ValueError("not a value")
        return clean | {"value": value}

    def stop(self) -> None:
        """End it, and what it has started."""
        self.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.trace_fd)

    def exit_status(self) -> int | None:
        """As `subprocess` has it; None while it runs, though its pipe be closed."""
        try:
            handle = os.pidfd_open(self.process.pid)
        except ProcessLookupError:
            return self.process.poll()
        try:
            wait([handle], TRACE_WAIT_S)
        finally:
            os.close(handle)
        # It is not waited for yet: its number stands for the group of what it started.
        found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def write_trace(self) -> None:
        """Have it write down where it hangs; what is stopped altogether writes nothing."""
        before = os.fstat(self.trace_fd).st_size
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        end = time.monotonic() + TRACE_WAIT_S
        while os.fstat(self.trace_fd).st_size == before and time.monotonic() < end:
            time.sleep(0.01)

    def trace(self) -> str:
        """What it has written of where it hangs or crashed, the check's own frames alone."""
        text = os.pread(self.trace_fd, MAX_TRACE, 0).decode(errors="replace")
        frames = [line for line in text.splitlines() if line.startswith("  File")]
        theirs = [line for line in frames if not any(part in line for part in MACHINERY)]
        header = "Traceback (most recent call last):"
        return "\n".join([header, *reversed(theirs)]) if theirs else ""


def environment(ours: Mapping[str, str], env: tuple[str, ...]) -> dict[str, str]:
    """What a worker gets of the environment."""
    return {name: ours[name] for name in (*ENVIRONMENT, *env) if name in ours} | ARENAS
