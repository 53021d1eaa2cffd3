"""Verifier: grades answers in killable processes.

The parent never unpickles what a worker sends, and a worker never runs what it reads: texts go out
as JSON, a byte or a number an answer comes back, and no secret of the environment is handed on. A
worker that hangs (also in C code), dies or runs out of memory takes only the answer that it was at
with it; the rest of its chunk goes to another worker.

Another domain is one module, named by `verifier.check`: `check_answer` grades a text, `SELF_TEST`
holds texts with the grades that they must get, and, if it has them, `find_answer` and `is_equal`
tell which answers are the same, `is_answer` whether a reference is one that a text can be graded
against. `boxed_answer` is a short one.
"""

import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType

from treerpo_ray.verifier._worker import FAILED, REPLIES, RETIRED
from treerpo_ray.verifier.verdict import Answer, Verdict

logger = logging.getLogger(__name__)

CHUNK = 16  # answers a message: its round trip is shared, and little waits behind a slow answer
START_TIMEOUT_S = 120.0
MAX_START_FAILURES = 3  # in a row; a worker may be killed from outside, all of them may not
WORKER = "import sys, json; a = json.loads(sys.argv[1]); sys.path[:] = a.pop(0)\n" + (
    "from treerpo_ray.verifier._worker import serve; serve(*a)"
)
ENVIRONMENT = (
    *("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR"),
    *("TZ", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
)
"""What a worker gets of the environment; the checks in this package need none of it."""
Request = tuple[object, ...]
"""What a worker is asked, as JSON takes it: see `verifier._worker`."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    """Monotonic time at which the start or the first pending answer is over time."""
    is_ready: bool = False
    pending: deque[int] = field(default_factory=deque)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class Verifier:
    """A pool of processes that grade answers; the processes start at construction, in parallel.

    Args:
        check: module with `check_answer(text, references, is_cut_off) -> bool | None` (None: the
            text holds no answer) and `SELF_TEST`, a tuple of (text, references, expected).
        num_workers: processes.
        timeout_s: seconds for one answer.
        memory_mib: memory that a process may take on top of what its imports took.
        on_start: told the process id of each worker, also of one that replaces another.

    Raises:
        ValueError: no module of the name `check`, or a number that isn't positive.
    """

    def __init__(
        self,
        *,
        check: str,
        num_workers: int,
        timeout_s: float,
        memory_mib: int,
        on_start: Callable[[int], None] = lambda pid: None,
    ) -> None:
        if not is_module(check):
            raise ValueError(f"verifier.check: no module {check!r}; name one as package.module")
        for name, number in (
            ("num_workers", num_workers),
            ("timeout_s", timeout_s),
            ("memory_mib", memory_mib),
        ):
            if not number > 0:
                raise ValueError(f"verifier.{name} must be positive, not {number}")
        self._check, self._timeout_s, self._memory_mib = check, timeout_s, memory_mib
        self._on_start = on_start
        self._lock = threading.Lock()
        self._self_test: list[tuple[str, list[str], bool | None]] = []
        self._num_start_failures = 0
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)
        for _ in range(num_workers):
            self._start()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; the verifier grades nothing afterwards."""
        self._finalizer()

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Verdicts in the order of `answers`.

        Raises:
            RuntimeError: the workers do not start, or the verifier is closed.
            ValueError: `verifier.check` lacks `check_answer` or `SELF_TEST`.
        """
        requests: list[Request] = [
            ("check", answer.text, answer.references, answer.is_cut_off) for answer in answers
        ]
        replies = self._ask(requests)
        return [_to_verdict(*pair) for pair in zip(replies, answers, strict=True)]

    def group(self, samples: Sequence[Sequence[Answer]]) -> list[list[int] | None]:
        """Which answers to one problem are equal, by the domain's own notion; problem by problem.

        Equal answers have the same number, those without an answer -1. None: it cannot be told,
        for lack of time or because the domain has no `find_answer(text, is_cut_off) -> str | None`
        (and `is_equal(answer, other)`, where equal answers may be spelt in several ways).
        """
        requests: list[Request] = [
            ("group", [(answer.text, answer.is_cut_off) for answer in answers])
            for answers in samples
        ]
        return [
            None if isinstance(reply, Verdict) or reply == FAILED else json.loads(reply)
            for reply in self._ask(requests)
        ]

    def has_answers(self, references: Sequence[Sequence[str]]) -> list[bool | None]:
        """Whether a text can be right by the references of each problem, as the domain's
        `is_answer(reference) -> bool` tells; None where the domain has none.

        Raises:
            RuntimeError: the workers do not start, or the verifier is closed.
            ValueError: `verifier.check` lacks `check_answer` or `SELF_TEST`.
        """
        replies = self._ask([("reference", list(each)) for each in references])
        told = {REPLIES[True]: True, REPLIES[None]: None}
        return [told.get(reply, False) if isinstance(reply, bytes) else False for reply in replies]

    def _ask(self, requests: Sequence[Request]) -> list[bytes | Verdict]:
        """Replies in order; a verdict for a request that a worker was lost at."""
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("the verifier is closed")
            todo = deque(range(len(requests)))
            replies: dict[int, bytes | Verdict] = {}
            try:
                while len(replies) < len(requests):
                    for worker in list(self._workers):
                        if worker.is_ready and not worker.pending and todo:
                            self._send(worker, requests, todo)
                    self._wait(todo, replies)
            except BaseException:  # the workers still hold requests of this call
                self.close()
                raise
            return [replies[index] for index in range(len(requests))]

    def self_test(self) -> None:
        """Grade the domain's `SELF_TEST` in the workers.

        Raises:
            RuntimeError: a pair of text and references got another verdict than it should.
        """
        with self._lock:
            while not any(worker.is_ready for worker in self._workers):
                self._wait(deque(), {})
        pairs = self._self_test
        verdicts = self.grade(
            [Answer(text=text, references=tuple(refs), is_cut_off=False) for text, refs, _ in pairs]
        )
        expected = {True: Verdict.CORRECT, False: Verdict.WRONG, None: Verdict.UNANSWERED}
        for (text, refs, right), verdict in zip(pairs, verdicts, strict=True):
            if verdict is not expected[right]:
                raise RuntimeError(
                    f"self-test of {self._check}: {text!r} against {refs} is {verdict.value}, "
                    f"should be {expected[right].value}"
                )

    def _start(self) -> None:
        ours, theirs = Pipe()
        # The death signal follows the thread that started the worker, not the process.
        is_bound = threading.current_thread() is threading.main_thread()
        limits = (self._timeout_s, self._memory_mib, os.getpid() if is_bound else 0)
        arguments = json.dumps([sys.path, self._check, theirs.fileno(), *limits])
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, arguments],
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent
        )
        theirs.close()
        deadline = time.monotonic() + START_TIMEOUT_S
        self._workers.append(_Worker(process=process, connection=ours, deadline=deadline))
        self._on_start(process.pid)

    def _send(self, worker: _Worker, requests: Sequence[Request], todo: deque[int]) -> None:
        share = math.ceil(len(todo) / (2 * len(self._workers)))
        worker.pending.extend(todo.popleft() for _ in range(min(CHUNK, share)))
        chunk = [requests[index] for index in worker.pending]
        try:
            worker.connection.send_bytes(json.dumps(chunk).encode())
        except OSError:  # it died while idle: none of these answers is to blame
            self._replace(worker, todo)
        else:
            worker.deadline = time.monotonic() + self._timeout_s

    def _wait(self, todo: deque[int], replies: dict[int, bytes | Verdict]) -> None:
        """Take replies until something may be sent again; replace workers that died or hang."""
        if not any(worker.is_ready for worker in self._workers):
            logger.info("waiting for %d verifier workers to start", len(self._workers))
        busy = [worker for worker in self._workers if worker.pending or not worker.is_ready]
        patience = min(worker.deadline for worker in busy) - time.monotonic() if busy else 0.0
        heard = wait([worker.connection for worker in busy], max(0.0, patience))
        for worker in busy:
            if worker.connection not in heard:
                if time.monotonic() >= worker.deadline:
                    self._lose(worker, todo, replies, Verdict.TIMED_OUT)
                continue
            try:
                reply = worker.connection.recv_bytes()
            except (EOFError, OSError):
                has_rung = worker.process.wait() == -signal.SIGALRM
                verdict = Verdict.TIMED_OUT if has_rung else Verdict.ERRORED
                self._lose(worker, todo, replies, verdict)
                continue
            if worker.is_ready:
                replies[worker.pending.popleft()] = reply.removesuffix(RETIRED)
                worker.deadline = time.monotonic() + self._timeout_s
                if reply.endswith(RETIRED):
                    self._replace(worker, todo)
            else:
                self._greet(worker, reply)

    def _greet(self, worker: _Worker, reply: bytes) -> None:
        if reply.startswith(b"!"):
            raise ValueError(f"verifier.check: {self._check} {reply[1:].decode()}")
        self._self_test = json.loads(reply)
        self._num_start_failures = 0
        worker.is_ready = True

    def _lose(
        self,
        worker: _Worker,
        todo: deque[int],
        replies: dict[int, bytes | Verdict],
        verdict: Verdict,
    ) -> None:
        """Blame the answer that the worker was at and put another worker in its place."""
        if worker.pending:
            replies[worker.pending.popleft()] = verdict
        elif not worker.is_ready:
            self._num_start_failures += 1
            if self._num_start_failures >= MAX_START_FAILURES:
                raise RuntimeError(
                    f"verifier workers do not start ({self._check}); see their standard error"
                )
        self._replace(worker, todo)

    def _replace(self, worker: _Worker, todo: deque[int]) -> None:
        todo.extendleft(reversed(worker.pending))
        worker.stop()
        self._workers.remove(worker)
        self._start()


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


def is_module(name: str) -> bool:
    """Whether a module of that name can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _to_verdict(reply: bytes | Verdict, answer: Answer) -> Verdict:
    if isinstance(reply, Verdict):
        return reply
    if reply == REPLIES[None]:
        return Verdict.CUT_OFF if answer.is_cut_off else Verdict.UNANSWERED
    if reply == FAILED:
        return Verdict.ERRORED
    return Verdict.CORRECT if reply == REPLIES[True] else Verdict.WRONG
