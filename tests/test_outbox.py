"""Files that cannot be written are tried again, told of, and hold nobody up."""

import threading
import time

import pytest

from treerpo_ray import outbox
from treerpo_ray.outbox import Outbox


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    monkeypatch.setattr(outbox, "RETRY_S", 0.01)
    monkeypatch.setattr(outbox, "CLOSE_S", 0.3)
    return []


def make(told: list[tuple[str, str]]) -> Outbox:
    return Outbox(lambda name, reason: told.append((name, reason)))


def test_files_are_written_in_order_and_before_it_is_closed(told) -> None:
    written: list[int] = []
    box = make(told)
    for number in range(6):
        box.put(str(number), lambda number=number: written.append(number))
    box.close()
    assert written == [0, 1, 2, 3, 4, 5]
    assert told == []


def test_a_file_that_fails_is_told_once_and_tried_until_it_is_written(told) -> None:
    attempts: list[str] = []
    is_written = threading.Event()

    def write() -> None:
        attempts.append("")
        if len(attempts) < 5:
            raise ConnectionError("the store is gone")
        is_written.set()

    box = make(told)
    box.put("a", write)
    assert is_written.wait(10)
    box.close()
    assert told == [("a", "ConnectionError: the store is gone")]


def test_a_store_that_hangs_holds_nobody_up_and_what_is_left_out_is_told(told) -> None:
    hold, is_writing = threading.Event(), threading.Event()

    def write() -> None:
        is_writing.set()
        assert hold.wait(30)

    box = make(told)
    start = time.monotonic()
    box.put("first", write)
    assert is_writing.wait(10)
    for number in range(outbox.MAX_WAITING + 1):
        box.put(str(number), lambda: None)
    box.close()
    assert time.monotonic() - start < 5
    hold.set()
    assert told == [
        (str(outbox.MAX_WAITING), f"left out: {outbox.MAX_WAITING} files before it still wait"),
        ("the last files", "left out: not written within 0.3 s"),
    ]


def test_a_store_that_stays_gone_does_not_delay_the_end(told) -> None:
    def write() -> None:
        raise ConnectionError("gone")

    box = make(told)
    for name in "abc":
        box.put(name, write)
    start = time.monotonic()
    box.close()
    assert time.monotonic() - start < 5
    assert [name for name, _ in told] == ["a", "b", "c"]
