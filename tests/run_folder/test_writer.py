"""Files and checkpoints that cannot be written are told of, tried again, and hold nobody up."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from treerpo_ray.config import load
from treerpo_ray.evaluate import evaluation as evaluate
from treerpo_ray.evaluate.evaluation import Evaluation
from treerpo_ray.run_folder import checkpoints
from treerpo_ray.run_folder import writer as outbox
from treerpo_ray.run_folder.checkpoints import Checkpoints, Saver
from treerpo_ray.run_folder.writer import Outbox


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


class Store(Checkpoints):
    """Takes a checkpoint only while `is_up` is set; `error` is what it says to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), keep=2)
        self.is_up, self.error = threading.Event(), None
        self.is_up.set()

    def place(self, step: int, staging: Path) -> None:
        assert self.is_up.wait(30)
        if self.error is not None:
            raise self.error
        super().place(step, staging)


class Saving:
    """A saver of each second step and what it told; `save` does as the learner after a step."""

    def __init__(self, folder: Path, told: list[tuple[str, str]]) -> None:
        self.store, self.told, self.placed = Store(folder), told, []
        self.is_settled = True
        self.saver = Saver(self.store, 2, 0, lambda *failed: told.append(failed))

    def save(self, step: int, *, is_last: bool = False) -> bool:
        """Save if it is time to; returns whether it was."""
        if not is_last and not self.saver.is_due(step):
            return False

        def write(target: Path) -> None:
            (target / "state").write_text(f"{step}")

        placed = lambda: self.placed.append(step)  # noqa: E731
        self.saver.save(step, write, lambda: self.is_settled, placed, is_last=is_last)
        return True

    def wait(self) -> None:
        self.saver._thread.join(60)


@pytest.fixture
def saving(tmp_path: Path, told, monkeypatch: pytest.MonkeyPatch) -> Saving:
    monkeypatch.setattr(checkpoints, "POLL_S", 0.01)
    return Saving(tmp_path, told)


def test_a_checkpoint_is_saved_each_time_it_is_due_and_at_the_end(saving: Saving) -> None:
    assert [saving.save(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    saving.save(5, is_last=True)
    assert saving.placed == [2, 4, 5]
    assert saving.store.steps() == [4, 5]
    assert saving.told == []


def test_a_store_that_hangs_is_waited_for_once_and_the_checkpoint_tried_at_each_step(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PLACE_S", 0.3)
    saving.store.is_up.clear()
    start = time.monotonic()
    assert [saving.save(step) for step in range(2, 40)] == [True, False, *[True] * 36]
    assert time.monotonic() - start < 5
    left_out = "left out: checkpoint of step 2 is not in its place within 0.3 s"
    assert saving.told == [("checkpoint of step 4", left_out)]
    assert saving.store.steps() == []
    saving.store.is_up.set()
    saving.wait()
    assert saving.placed == [2]
    saving.save(40)
    saving.wait()
    assert saving.placed == [2, 40]


def test_a_checkpoint_that_fails_is_told_and_tried_at_the_next_step(saving: Saving) -> None:
    saving.store.error = ConnectionError("the store is gone")
    for step in (2, 3):
        assert saving.save(step)
        saving.wait()
    saving.store.error = None
    assert saving.save(4) and not saving.save(5)
    saving.wait()
    gone = "ConnectionError: the store is gone"
    assert saving.told == [("checkpoint of step 2", gone), ("checkpoint of step 3", gone)]
    assert saving.store.steps() == saving.placed == [4]


def test_the_last_checkpoint_is_waited_for_and_raises(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PLACE_S", 0.1)
    saving.store.is_up.clear()
    saving.save(2)
    threading.Timer(0.5, saving.store.is_up.set).start()
    saving.save(3, is_last=True)
    assert saving.placed == [2, 3]
    saving.store.error = ConnectionError("the store is gone")
    with pytest.raises(ConnectionError, match="gone"):
        saving.save(4, is_last=True)


def test_what_comes_before_a_checkpoint_is_waited_for_but_not_for_ever(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving.is_settled = False
    saving.save(2)
    assert saving.placed == []
    saving.is_settled = True
    saving.wait()
    assert saving.placed == [2] and saving.told == []
    monkeypatch.setattr(checkpoints, "SETTLE_S", 0.3)
    saving.is_settled = False
    saving.save(4, is_last=True)
    assert saving.placed == [2, 4]
    late = "not in the run folder within 0.3 s"
    assert saving.told == [("what comes before the checkpoint of step 4", late)]


def test_a_disk_that_is_slow_while_training_waits_is_told(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SLOW_S", 0.1)
    monkeypatch.setattr(
        saving.store,
        "stage",
        lambda write: time.sleep(0.5) or Checkpoints.stage(saving.store, write),
    )
    saving.save(2, is_last=True)
    assert saving.told == [("checkpoint of step 2", "the disk has not taken it within 0.1 s")]
    assert saving.store.steps() == [2]
