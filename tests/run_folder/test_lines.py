"""Sinks that are full, slow or gone delay nothing and lose nothing."""

import errno
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.lines import AppendLog, LogTimes

ROWS, EVENTS = "metrics.jsonl", "events.jsonl"

PATIENCE_S = 600.0
"""Far more than anything takes that is waited for."""


class WeakStore(MemoryFileSystem):
    """An object store that `is_gone`, or answers only while `hold` is set."""

    protocol = "weak"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    is_gone = False
    hold = threading.Event()

    def pipe_file(self, path: str, value: bytes, **options: object) -> None:
        assert WeakStore.hold.wait(60)
        if WeakStore.is_gone:
            raise ConnectionError("the store is gone")
        super().pipe_file(path, value)


class Log(AppendLog):
    """An append log that notes what it told, in its events too, as a run's log does.

    The disk takes lines while `is_up` is set, and half of each line while `is_full`.
    """

    def __init__(self, root: str | Path, **times: float) -> None:
        self.folder = RunFolder(f"{root}/run")
        self.told: list[tuple[str, str]] = []
        self.is_up, self.is_full = threading.Event(), False
        self.is_up.set()
        given = {"retry": 0.01, "patience": 900.0, "upload_every": 0.01} | times
        super().__init__(
            folder=self.folder, names=(ROWS, EVENTS), warn=self._note, times=LogTimes(**given)
        )

    def _note(self, kind: str, reason: str) -> None:
        self.told.append((kind, reason))
        self.append(EVENTS, {"kind": kind})

    def _write(self, name: str, line: bytes) -> None:
        assert self.is_up.wait(60)
        if self.is_full:
            size = self._sizes.get(name, 0)
            super()._write(name, line[: len(line) // 2])
            self._sizes[name] = size
            raise OSError(errno.ENOSPC, "No space left on device")
        super()._write(name, line)

    def row(self, step: int) -> None:
        self.append(ROWS, {"step": step})
        self.settle()

    def wait_for(self, kind: str) -> str:
        """Wait until it has told that; returns the reason."""
        end = time.monotonic() + PATIENCE_S
        while not (reasons := [why for told, why in self.told if told == kind]):
            assert time.monotonic() < end, f"no {kind} in {self.told}"
            time.sleep(0.01)
        return reasons[0]

    @property
    def steps(self) -> list[object]:
        """Of the rows that are in the run folder."""
        return [line["step"] for line in self.folder.read_lines(ROWS)]


@pytest.fixture
def weak() -> Iterator[str]:
    """Root of runs on a weak store that works."""
    fsspec.register_implementation("weak", WeakStore, clobber=True)
    WeakStore.store.clear()
    WeakStore.is_gone = False
    WeakStore.hold.set()
    yield "weak://bucket"
    WeakStore.hold.set()


def rows_in(folder: Path) -> int:
    return len((folder / ROWS).read_text().splitlines())


def test_a_full_disk_delays_no_step_and_gets_every_line_once_there_is_space(tmp_path) -> None:
    log = Log(tmp_path)
    log.is_full = True
    for step in range(50):
        log.row(step)  # waits for the first line until it fails, and for no other
        log.append(EVENTS, {"kind": "consumed"})
    [(kind, reason)] = log.told
    assert kind == "log_delayed" and " is full: " in reason and " lines (" in reason
    log.is_full = False
    log.wait_for("log_caught_up")
    log.row(50)
    log.close()
    assert log.steps == [*range(51)]
    kinds = [event["kind"] for event in log.folder.read_lines(EVENTS)]
    assert kinds.count("consumed") == 50
    assert [kind for kind in kinds if kind != "consumed"] == ["log_delayed", "log_caught_up"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full_is_no_error_of_the_step(tmp_path) -> None:
    log = Log(tmp_path)
    (tmp_path / "run" / ROWS).symlink_to("/dev/full")
    log.row(1)
    log.wait_for("log_delayed")
    with pytest.raises(OSError, match="did not take the last lines; they are in") as caught:
        log.close()
    rest = Path(str(caught.value).rpartition(" ")[2])
    assert '"step": 1' in (rest / ROWS).read_text()


def test_a_disk_that_hangs_is_waited_for_once_and_the_rest_is_kept(tmp_path) -> None:
    log = Log(tmp_path, patience=0.2, disk_close=0.1)
    log.is_up.clear()
    for step in range(500):
        log.row(step)
    assert log.told == [("log_delayed", "the disk does not answer")]  # each wait would tell
    with pytest.raises(OSError, match="they are in") as caught:
        log.close()
    log.is_up.set()
    assert rows_in(Path(str(caught.value).rpartition(" ")[2])) == 500


def test_a_store_gets_the_files_while_the_run_goes_on_and_whole_at_the_end(weak) -> None:
    log = Log(weak)
    log.row(1)
    end = time.monotonic() + PATIENCE_S
    while log.steps != [1]:
        assert time.monotonic() < end
        time.sleep(0.01)
    (log.path / "wandb").mkdir()
    (log.path / "wandb/rows").write_text("1")
    log.close()
    assert log.folder.exists("wandb/rows") and not log.path.exists()
    more = Log(weak)
    more.row(2)
    more.close()
    assert more.steps == [1, 2] and more.told == []


def test_a_store_that_is_gone_for_a_while_delays_nothing_and_gets_everything(weak) -> None:
    log = Log(weak)
    WeakStore.is_gone = True
    log.row(1)
    assert "the store is gone" in log.wait_for("upload_delayed")
    log.row(2)
    WeakStore.is_gone = False
    log.wait_for("upload_caught_up")
    log.row(3)
    log.close()
    assert log.steps == [1, 2, 3]
    assert not log.path.exists()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_store_that_is_gone_or_hangs_at_the_end_is_told_with_where_the_files_are(
    weak, is_gone: bool
) -> None:
    log = Log(weak, store_close=900.0 if is_gone else 0.3)
    WeakStore.is_gone = is_gone
    if not is_gone:
        WeakStore.hold.clear()
    for step in range(20):
        log.row(step)
    told = "the store is gone" if is_gone else r"not written within 0\.3 s"
    with pytest.raises(OSError, match=told) as caught:
        log.close()
    assert str(log.path) in str(caught.value)
    assert rows_in(log.path) == 20


def test_what_a_store_tells_of_itself_at_the_end_is_on_disk_as_well(weak) -> None:
    log = Log(weak)
    WeakStore.hold.clear()
    log.row(1)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(log.close)
        time.sleep(0.1)  # all that the disk had to take is taken
        WeakStore.is_gone = True
        WeakStore.hold.set()
        with pytest.raises(OSError, match=r"the store is gone.* the files are in"):
            closing.result()
    told = [json.loads(line)["kind"] for line in (log.path / EVENTS).read_text().splitlines()]
    assert told == [kind for kind, _ in log.told] == ["upload_delayed"] * 2


@pytest.mark.parametrize("place", ["disk", "store"])
def test_it_is_known_which_lines_are_in_the_run_folder(weak, tmp_path, place: str) -> None:
    log = Log(tmp_path if place == "disk" else weak)
    WeakStore.is_gone = True
    log.row(1)
    log.append(EVENTS, {"kind": "consumed"})
    taken, kept = log.num_lines()
    if place == "store":
        assert kept == 0
        log.wait_for("upload_delayed")
        WeakStore.is_gone = False
    end = time.monotonic() + PATIENCE_S
    while log.num_lines()[1] < taken:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert log.steps == [1]
    assert "consumed" in [event["kind"] for event in log.folder.read_lines(EVENTS)]
    log.close()
