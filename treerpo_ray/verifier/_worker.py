"""Verifier worker: the process that grades, under limits, what the verifier sends it."""

import ctypes
import importlib
import json
import operator
import os
import resource
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1
REPLIES: dict[bool | None, bytes] = {True: b"1", False: b"0", None: b"-"}
FAILED = b"x"
RETIRED = b"$"
"""Behind a reply: the worker has grown and ends, so that the next answer has its full memory."""


def serve(check: str, fd: int, timeout_s: float, memory_mib: int, parent: int) -> None:
    """Body of a worker: answer each chunk until the pipe closes.

    `parent` is the process whose death kills the worker, 0 if a thread of it started the worker.
    """
    if parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(fd)
    with suppress(EOFError, OSError):
        try:
            module = importlib.import_module(check)
            _, self_test = module.check_answer, module.SELF_TEST
        except (ImportError, AttributeError) as error:
            connection.send_bytes(f"!cannot be used: {error}".encode())
            return
        baseline, allowance = _address_space(), memory_mib * 2**20
        limit = baseline + allowance
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        connection.send_bytes(json.dumps(self_test).encode())
        while True:
            for request in json.loads(connection.recv_bytes()):
                # The kernel ends a worker that hangs with nobody left to kill it.
                signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
                try:
                    reply = _reply(module, *request)
                except MemoryError:
                    os._exit(1)  # what else failed in here is unknown
                except Exception:
                    reply = FAILED
                signal.setitimer(signal.ITIMER_REAL, 0)
                # Caches of parsed answers grow; what they took must not fail a later answer.
                if _address_space() > baseline + allowance // 2:
                    connection.send_bytes(reply + RETIRED)
                    return
                connection.send_bytes(reply)


def _reply(module: ModuleType, kind: str, *arguments: Any) -> bytes:
    """What is sent back for a request: a byte for `check` and `reference`, numbers for `group`."""
    if kind == "check":
        text, references, is_cut_off = arguments
        return REPLIES[module.check_answer(text, tuple(references), is_cut_off)]
    if kind == "reference":
        is_answer = getattr(module, "is_answer", None)
        return REPLIES[None if is_answer is None else any(map(is_answer, arguments[0]))]
    return json.dumps(group(module, arguments[0])).encode()


def group(module: ModuleType, texts: list[tuple[str, bool]]) -> list[int]:
    """Which texts have equal answers: numbers from 0 in order of appearance, -1 without an answer.

    An answer joins the first group whose first answer it equals by the domain's `is_equal`.
    """
    is_equal = getattr(module, "is_equal", operator.eq)
    firsts: list[str] = []
    numbers = []
    for text, is_cut_off in texts:
        answer = module.find_answer(text, is_cut_off)
        if answer is None:
            numbers.append(-1)
            continue
        same = (n for n, first in enumerate(firsts) if answer == first or is_equal(answer, first))
        number = next(same, len(firsts))
        if number == len(firsts):
            firsts.append(answer)
        numbers.append(number)
    return numbers


def _address_space() -> int:
    """Bytes that this process has mapped, which is what the limit is on."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
