"""Verifier worker: the process that grades, under limits, what the verifier sends it.

It is sent requests, each a number, a kind and what it is about, and sends a reply for each: the
number with a value, or with the fault that it ended in.
"""

import asyncio
import ctypes
import faulthandler
import json
import operator
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType

from treerpo_ray.errors import UserCodeError
from treerpo_ray.user_code import file_hint, load_module, place_of, trace_of
from treerpo_ray.verifier._isolation import deny_network
from treerpo_ray.verifier.check import Check, WrongReturn, as_reward
from treerpo_ray.verifier.verdict import Answer, Verdict

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = 86
"""Exit status of a worker whose answer took more memory than it may."""
RESOLVER_THREADS = 4
"""Of an asynchronous check: the threads of more would take the memory that it may have."""
BACKOFF_S = 0.5
"""Time before an asynchronous check is asked again, doubled each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a worker is told before it starts."""

    check: str
    sources: dict[str, str]
    """Packed source of the check, where it is a file."""
    timeout_s: float
    memory_mib: int
    retries: int
    parent: int
    """Process whose death ends the worker; 0 if a thread of it started the worker."""

    @property
    def patience_s(self) -> float:
        """Time without a reply after which an asynchronous check hangs: that of all attempts for
        an answer, and of one more."""
        waits = BACKOFF_S * (2**self.retries - 1)
        return (self.retries + 2) * self.timeout_s + waits


def serve(fd: int, trace_fd: int) -> None:
    """Body of a worker: answer what comes until the pipe closes."""
    connection = Connection(fd)
    with suppress(EOFError, OSError):
        settings = Settings(**json.loads(connection.recv_bytes()))
        if settings.parent:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != settings.parent:
                return
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Where it hangs or crashes is told by the interpreter itself, whatever it is at.
        faulthandler.enable(trace_fd, all_threads=False)
        faulthandler.register(signal.SIGUSR1, trace_fd, all_threads=False)
        try:
            check = Check(load_module(settings.check, settings.sources))
        except UserCodeError as error:
            return _send(connection, {"refused": error.message, "trace": error.trace})
        except ValueError as error:
            refused = f"{settings.check} {error}{file_hint(settings.check)}"
            return _send(connection, {"refused": refused, "trace": ""})
        network = None if check.is_async else deny_network()
        memory = _Memory(allowance=settings.memory_mib * 2**20)
        greeting = {
            "is_async": check.is_async,
            "wanted": check.wanted,
            "self_test": [test.to_json() for test in check.self_test],
            "not_isolated": network,
        }
        _send(connection, greeting)
        if check.is_async:
            asyncio.run(_serve_together(check, connection, settings, memory))
        else:
            _serve_in_turn(check, connection, settings, memory)


class _Memory:
    """What the process may map beside what its imports have; the kernel holds it to it."""

    def __init__(self, *, allowance: int) -> None:
        self._half = _address_space() + allowance // 2
        limit = _address_space() + allowance
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @property
    def is_half_full(self) -> bool:
        """Whether the worker should end, so that a later answer has its full memory: caches of
        parsed answers grow, and what they took must not fail it."""
        return _address_space() > self._half


def _serve_in_turn(
    check: Check, connection: Connection, settings: Settings, memory: _Memory
) -> None:
    while True:
        for number, kind, about in json.loads(connection.recv_bytes()):
            # The kernel ends a worker that hangs with nobody left to kill it.
            signal.setitimer(signal.ITIMER_REAL, 2 * settings.timeout_s)
            try:
                reply = {"value": _value(check, kind, about)}
            except MemoryError:
                os._exit(OUT_OF_MEMORY)  # what else failed in here is unknown
            except BaseException as error:
                reply = _fault(error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            is_last = memory.is_half_full
            _send(connection, {"number": number, **reply, "is_last": is_last})
            if is_last:
                return


def _value(check: Check, kind: str, about: dict) -> object:
    """What a request of a check that is not asynchronous comes to, or any but `check`."""
    if kind == "check":
        return check(_answer(about))
    if kind == "reference":
        is_answer = getattr(check.module, "is_answer", None)
        return None if is_answer is None else any(map(is_answer, about["references"]))
    return group(check.module, about["texts"])


def _answer(about: dict) -> Answer:
    return Answer(**about | {"references": tuple(about["references"])})


async def _serve_together(
    check: Check, connection: Connection, settings: Settings, memory: _Memory
) -> None:
    """Answer all that has come at the same time; how much that is the verifier decides."""
    loop, is_closed = asyncio.get_running_loop(), asyncio.Event()
    loop.set_default_executor(ThreadPoolExecutor(RESOLVER_THREADS))
    tasks: set[asyncio.Task[None]] = set()

    async def answer(number: int, kind: str, about: dict) -> None:
        if kind == "check":
            reply = await _attempts(check, _answer(about), settings)
        else:
            reply = _tried(check, kind, about)
        try:
            _send(connection, {"number": number, **reply, "is_last": memory.is_half_full})
        except OSError:
            is_closed.set()

    def read() -> None:
        try:
            requests = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            is_closed.set()
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * settings.patience_s)
        for request in requests:
            task = loop.create_task(answer(*request))
            tasks.add(task)
            task.add_done_callback(done)

    def done(task: "asyncio.Task[None]") -> None:
        tasks.discard(task)
        if not tasks:
            signal.setitimer(signal.ITIMER_REAL, 0)

    loop.add_reader(connection.fileno(), read)
    await is_closed.wait()
    os._exit(0)  # whatever is under way has nobody to answer to


def _tried(check: Check, kind: str, about: dict) -> dict:
    try:
        return {"value": _value(check, kind, about)}
    except Exception as error:
        return _fault(error)


async def _attempts(check: Check, answer: Answer, settings: Settings) -> dict:
    """Ask an asynchronous check, again where it fails or takes too long."""
    reply: dict = {}
    for attempt in range(settings.retries + 1):
        if attempt:
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            async with asyncio.timeout(settings.timeout_s):
                returned = await check.function(**check.arguments(answer))
            return {"value": as_reward(returned)}
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except WrongReturn as error:
            return _fault(error)
        except TimeoutError as error:
            reply = _fault(error.__cause__ or error) | {"verdict": Verdict.TIMED_OUT}
        except BaseException as error:
            reply = _fault(error)
    return reply


def _fault(error: BaseException) -> dict:
    """A reply for an answer without a verdict: where it ended, the same for each that ends there,
    and the user's traceback."""
    if isinstance(error, WrongReturn):
        return {"verdict": Verdict.ERRORED, "place": "WrongReturn", "trace": str(error)}
    return {"verdict": Verdict.ERRORED, "place": place_of(error), "trace": trace_of(error)}


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


def _send(connection: Connection, reply: dict) -> None:
    connection.send_bytes(json.dumps(reply).encode())


def _address_space() -> int:
    """Bytes that this process has mapped, which is what the limit is on."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
