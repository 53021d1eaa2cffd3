"""Verifier: grades answers in killable processes.

The parent never unpickles what a worker sends, and a worker never runs what it reads: both are
JSON, and no secret of the environment is handed on. A worker that hangs (also in C code), dies or
runs out of memory takes only the answer that it was at with it; the rest goes to another worker.
Workers have no network, but those of an asynchronous check, which asks others for their verdict.
They run as the user who starts them, and may read and write what that user may.

Another domain is one module or file, named by `verifier.check`; see `verifier.check`, of which
`boxed_answer` is a short one.
"""

import logging
import math
import os
import platform
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import wait
from types import TracebackType

from treerpo_ray.errors import UserCodeError
from treerpo_ray.user_code import is_file, is_module
from treerpo_ray.verifier._process import Reply, WorkerProcess
from treerpo_ray.verifier._worker import OUT_OF_MEMORY, Settings
from treerpo_ray.verifier.check import SelfTest
from treerpo_ray.verifier.verdict import Answer, Grade, Verdict

logger = logging.getLogger(__name__)

CHUNK = 16  # answers a message: its round trip is shared, and little waits behind a slow answer
MAX_START_FAILURES = 3  # in a row; a worker may be killed from outside, all of them may not
MAX_TOLD = 10
"""Faults that are told with their traceback, each but once."""
Request = tuple[str, dict[str, object]]
"""What a worker is asked, as JSON takes it: see `verifier._worker`."""


class VariableNotSet(ValueError):
    """`verifier.env` names a variable that this node does not have: another try would not, too."""


class Verifier:
    """A pool of processes that grade answers; the processes start at construction, in parallel.

    Args:
        check: Module or file; see `verifier.check`.
        num_workers: Processes.
        timeout_s: Seconds for one answer, or for one attempt of an asynchronous check.
        memory_mib: Memory that a process may take on top of what its imports took.
        sources: Packed source of a file, by its name; see `user_code`.
        retries: Times that an asynchronous check is asked again.
        concurrency: Answers that a process of an asynchronous check has at hand.
        env: Names of variables that the processes get beside ENVIRONMENT.
        on_start: Told the process id of each worker, also of one that replaces another.
        on_fault: Told, once for each place, why an answer has no verdict, with the traceback; it
            is logged if nobody is.

    Raises:
        ValueError: no module of the name `check`, a number that isn't positive; VariableNotSet of
            a variable.
    """

    def __init__(
        self,
        *,
        check: str,
        num_workers: int,
        timeout_s: float,
        memory_mib: int,
        sources: Mapping[str, str] | None = None,
        retries: int = 0,
        concurrency: int = 32,
        env: Sequence[str] = (),
        on_start: Callable[[int], None] = lambda pid: None,
        on_fault: Callable[[str], None] = logger.warning,
    ) -> None:
        if not is_file(check) and not is_module(check):
            raise ValueError(
                f"verifier.check: no module {check!r}; name one as package.module, or a file.py"
            )
        for name, number in (
            ("num_workers", num_workers),
            ("timeout_s", timeout_s),
            ("memory_mib", memory_mib),
            ("concurrency", concurrency),
        ):
            if not number > 0:
                raise ValueError(f"verifier.{name} must be positive, not {number}")
        if missing := [name for name in env if name not in os.environ]:
            raise VariableNotSet(
                f"verifier.env names {missing[0]}, which is not set on {platform.node()}, where "
                "answers are graded: set it on every node, before Ray is started there"
            )
        self._env = tuple(env)
        # The death signal follows the thread that started the worker, not the process.
        is_bound = threading.current_thread() is threading.main_thread()
        self._settings = Settings(
            check=check,
            sources=dict(sources or {}),
            timeout_s=timeout_s,
            memory_mib=memory_mib,
            retries=retries,
            parent=os.getpid() if is_bound else 0,
        )
        self._concurrency = concurrency
        self._on_start, self._on_fault = on_start, on_fault
        self._lock = threading.Lock()
        self._self_test: list[SelfTest] = []
        self._wanted: tuple[str, ...] = ()
        self._told: set[str] = set()
        self._alone: set[int] = set()
        """Requests that a worker was lost with others at: which it was is seen when each is sent
        alone."""
        self._num_start_failures = 0
        self._workers: list[WorkerProcess] = []
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

    @property
    def wants_row(self) -> bool:
        """Whether the check asks for the rows of the data set.

        Raises:
            RuntimeError, UserCodeError: as `grade` does.
        """
        self._await_start()
        return "row" in self._wanted

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Grades in the order of `answers`.

        Raises:
            RuntimeError: the workers do not start, or the verifier is closed.
            UserCodeError: `verifier.check` cannot be imported or is no check.
        """
        self._await_start()
        replies = self._ask([("check", self._asked_of(answer)) for answer in answers])
        return [_grade(*pair) for pair in zip(replies, answers, strict=True)]

    def group(self, samples: Sequence[Sequence[Answer]]) -> list[list[int] | None]:
        """Which answers to one problem are equal, by the domain's own notion; problem by problem.

        Equal answers have the same number, those without an answer -1. None: it cannot be told,
        for lack of time or because the domain has no `find_answer(text, is_cut_off) -> str | None`
        (and `is_equal(answer, other)`, where equal answers may be spelt in several ways).
        """
        requests: list[Request] = [
            ("group", {"texts": [(answer.text, answer.is_cut_off) for answer in answers]})
            for answers in samples
        ]
        found: list[list[int] | None] = []
        for reply, answers in zip(self._ask(requests, tells=False), samples, strict=True):
            value = reply.get("value")
            is_told = isinstance(value, list) and [type(n) for n in value] == [int] * len(answers)
            found.append(value if is_told else None)
        return found

    def has_answers(self, references: Sequence[Sequence[str]]) -> list[bool | None]:
        """Whether a text can be right by the references of each problem, as the domain's
        `is_answer(reference) -> bool` tells; None where the domain has none.

        Raises:
            RuntimeError, UserCodeError: as `grade` does.
        """
        replies = self._ask([("reference", {"references": list(each)}) for each in references])
        return [reply.get("value", False) for reply in replies]

    def self_test(self) -> None:
        """Grade the domain's `SELF_TEST` in the workers.

        Raises:
            RuntimeError, UserCodeError: as `grade` does; or a text got another reward than it
                should.
        """
        self._await_start()
        tests = self._self_test
        replies = self._ask([("check", self._asked_of(test.answer)) for test in tests])
        for test, reply in zip(tests, replies, strict=True):
            grade = _grade(reply, test.answer)
            has_answer = grade.verdict not in (Verdict.UNANSWERED, Verdict.CUT_OFF)
            reward = grade.reward if has_answer else None
            if grade.verdict.is_reward and test.is_met(reward):
                continue
            found = f"{grade.reward:g}" if grade.verdict is Verdict.PARTIAL else grade.verdict.value
            trace = reply.get("trace", "")
            raise UserCodeError(
                f"self-test of {self._settings.check}: {test.answer.text!r} against "
                f"{list(test.answer.references)} is {found}, should be {test.shown}"
                f"{_network_hint(trace)}",
                trace,
            )

    def _asked_of(self, answer: Answer) -> dict[str, object]:
        """What a check is told of an answer: question and row are long, and few want them."""
        whole = asdict(answer)
        unwanted = {"question", "row"} - set(self._wanted)
        return {name: value for name, value in whole.items() if name not in unwanted}

    def _await_start(self) -> None:
        with self._lock:
            self._check_open()
            while not any(worker.is_ready for worker in self._workers):
                self._wait(deque(), {})

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the verifier is closed")

    def _ask(self, requests: Sequence[Request], *, tells: bool = True) -> list[Reply]:
        """Replies in order; a verdict for a request that a worker was lost at."""
        with self._lock:
            self._check_open()
            todo = deque(range(len(requests)))
            replies: dict[int, Reply] = {}
            self._alone.clear()
            try:
                while len(replies) < len(requests):
                    for worker in list(self._workers):
                        if worker.is_ready and todo:
                            self._send(worker, requests, todo, replies)
                    self._wait(todo, replies)
            except BaseException:  # the workers still hold requests of this call
                self.close()
                raise
            if tells:
                self._tell(replies.values())
            return [replies[index] for index in range(len(requests))]

    def _tell(self, replies: Iterable[Reply]) -> None:
        """Say of each place that answers without a verdict come from, once, what is wrong there."""
        for reply in replies:
            place = reply.get("place")
            if place is None or place in self._told or len(self._told) >= MAX_TOLD:
                continue
            self._told.add(place)
            trace = reply.get("trace") or place
            hint = _network_hint(trace)
            self._on_fault(f"{self._settings.check}: an answer has no verdict{hint}:\n{trace}")

    def _start(self) -> None:
        worker = WorkerProcess(settings=self._settings, env=self._env)
        self._workers.append(worker)
        self._on_start(worker.process.pid)

    def _send(
        self,
        worker: WorkerProcess,
        requests: Sequence[Request],
        todo: deque[int],
        replies: dict[int, Reply],
    ) -> None:
        if not worker.is_async:
            room = 0 if worker.pending else CHUNK
        elif self._alone:
            room = 0 if worker.pending else 1
        else:
            room = self._concurrency - len(worker.pending)
        share = math.ceil(len(todo) / (2 * len(self._workers)))
        sent = [todo.popleft() for _ in range(min(room, share, len(todo)))]
        if not sent:
            return
        was_idle = not worker.pending
        worker.pending.extend(sent)
        try:
            worker.send([(index, *requests[index]) for index in sent])
        except OSError:
            if was_idle:  # it died while idle: none of these answers is to blame
                self._replace(worker, todo)
            else:
                self._lose(worker, todo, replies, Verdict.TIMED_OUT)
        else:
            worker.deadline = time.monotonic() + self._patience_s(worker)

    def _patience_s(self, worker: WorkerProcess) -> float:
        """Time without a reply after which a worker hangs."""
        settings = self._settings
        return settings.patience_s if worker.is_async else settings.timeout_s

    def _wait(self, todo: deque[int], replies: dict[int, Reply]) -> None:
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
                reply = worker.read()
            except (EOFError, OSError, ValueError):
                has_rung = worker.exit_status() == -signal.SIGALRM
                verdict = Verdict.TIMED_OUT if has_rung else Verdict.ERRORED
                self._lose(worker, todo, replies, verdict)
                continue
            if not worker.is_ready:
                self._greet(worker, reply)
                continue
            worker.pending.remove(reply["number"])
            replies[reply["number"]] = reply
            self._alone.discard(reply["number"])
            worker.deadline = time.monotonic() + self._patience_s(worker)
            if reply.get("is_last"):
                self._replace(worker, todo)

    def _greet(self, worker: WorkerProcess, greeting: Reply) -> None:
        if "refused" in greeting:
            raise UserCodeError(f"verifier.check: {greeting['refused']}", greeting["trace"])
        if greeting["not_isolated"] and "network" not in self._told:
            self._told.add("network")
            reason = greeting["not_isolated"]
            logger.warning("verifier workers can reach the network: %s", reason)
        worker.is_async = greeting["is_async"]
        self._wanted = tuple(greeting["wanted"])
        self._self_test = [SelfTest.from_json(test) for test in greeting["self_test"]]
        self._num_start_failures = 0
        worker.is_ready = True

    def _lose(
        self, worker: WorkerProcess, todo: deque[int], replies: dict[int, Reply], verdict: Verdict
    ) -> None:
        """Blame the answer that the worker was at and put another worker in its place."""
        if worker.is_async and len(worker.pending) > 1:
            self._alone.update(worker.pending)
        elif worker.pending:
            index = worker.pending.popleft()
            replies[index] = {"verdict": verdict, **self._reason(worker, verdict)}
            self._alone.discard(index)
        elif not worker.is_ready:
            self._num_start_failures += 1
            if self._num_start_failures >= MAX_START_FAILURES:
                raise RuntimeError(
                    f"verifier workers do not start ({self._settings.check}); see their standard "
                    "error"
                )
        self._replace(worker, todo)

    def _reason(self, worker: WorkerProcess, verdict: Verdict) -> dict[str, str]:
        """Why a worker was lost, in words, and where it was."""
        if verdict is Verdict.TIMED_OUT:
            place = f"no reply in {self._patience_s(worker):g} s (verifier.timeout_s)"
            if place not in self._told:
                worker.write_trace()
        elif (status := worker.exit_status()) == OUT_OF_MEMORY:
            place = f"more than verifier.memory_mib={self._settings.memory_mib} were asked for"
        else:
            ended = "closed its pipe" if status is None else f"ended with status {status}"
            place = f"the process {ended}"
        return {"place": place, "trace": f"{worker.trace()}\n{place}".strip()}

    def _replace(self, worker: WorkerProcess, todo: deque[int]) -> None:
        todo.extendleft(reversed(worker.pending))
        worker.stop()
        self._workers.remove(worker)
        self._start()


def _network_hint(trace: str) -> str:
    if "Network is unreachable" not in trace:
        return ""
    return " (a check that is not `async def` runs without network)"


def _stop_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().stop()


def _grade(reply: Reply, answer: Answer) -> Grade:
    if "verdict" in reply:
        return Grade.without_reward(reply["verdict"])
    value = reply["value"]
    if isinstance(value, list) or (value is not None and not 0 <= value <= 1):
        return Grade.without_reward(Verdict.ERRORED)
    return Grade.of(value, is_cut_off=answer.is_cut_off)
