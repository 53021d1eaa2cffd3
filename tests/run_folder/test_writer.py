"""What a sink cannot take is told of once, tried again or left out, and holds nobody up."""

import threading

import pytest

from treerpo_ray.run_folder.writer import BackgroundWriter, OnFailure

GONE = "ConnectionError: gone"


class Sink:
    """Takes names while `is_up` is set, fails while `is_gone`; notes what it was told."""

    def __init__(self) -> None:
        self.is_up, self.is_trying, self.is_gone = threading.Event(), threading.Event(), False
        self.is_up.set()
        self.attempts: list[str] = []
        self.written: list[str] = []
        self.told: list[tuple[str, str]] = []
        self.caught_up = threading.Event()

    def writer(self, on_failure: OnFailure = OnFailure.RETRY, **settings: float) -> "Writer":
        return Writer(self, on_failure, settings)


class Writer(BackgroundWriter):
    """Writes names into a sink."""

    def __init__(self, sink: Sink, on_failure: OnFailure, settings: dict) -> None:
        warn = lambda *told: sink.told.append(told)  # noqa: E731
        given = {"retry_s": 0.01, "close_s": 0.3, "caught_up": sink.caught_up.set} | settings
        super().__init__(warn=warn, on_failure=on_failure, **given)
        self.sink = sink

    def hand_over(self, name: str, **how: bool) -> None:
        def work() -> None:
            self.sink.attempts.append(name)
            self.sink.is_trying.set()
            assert self.sink.is_up.wait(60)
            if self.sink.is_gone:
                raise ConnectionError("gone")
            self.sink.written.append(name)

        self.put(name, work, **how)


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.mark.parametrize("on_failure", OnFailure)
def test_all_is_written_in_order_and_before_it_is_closed(sink: Sink, on_failure) -> None:
    writer = sink.writer(on_failure)
    for name in "abcdef":
        writer.hand_over(name)
    assert writer.close() is None
    assert sink.written == [*"abcdef"] and sink.told == []


def test_what_fails_is_told_once_and_tried_until_it_is_written(sink: Sink) -> None:
    sink.is_gone = True
    writer = sink.writer()
    writer.hand_over("a")
    writer.hand_over("b")
    while len(sink.attempts) < 5:
        assert not sink.caught_up.wait(0.01)
    sink.is_gone = False
    assert sink.caught_up.wait(60)
    assert writer.close() is None
    assert {*sink.attempts[:5]} == {"a"} and sink.written == ["a", "b"]
    assert sink.told == [("a", GONE)]


def test_a_sink_that_hangs_holds_nobody_up_and_what_is_left_out_is_told(sink: Sink) -> None:
    sink.is_up.clear()
    writer = sink.writer(max_waiting=2)
    writer.hand_over("first")
    assert sink.is_trying.wait(60)
    for name in "abc":
        writer.hand_over(name)
    fault = writer.close()
    sink.is_up.set()
    assert fault == "left out: not written within 0.3 s"
    assert sink.told == [("c", "left out: 2 before it still wait"), ("first, a, b", fault)]


def test_a_sink_that_stays_gone_does_not_delay_the_end_and_each_is_told(sink: Sink) -> None:
    sink.is_gone = True
    writer = sink.writer(retry_s=900.0, close_s=900.0)
    for name in "abc":
        writer.hand_over(name)
    assert writer.close() == GONE
    assert sink.told == [("a", GONE), ("b", GONE), ("c", GONE)]


def test_at_the_end_what_failed_has_one_more_attempt_and_the_last_comes_last(sink: Sink) -> None:
    sink.is_gone = True
    writer = sink.writer(retry_s=900.0, pause_s=900.0)
    writer.hand_over("a")
    writer.hand_over("b")
    while not sink.told:
        assert not sink.caught_up.wait(0.01)
    sink.is_gone = False
    assert writer.close(lambda: sink.written.append("last")) is None
    assert sink.written == ["a", "b", "last"] and sink.told == [("a", GONE)]


def test_what_is_handed_over_after_the_end_is_neither_written_nor_told(sink: Sink) -> None:
    writer = sink.writer()
    writer.hand_over("a")
    assert writer.close() is None
    writer.hand_over("b")
    assert writer.settle(60) and writer.close() is None
    assert sink.attempts == ["a"] and sink.told == []


def test_where_a_failure_is_left_out_the_next_one_is_written(sink: Sink) -> None:
    sink.is_gone = True
    writer = sink.writer(OnFailure.DROP)
    writer.hand_over("a")
    assert writer.settle(60)
    sink.is_gone = False
    writer.hand_over("b")
    assert writer.close() == GONE
    assert sink.attempts == ["a", "b"] and sink.written == ["b"] and sink.told == [("a", GONE)]


def test_a_sink_that_is_given_up_gets_nothing_more_and_is_told_of_once(sink: Sink) -> None:
    sink.is_gone = True
    writer = sink.writer(OnFailure.STOP)
    for name in "abc":
        writer.hand_over(name)
    assert writer.settle(60)
    writer.hand_over("d")
    assert writer.close(lambda: sink.written.append("last")) == GONE
    assert sink.attempts == ["a"] and sink.written == [] and sink.told == [("a", GONE)]


def test_a_sink_that_was_given_up_for_being_slow_is_not_waited_for_at_the_end(sink: Sink) -> None:
    sink.is_up.clear()
    writer = sink.writer(OnFailure.STOP, max_waiting=1, close_s=900.0)
    writer.hand_over("a")
    assert sink.is_trying.wait(60)
    for name in "bcd":
        writer.hand_over(name)
    assert writer.close() == "left out: 1 before it still wait"
    sink.is_up.set()
    assert [name for name, _ in sink.told] == ["c"]


def test_what_waits_already_is_not_handed_over_twice(sink: Sink) -> None:
    sink.is_up.clear()
    writer = sink.writer()
    writer.hand_over("a", unless_waiting=True)
    assert sink.is_trying.wait(60)
    for _ in range(20):
        writer.hand_over("a", unless_waiting=True)  # once more after the one that is begun
    sink.is_up.set()
    assert writer.settle(60)
    assert sink.written == ["a", "a"] and sink.told == []


def test_a_late_sink_is_waited_for_once_and_told_when_it_has_caught_up(sink: Sink) -> None:
    sink.is_up.clear()
    writer, late = sink.writer(), []
    writer.hand_over("a")
    assert not writer.settle(0.1, late.append)
    for _ in range(20):
        assert not writer.settle(900.0, late.append)
    assert late == ["a"] and not sink.caught_up.is_set()
    sink.is_up.set()
    assert sink.caught_up.wait(60)
    assert writer.settle() and writer.settle(0.0)
    assert sink.told == []


def test_a_sink_that_fails_at_the_end_is_told_once_though_telling_writes_to_it() -> None:
    told: list[str] = []

    def refuse() -> None:
        raise OSError("the disk is full")

    def warn(name: str, reason: str) -> None:
        told.append(reason)
        writer.put("the warning", refuse)

    is_held = threading.Event()
    writer = BackgroundWriter(warn=warn)
    writer.put("first", is_held.wait)
    writer.put("second", refuse)
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    while not writer._is_closing:
        threading.Event().wait(0.01)
    is_held.set()
    closing.join(60)
    assert told == ["OSError: the disk is full"]
    writer._thread.join(60)
    assert not writer._thread.is_alive()
