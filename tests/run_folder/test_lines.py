"""Sinks that are full, slow or gone delay nothing and lose nothing."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from treerpo_ray.config import Config
from treerpo_ray.config.sections import MetricsConfig, RunConfig
from treerpo_ray.metrics.run_log import Event, RunLog, latest_rows, read_lines
from treerpo_ray.run_folder import lines as spool

REPOSITORY = Path(__file__).parents[2]


class WeakStore(MemoryFileSystem):
    """An object store that `is_gone`, or answers only while `hold` is set."""

    protocol = "weak"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    is_gone = False
    hold = threading.Event()

    def pipe_file(self, path: str, value: bytes, **options: object) -> None:
        if WeakStore.is_gone:
            raise ConnectionError("the store is gone")
        assert WeakStore.hold.wait(30)
        super().pipe_file(path, value)


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Root of runs on a weak store that works."""
    monkeypatch.setattr(spool, "UPLOAD_EVERY_S", 0.01)
    fsspec.register_implementation("weak", WeakStore, clobber=True)
    WeakStore.store.clear()
    WeakStore.is_gone = False
    WeakStore.hold.set()
    yield "weak://bucket"
    WeakStore.hold.set()


def run_log_at(root: str | Path) -> tuple[RunLog, str]:
    config = Config(
        run=RunConfig(name="run", root=str(root)), metrics=MetricsConfig(wandb_project=None)
    )
    return RunLog(config), config.folder


def wait_for_notice(run_log: RunLog, kind: str) -> None:
    end = time.monotonic() + 20
    while kind not in [notice.kind for notice in run_log.notices_since(0)]:
        assert time.monotonic() < end, f"no {kind} in {run_log.notices_since(0)}"
        time.sleep(0.01)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make each write leave half of its line and fail, until the event is set."""
    is_free = threading.Event()
    write = spool._LineWriter._write

    def half(self: spool._LineWriter, name: str, line: bytes) -> None:
        if is_free.is_set():
            return write(self, name, line)
        size = self._sizes.get(name, 0)
        write(self, name, line[: len(line) // 2])
        self._sizes[name] = size
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool._LineWriter, "_write", half)
    monkeypatch.setattr(spool, "RETRY_S", 0.01)
    return is_free


def test_a_full_disk_delays_no_step_and_gets_every_line_once_there_is_space(tmp_path, monkeypatch):
    is_free = fill_disk(monkeypatch)
    run_log, folder = run_log_at(tmp_path)
    start = time.monotonic()
    for step in range(50):
        run_log.step({"step": step})
        run_log.event(Event(kind="consumed", fields={"step": step}))
    assert time.monotonic() - start < spool.PATIENCE_S
    [notice] = run_log.notices_since(0)
    assert notice.kind == "log_delayed" and "No space left" in notice.fields["reason"]
    assert len(run_log.rows_since(0)) == 50
    is_free.set()
    wait_for_notice(run_log, "log_caught_up")
    run_log.step({"step": 50})
    run_log.close()
    assert [row["step"] for row in latest_rows(folder)] == list(range(51))
    kinds = [event["kind"] for event in read_lines(folder, "events.jsonl")]
    assert kinds.count("consumed") == 50
    assert [kind for kind in kinds if kind != "consumed"] == ["log_delayed", "log_caught_up"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full_is_no_error_of_the_step(tmp_path):
    run_log, folder = run_log_at(tmp_path)
    (Path(folder) / "metrics.jsonl").symlink_to("/dev/full")
    run_log.step({"step": 1})
    wait_for_notice(run_log, "log_delayed")
    with pytest.raises(OSError, match="did not take the last lines; they are in") as caught:
        run_log.close()
    rest = Path(str(caught.value).rpartition(" ")[2])
    assert '"step": 1' in (rest / "metrics.jsonl").read_text()


def test_a_disk_that_hangs_is_waited_for_once_and_the_rest_is_kept(tmp_path, monkeypatch):
    hold = threading.Event()
    write = spool._LineWriter._write

    def hang(self: spool._LineWriter, name: str, line: bytes) -> None:
        assert hold.wait(30)
        write(self, name, line)

    monkeypatch.setattr(spool._LineWriter, "_write", hang)
    monkeypatch.setattr(spool, "PATIENCE_S", 0.2)
    monkeypatch.setattr(spool, "DISK_CLOSE_S", 0.1)
    run_log, _ = run_log_at(tmp_path)
    start = time.monotonic()
    for step in range(20):
        run_log.step({"step": step})
    assert time.monotonic() - start < 2.0
    assert [notice.kind for notice in run_log.notices_since(0)] == ["log_delayed"]
    with pytest.raises(OSError, match="they are in") as caught:
        run_log.close()
    hold.set()
    rest = Path(str(caught.value).rpartition(" ")[2])
    assert len((rest / "metrics.jsonl").read_text().splitlines()) == 20


def test_a_store_that_is_gone_for_a_while_delays_nothing_and_gets_everything(weak):
    run_log, folder = run_log_at(weak)
    WeakStore.is_gone = True
    run_log.step({"step": 1})
    wait_for_notice(run_log, "upload_delayed")
    run_log.step({"step": 2})
    WeakStore.is_gone = False
    wait_for_notice(run_log, "upload_caught_up")
    run_log.step({"step": 3})
    run_log.close()
    assert [row["step"] for row in latest_rows(folder)] == [1, 2, 3]
    assert not run_log._spool.path.exists()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_store_that_is_gone_or_hangs_at_the_end_is_told_with_where_the_files_are(
    weak, monkeypatch, is_gone
):
    monkeypatch.setattr(spool, "STORE_CLOSE_S", 0.5)
    run_log, _ = run_log_at(weak)
    WeakStore.is_gone = is_gone
    WeakStore.hold.clear()
    start = time.monotonic()
    for step in range(20):
        run_log.step({"step": step})
    assert time.monotonic() - start < 2.0
    with pytest.raises(OSError, match="the store is gone" if is_gone else "too slow") as caught:
        run_log.close()
    local = run_log._spool.path
    assert str(local) in str(caught.value)
    assert len((local / "metrics.jsonl").read_text().splitlines()) == 20


def test_it_is_known_which_lines_are_in_the_run_folder(weak, tmp_path):
    for root in (tmp_path, f"{weak}/lines"):
        run_log, folder = run_log_at(root)
        WeakStore.is_gone = True
        run_log.step({"step": 1})
        run_log.event(Event(kind="consumed"))
        taken, kept = run_log.num_lines()
        if root != tmp_path:
            assert kept == 0
            wait_for_notice(run_log, "upload_delayed")
            WeakStore.is_gone = False
        end = time.monotonic() + 20
        while run_log.num_lines()[1] < taken:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert len(latest_rows(folder)) == 1
        assert "consumed" in [event["kind"] for event in read_lines(folder, "events.jsonl")]
        run_log.close()


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    """In a process of its own, whose standard error is a pipe that nobody reads."""
    code = (
        "from treerpo_ray.metrics.console import Console\n"
        "console = Console(9)\n"
        "for step in range(9):\n"
        "    console.note('line ' * 20000)\n"
        "print('still here')\n"
    )
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stderr=written,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )
    os.close(written)
    assert done.stdout == "still here\n"
