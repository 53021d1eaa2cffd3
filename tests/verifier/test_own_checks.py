"""Checks of the user's: partial credit, every way to end without a verdict, judges over HTTP."""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE_S, wait_for_file, wait_until_dead
from tests.support.user_files import CHECK, JUDGE, UNRULY
from treerpo_ray.errors import UserCodeError
from treerpo_ray.user_code import pack
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier


def verifier_of(text: str, *, on_fault: Callable[[str], None], **settings) -> Verifier:
    given = {"num_workers": 1, "timeout_s": PATIENCE_S, "memory_mib": 256} | settings
    return Verifier(check="own.py", sources={"own.py": pack(text)}, on_fault=on_fault, **given)


def answers(texts: Sequence[str], question: str = "") -> list[Answer]:
    return [
        Answer(text=text, references=("4",), is_cut_off=False, question=question) for text in texts
    ]


def test_partial_credit_comes_with_its_number_and_the_row_is_seen() -> None:
    told: list[str] = []
    with verifier_of(CHECK, on_fault=told.append) as verifier:
        verifier.self_test()
        assert verifier.wants_row
        row = '{"near": "5"}'
        asked = [
            Answer(text=text, references=("4",), is_cut_off=False, row=row)
            for text in ("4", "5", "6", "")
        ]
        assert verifier.grade(asked) == [
            (Verdict.CORRECT, 1.0),
            (Verdict.PARTIAL, 0.5),
            (Verdict.WRONG, 0.0),
            (Verdict.UNANSWERED, 0.0),
        ]
        assert verifier.group([asked]) == [None] and verifier.has_answers([["4"]]) == [None]
    assert not told


def test_each_way_to_end_without_a_verdict_is_that_answers_alone_and_told_once(tmp_path) -> None:
    """Of what a check returns, raises or does; with the traceback where Python has one."""
    told: list[str] = []
    ways = {
        "number 1.5": "check_answer returned 1.5 (float)",
        "number nan": "check_answer returned nan (float)",
        "number -1": "check_answer returned -1.0 (float)",
        "text": "check_answer returned '1' (str)",
        "list": "check_answer returned [1.0] (list)",
        "raise": 'File "own.py", line 7, in deep\n    return {"known": 1}[text]',
        "sys.exit": 'File "own.py", line 23, in check_answer\n    sys.exit(0)',
        "exit": "the process ended with status 5",
        "abort": 'File "own.py", line 25 in check_answer\nthe process ended with status -6',
        "hog": "more than verifier.memory_mib=256 were asked for",
        "forge short": "the process closed its pipe",
        "close": "the process closed its pipe",
    }
    with verifier_of(UNRULY, on_fault=told.append, num_workers=2) as verifier:
        verifier.self_test()
        for way, words in ways.items():
            told.clear()
            graded = verifier.grade(answers(["fine", way, "fine", way, "fine"]))
            assert [grade.verdict for grade in graded] == [
                *(Verdict.CORRECT, Verdict.ERRORED, Verdict.CORRECT),
                *(Verdict.ERRORED, Verdict.CORRECT),
            ], way
            if told:  # what has the same place as another way was told with that
                assert len(told) == 1 and words in told[0], told
                assert "_worker.py" not in told[0] and told[0].startswith(
                    "own.py: an answer has no"
                )
            else:
                assert way in ("number nan", "number -1", "text", "list", "close"), way


def test_a_check_that_hangs_is_told_with_the_line_and_what_it_started_ends_with_it(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    with verifier_of(UNRULY, on_fault=told.append, timeout_s=5.0) as verifier:
        graded = verifier.grade(answers([f"child {tmp_path / 'pid'}", "sleep", "fine"]))
        assert [g.verdict for g in graded] == [
            Verdict.TIMED_OUT,
            Verdict.TIMED_OUT,
            Verdict.CORRECT,
        ]
        wait_for_file(tmp_path / "pid")
        assert wait_until_dead([int((tmp_path / "pid").read_text())]) == []
    assert len(told) == 1 and "no reply in 5 s (verifier.timeout_s)" in told[0]
    assert 'File "own.py", line ' in told[0] and "check.py" not in told[0]


def test_a_check_that_is_not_asynchronous_and_what_it_starts_have_no_network() -> None:
    """Neither by a socket of its own, nor in a process that it starts, nor in a thread."""
    text = """
import errno, socket, subprocess, sys, threading
TRY = "import socket; socket.create_connection(('127.0.0.1', 9))"
def refused(family):
    try:
        socket.socket(family).close()
    except OSError as error:
        return error.errno == errno.ENETUNREACH
    return False
def check_answer(text):
    kinds = [refused(each) for each in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)]
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.append(refused(socket.AF_INET)), daemon=True)
    thread.start()
    thread.join()
    child = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True)
    socket.socketpair()  # as pipes of processes are
    return all(kinds + in_thread) and "Network is unreachable" in child.stderr
SELF_TEST = [("a", [], True)]
"""
    told: list[str] = []
    with verifier_of(text, on_fault=told.append) as verifier:
        verifier.self_test()
    assert not told


class Judge(ThreadingHTTPServer):
    """Gives a text the score that it says. `again` gets one when it is asked again, `down` never;
    `bad` gets none of a score, `never` no reply, `meet` one when two ask at the same time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.meeting = threading.Barrier(2)
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with self.server.lock:
            self.server.asked[text] += 1
            count = self.server.asked[text]
        if text == "never":
            self.rfile.read()  # until the other side gives up
            return
        if text == "meet":
            self.server.meeting.wait(PATIENCE_S)
        is_up = text != "down" and (text != "again" or count > 1)
        score = {"meet": 0.75, "again": 0.25, "bad": 7}.get(text)
        self.send_response(200 if is_up else 503)
        self.end_headers()
        self.wfile.write(
            json.dumps({"score": score if score or not is_up else float(text)}).encode()
        )

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as server:
        serve = partial(server.serve_forever, poll_interval=0.01)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_judge_is_asked_by_many_at_a_time_and_again_where_it_fails(judge: Judge) -> None:
    port, told = str(judge.server_address[1]), list[str]()
    text = JUDGE.replace("PORT", repr(port))
    with verifier_of(text, on_fault=told.append, retries=1, concurrency=4) as verifier:
        verifier.self_test()
        asked = ["0.5", "meet", "again", "meet", "0", "down", "1", "bad"]
        graded = verifier.grade(answers(asked, port))
        assert graded[:5] == [
            *((Verdict.PARTIAL, 0.5), (Verdict.PARTIAL, 0.75), (Verdict.PARTIAL, 0.25)),
            *((Verdict.PARTIAL, 0.75), (Verdict.WRONG, 0.0)),
        ]
        assert [g.verdict for g in graded[5:]] == [
            *(Verdict.ERRORED, Verdict.CORRECT, Verdict.ERRORED)
        ]
        # Asked twice: what failed; not what came back and is no reward.
        assert [judge.asked[each] for each in ("again", "down", "bad")] == [2, 2, 1]
    assert len(told) == 2
    assert any("ConnectionError: HTTP/1.0 503 Service Unavailable" in each for each in told)
    assert any("check_answer returned 7 (int)" in each for each in told)


def test_a_judge_that_is_silent_blocks_or_ends_its_process_costs_its_own_answer(
    judge: Judge,
) -> None:
    port, told = str(judge.server_address[1]), list[str]()
    text = JUDGE.replace("PORT", repr(port))
    with verifier_of(text, on_fault=told.append, timeout_s=3.0, concurrency=8) as verifier:
        asked = ["0.5", "never", "1", "block", "0", "exit", "0.5"]
        graded = verifier.grade(answers(asked, port))
    assert [g.verdict for g in graded] == [
        *(Verdict.PARTIAL, Verdict.TIMED_OUT, Verdict.CORRECT, Verdict.TIMED_OUT),
        *(Verdict.WRONG, Verdict.ERRORED, Verdict.PARTIAL),
    ]
    assert any("line 12, in check_answer\n    head, _, body" in each for each in told), told
    assert any('"own.py", line 6 in check_answer' in each for each in told)
    assert any("ended with status 5" in each for each in told)


def test_a_judge_that_is_not_there_is_seen_by_the_self_test(judge: Judge) -> None:
    text = JUDGE.replace("PORT", "'1'")
    with (
        verifier_of(text, on_fault=lambda fault: None) as verifier,
        pytest.raises(UserCodeError, match=r"is errored, should be from 0\.4 to 0\.6\n") as caught,
    ):
        verifier.self_test()
    assert "ConnectionRefusedError" in caught.value.trace


def test_named_variables_are_handed_on_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "open sesame")
    monkeypatch.setenv("OTHER_KEY", "secret")
    text = """
import os
KEY = os.environ.get("JUDGE_KEY", "")
def check_answer(text):
    return text == KEY and "OTHER_KEY" not in os.environ
SELF_TEST = [{"text": "open sesame", "expected": True}]
"""
    for env, is_right in ((("JUDGE_KEY",), True), ((), False)):
        with verifier_of(text, on_fault=lambda fault: None, env=env) as verifier:
            graded = verifier.grade(answers(["open sesame"]))
        assert (graded[0].verdict is Verdict.CORRECT) is is_right
    assert os.environ["OTHER_KEY"] == "secret"
