"""Signals end a command as far as it has come: at once, by an interrupt, or after what it asks."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.support.project import PROJECT
from treerpo_ray.stop import SIGNALS, STOPPED, Stop, held_back


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_signal_asks_and_the_second_interrupts(first, second) -> None:
    asked: list[bool] = []
    stop = Stop(same_s=0)
    with stop.at_work():
        with stop.gently(lambda: asked.append(True)):
            assert not stop.is_asked
            signal.raise_signal(first)
            assert asked == [True] and stop.is_asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(second)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert asked == [True]


def test_where_nothing_can_be_asked_the_first_signal_interrupts() -> None:
    stop = Stop()
    with stop.at_work(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_asked


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """As `timeout` sends it, to the process and to its group."""
    asked: list[bool] = []
    stop = Stop(same_s=900)
    with stop.at_work(), stop.gently(lambda: asked.append(True)):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.raise_signal(number)
    assert asked == [True]


def test_what_must_not_be_interrupted_is_told_of_it_afterwards() -> None:
    stop, done = Stop(), []
    with stop.at_work(), pytest.raises(KeyboardInterrupt):
        with held_back():
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            done.append(True)
        done.append(True)
    assert done == [True] and stop.is_asked
    with stop.at_work(), pytest.raises(KeyboardInterrupt), held_back(same_s=0.0):
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done == [True], "a second one is not held back"


def test_an_interrupt_that_falls_into_a_destructor_comes_once_more() -> None:
    class Cleared:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    hook, stop = sys.unraisablehook, Stop(same_s=900)
    with stop.at_work():
        cleared = [Cleared()]
        with pytest.raises(KeyboardInterrupt):
            cleared.clear()
            threading.Event().wait(60)
    assert stop.is_asked and sys.unraisablehook is hook


def test_a_signal_that_comes_twice_at_once_is_not_lost_between_a_destructor_and_its_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Cleared:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    class Timer(threading.Timer):
        def start(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            super().start()

    monkeypatch.setattr(threading, "Timer", Timer)
    with Stop(same_s=900).at_work():
        cleared = [Cleared()]
        with pytest.raises(KeyboardInterrupt):
            cleared.clear()
            threading.Event().wait(60)


def test_a_handler_that_a_library_sets_for_itself_is_taken_back() -> None:
    stop = Stop()
    with stop.at_work():
        with held_back():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_thread_has_no_signals_and_its_work_is_done_all_the_same() -> None:
    done: list[bool] = []

    def work() -> None:
        with Stop().at_work():
            done.append(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    assert done == [True]


COMMAND = """
import signal, sys, time
from treerpo_ray.errors import run_command
from treerpo_ray.stop import Stop

def wait():
    print("here", flush=True)
    time.sleep(60)

def start(arguments):
    try:
        wait()
    finally:
        print("ended in order", file=sys.stderr)

def work(arguments):
    stop = Stop()
    with stop.at_work(), stop.gently(lambda: print("asked", file=sys.stderr)):
        print("here", flush=True)
        while not stop.is_asked:
            time.sleep(0.01)
        print("wrote the checkpoint", file=sys.stderr, flush=True)
        open(arguments[0], "w").close()
    return 130

sys.exit(run_command({"start": start, "work": work}[sys.argv[1]], sys.argv[2:], stopped="goes on"))
"""


def started(*arguments: str, **settings: object) -> subprocess.Popen[str]:
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **{"stderr": subprocess.PIPE} | settings,
    )
    assert command.stdout is not None and command.stdout.readline() == "here\n"
    return command


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anything_is_started_a_signal_ends_the_command_with_one_line(number) -> None:
    command = started("start")
    os.killpg(command.pid, number)
    os.killpg(command.pid, number)
    _, shown = command.communicate(timeout=600)
    assert (command.returncode, shown) == (STOPPED, "stopped\n")


def test_a_command_whose_terminal_is_closed_ends_as_by_any_other_signal(tmp_path) -> None:
    """What it prints from then on goes nowhere, instead of failing."""
    ours, theirs = pty.openpty()
    with started("work", str(tmp_path / "checkpoint"), stdin=theirs, stderr=theirs) as command:
        os.close(theirs)
        os.close(ours)  # the terminal is gone
        os.kill(command.pid, signal.SIGHUP)
        assert command.wait(600) == STOPPED
    assert (tmp_path / "checkpoint").exists()


def test_under_nohup_the_end_of_the_terminal_means_nothing(tmp_path) -> None:
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    command = started("work", str(tmp_path / "checkpoint"), preexec_fn=ignored)
    os.kill(command.pid, signal.SIGHUP)
    time.sleep(0.2)
    assert command.poll() is None
    os.kill(command.pid, signal.SIGTERM)
    _, shown = command.communicate(timeout=600)
    assert (command.returncode, shown) == (STOPPED, "asked\nwrote the checkpoint\n")
