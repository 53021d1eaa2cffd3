"""Files that cannot be written are tried again, told of, and hold nobody up."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from treerpo_ray import evaluate, outbox
from treerpo_ray.config_file import load
from treerpo_ray.evaluate import Evaluation
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


EVALUATION = Evaluation(
    step=3, version=2, data="held.jsonl", num_problems=1, num_samples=1, temperature=0.6,
    pass_at_1=0.5, ci95_low=0.4, ci95_high=0.6, pass_at_k=0.5, length=2.0, cut_off_share=0.0,
    errored_share=0.0, num_sampled_tokens=4, seconds=0.1,
)  # fmt: skip


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Evaluates without Ray; what it returns has `result`, `rows` and `events`."""
    monkeypatch.setattr(evaluate, "grade_samples", lambda *arguments: [])
    monkeypatch.setattr(evaluate, "summarise", lambda *arguments, **named: EVALUATION)
    monkeypatch.setattr(evaluate.ray, "get", lambda value: value)
    config = load([f"run.root={tmp_path}", "run.name=run"])

    def run(own: Outbox | None = None) -> SimpleNamespace:
        found = SimpleNamespace(rows=[], events=[])
        run_log = SimpleNamespace(
            step=SimpleNamespace(remote=found.rows.append),
            event=SimpleNamespace(remote=found.events.append),
        )
        found.result = evaluate.evaluate(
            config, None, None, run_log, None, step=3, version=2, advance=print, outbox=own
        )
        return found

    return run


def test_an_evaluation_that_cannot_be_written_is_told_and_its_result_is_not_lost(
    evaluated, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/eval").touch()  # so that nothing can be written there
    found = evaluated()
    assert found.result == EVALUATION and found.rows == [EVALUATION.row()]
    assert [event.kind for event in found.events] == ["write_failed"] * 2
    assert [event.fields["what"] for event in found.events] == [
        "eval/step=000003.parquet", "eval/step=000003.json",
    ]  # fmt: skip
    (tmp_path / "run/eval").unlink()
    assert evaluated().events == []
    assert evaluate.read(str(tmp_path / "run"), 3) == EVALUATION


@pytest.mark.parametrize("has_outbox", [True, False])
def test_an_evaluation_does_not_wait_for_a_store_that_hangs(
    evaluated, told, has_outbox: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hold, save = threading.Event(), evaluate.save
    monkeypatch.setattr(evaluate, "save", lambda *arguments: hold.wait(30) and save(*arguments))
    start, box = time.monotonic(), make(told)
    assert evaluated(box if has_outbox else None).result == EVALUATION
    assert time.monotonic() - start < 5
    assert evaluate.read(str(tmp_path / "run"), 3) is None
    hold.set()
    box.close()
    assert told == []
    assert not has_outbox or evaluate.read(str(tmp_path / "run"), 3) == EVALUATION


@pytest.mark.parametrize("content", ["", '{"step": 3', "[]", "{}", '{"step": 3, "unknown": 0}'])
def test_a_torn_or_foreign_evaluation_is_passed_over(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate.save(EVALUATION, str(tmp_path))
    (tmp_path / "eval/step=000003.json").write_text(content)
    assert evaluate.read(str(tmp_path), 3) is None
    [record] = caplog.records
    assert "eval/step=000003.json cannot be read and is passed over" in record.getMessage()
