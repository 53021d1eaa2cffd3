"""What a disk or store refuses is told apart from other faults, waited for and told in one line."""

import errno
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.support.saved_runs.small_disk import small_disk
from treerpo_ray.run_folder.disk import Refusal, disk_of, explain, free_bytes, refusal_of, size
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.patience import DiskRefused, Patience, PatienceTimes
from treerpo_ray.run_folder.writer import BackgroundWriter

FULL, AWAY = Refusal.FULL, Refusal.AWAY


def chained(error: Exception, behind: Exception) -> Exception:
    error.__context__ = behind
    return error


def of_the_system(number: int) -> OSError:
    return OSError(number, errno.errorcode[number])


@pytest.mark.parametrize(
    ("error", "local", "remote"),
    [
        *((of_the_system(number), FULL, FULL) for number in (errno.ENOSPC, errno.EDQUOT)),
        *(
            (of_the_system(number), AWAY, AWAY)
            for number in (errno.EROFS, errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT)
        ),
        (chained(RuntimeError("unexpected pos 64"), of_the_system(errno.ENOSPC)), FULL, FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL, FULL),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), AWAY, AWAY),
        (ConnectionError("gone"), AWAY, AWAY),
        (TimeoutError("no answer"), AWAY, AWAY),
        (OSError("3 of the 4 bytes of state arrived"), AWAY, AWAY),
        (RuntimeError("HTTP 503: slow down"), None, AWAY),
        (ray.exceptions.OutOfDiskError(), FULL, FULL),
        # Mistakes of the layout or of our own, and what other processes say, are not waited for.
        (of_the_system(errno.ENOTDIR), None, AWAY),
        (TypeError("no such argument"), None, None),
        (ValueError("two rows"), None, AWAY),
        (ray.exceptions.GetTimeoutError("late"), None, None),
        (ray.exceptions.RayActorError(), None, None),
    ],
)
def test_what_may_be_mended_is_waited_for(error, local, remote) -> None:
    assert refusal_of(error) is local
    assert refusal_of(error, is_local=False) is remote


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (10_500_000, "10.5 MB"), (4e15, "4e+03 TB")],
)
def test_sizes_are_told_in_three_digits(count: float, told: str) -> None:
    assert size(count) == told


def test_a_quota_is_told_with_its_disk(tmp_path: Path) -> None:
    told = explain(of_the_system(errno.EDQUOT), tmp_path / "not/there", 10_500_000)
    assert told.startswith(f"the quota on the disk {disk_of(tmp_path)} of {tmp_path}/not/there is")
    assert "10.5 MB needed" in told and told.endswith("free but for the quota")


class Waiting:
    """Writes to a folder with patience, and notes what it is told."""

    def __init__(self, folder: Path, **times: float) -> None:
        self.told, self.written, self.moves = [], [], []
        self.is_told_to_stop = threading.Event()
        self.patience = Patience(
            folder=RunFolder(str(folder)),
            waits=lambda *told: self.told.append(told),
            written=lambda what, seconds: self.written.append(what),
            is_told_to_stop=self.is_told_to_stop.is_set,
            moves=self.moves.append,
            times=PatienceTimes(**{"retry": 0.02, "look": 0.01} | times),
        )

    def once_told(self, work: Callable[[], object]) -> threading.Thread:
        """Do `work` once somebody was told that something waits."""

        def wait() -> None:
            while not self.told:
                time.sleep(0.01)
            work()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread


TENSORS = {f"layer {number}": torch.ones(100_000) for number in range(6)}


def save_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(TENSORS, file)


@pytest.mark.parametrize(
    "write",
    [
        save_torch,
        lambda path: save_file(TENSORS, path),
        lambda path: pq.write_table(pa.table({"x": np.random.rand(300_000)}), path),
        lambda path: path.write_text(json.dumps(["x" * 100] * 24_000)),
        lambda path: RunFolder(str(path.parent)).publish_file(path.name, b"0" * 2_400_000),
    ],
    ids=["torch", "safetensors", "parquet", "json", "publish"],
)
def test_all_that_a_run_writes_with_waits_for_a_disk_that_is_full(write, tmp_path: Path) -> None:
    with small_disk(tmp_path, megabytes=4) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * 3_000_000)
        waiting = Waiting(disk)
        thread = waiting.once_told(ballast.unlink)
        waiting.patience.until_written("thing", lambda: write(disk / "thing"))
        thread.join()
        [(what, why)] = waiting.told
        assert what == "thing" and why.startswith(f"the disk {disk} of {disk} is full: ")
        assert waiting.written == ["thing"]
        assert (
            waiting.moves[0].startswith("waiting since ") and "write the thing" in waiting.moves[0]
        )
        assert (disk / "thing").stat().st_size > 2_000_000


def test_what_needs_more_room_than_there_is_is_not_begun(tmp_path: Path) -> None:
    waiting, needed = Waiting(tmp_path), 10**15
    waiting.once_told(waiting.is_told_to_stop.set)
    with pytest.raises(DiskRefused, match=r"the run was stopped: the disk .* is full: 1e\+03"):
        waiting.patience.until_written("thing", (tmp_path / "begun").touch, needed)
    assert not (tmp_path / "begun").exists()
    assert free_bytes(tmp_path) < needed


@pytest.mark.parametrize("tell", [0.0, 900.0])
def test_a_disk_that_is_broken_is_waited_for_so_long_and_told_now_and_then(
    tmp_path: Path, tell: float
) -> None:
    def fail() -> None:
        raise of_the_system(errno.EIO)

    waiting = Waiting(tmp_path, away=0.3, tell=tell)
    with pytest.raises(DiskRefused, match=r"^the thing is not written, after 0 s .*EIO") as caught:
        waiting.patience.until_written("thing", fail)
    assert "\n" not in str(caught.value)
    assert len(waiting.told) == (1 if tell else len(waiting.moves))
    assert len(waiting.moves) > 1 and waiting.written == []


def test_what_has_another_cause_is_raised_at_once(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    with pytest.raises(ZeroDivisionError):
        waiting.patience.until_written("thing", lambda: 1 // 0)
    assert waiting.told == []


def test_trees_wait_for_a_full_disk_and_none_is_left_out(tmp_path: Path) -> None:
    """More of them than may wait, as a train worker hands them over."""
    waiting, left_out = Waiting(tmp_path), []
    disk: dict[str, int | None] = {"room": None}
    written = []

    def write(number: int) -> None:
        if disk["room"] is None:
            raise of_the_system(errno.ENOSPC)
        written.append(number)

    writer = BackgroundWriter(
        warn=lambda *told: left_out.append(told), max_waiting=2, retry_s=0.01, place=tmp_path
    )
    waiting.once_told(lambda: disk.update(room=1))
    for number in range(9):
        waiting.patience.until_written(f"trees {number}", writer.make_room)
        writer.put(f"trees {number}", lambda number=number: write(number))
        while not left_out:  # the disk says soon that it is full
            time.sleep(0.01)
    waiting.patience.until_written("trees", lambda: writer.flush(60))
    assert written == [*range(9)]
    assert all("left out" not in why for _, why in left_out)
    [(_, why)] = left_out
    assert why.startswith(f"the disk {disk_of(tmp_path)} of {tmp_path} is full: ")
