"""Checkpoints are whole or passed over; what cannot be placed is told and holds nobody up."""

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

from tests.support.saved_runs.run_folders import LossyStore, contents, files, full_disk
from tests.support.saved_runs.small_disk import small_disk
from treerpo_ray.run_folder.checkpoints import (
    LIST_FILE,
    CheckpointContents,
    Checkpoints,
    CheckpointSaver,
    SaveTimes,
)
from treerpo_ray.run_folder.disk import free_bytes
from treerpo_ray.run_folder.files import RunFolder, Write
from treerpo_ray.run_folder.patience import DiskRefused, Patience, PatienceTimes


def read_newest(checkpoints: Checkpoints) -> tuple[int, str, bytes] | None:
    with checkpoints.newest() as found:
        if found is None:
            return None
        step, local = found
        shard = (local / "model/shards/0.safetensors").read_bytes()
        return step, (local / "state.pt").read_text(), shard


def spoil(folder: str, name: str, content: bytes | None) -> None:
    """Overwrite a file of the run folder, or remove it."""
    fs, root = fsspec.core.url_to_fs(folder)
    if content is None:
        fs.rm(f"{root}/{name}")
    else:
        fs.pipe_file(f"{root}/{name}", content)


def test_there_is_no_checkpoint_in_a_folder_that_is_not_there(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    assert checkpoints.steps() == []
    assert read_newest(checkpoints) is None


def test_the_newest_checkpoint_comes_back_as_it_was_written(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    checkpoints.save(9, contents("a"))
    checkpoints.save(10, contents("b"))
    assert read_newest(checkpoints) == (10, "state b", b"b" * 1000)
    assert read_newest(Checkpoints(RunFolder(folder), keep=2)) == (10, "state b", b"b" * 1000)


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_old_one(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    checkpoints.save(3, contents("a"))
    checkpoints.save(3, contents("b"))
    assert checkpoints.steps() == [3]
    assert read_newest(checkpoints) == (3, "state b", b"b" * 1000)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_are_kept(folder: str, keep: int) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep)
    for step in (1, 20, 300, 1_000_000):
        checkpoints.save(step, contents("x"))
    kept = [1, 20, 300, 1_000_000][-keep:]
    assert checkpoints.steps() == kept
    assert len(files(folder)) == 3 * len(kept)


def test_a_full_disk_is_raised_and_leaves_what_was_there_and_no_debris(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=1)
    checkpoints.save(1, contents("a"))
    before = files(folder)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(2, full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(1, full_disk)
    assert files(folder) == before
    assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)


def test_a_failed_write_leaves_no_empty_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        Checkpoints(RunFolder(str(tmp_path)), keep=1).save(1, full_disk)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=2)
    checkpoints.save(1, contents("a"))
    left = tmp_path / "checkpoints/.writing-killed"
    left.mkdir()
    (left / "state.pt").write_text("half")
    assert checkpoints.steps() == [1]
    checkpoints.save(2, contents("b"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step=000001", "step=000002"]


def corrupting(fsync: Callable[[int], None], name: str) -> Callable[[int], None]:
    """What a disk does that syncs, but holds something else in the file `name`."""

    def sync(opened: int) -> None:
        fsync(opened)
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        if path.name == name and path.parent.name.startswith(".writing-"):
            path.write_bytes(b"something else")

    return sync


def test_what_the_disk_does_not_hold_as_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=1)
    checkpoints.save(1, contents("a"))
    before = files(str(tmp_path))
    monkeypatch.setattr(os, "fsync", corrupting(os.fsync, "state.pt"))
    with pytest.raises(OSError, match=r"state\.pt is corrupt"):
        checkpoints.save(2, contents("b"))
    assert files(str(tmp_path)) == before


def test_a_checkpoint_is_on_the_disk_with_what_tells_of_it_before_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def sync(opened: int) -> None:
        fsync(opened)
        synced.append(Path(os.readlink(f"/proc/self/fd/{opened}")).name)

    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(os, "fsync", sync)
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=1)
    staging = checkpoints.stage(contents("a"))
    names = {"state.pt", "0.safetensors", LIST_FILE, "model", "shards", staging.name}
    monkeypatch.setattr(
        Path, "rename", lambda *places: synced.append("renamed") or os.rename(*places)
    )
    checkpoints.place(1, staging)
    assert set(synced[:-2]) == {*names, "metrics.jsonl"}
    assert synced[-2:] == ["renamed", "checkpoints"]


@pytest.mark.parametrize("name", ["state.pt", LIST_FILE])
def test_a_store_that_did_not_get_all_is_no_reason_to_remove_older_checkpoints(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    LossyStore.register()
    checkpoints = Checkpoints(RunFolder("lossy://bucket/run"), keep=1)
    checkpoints.save(1, contents("a"))
    monkeypatch.setattr(LossyStore, "torn", name)
    with pytest.raises(OSError, match=f"bytes of {name} arrived"):
        checkpoints.save(2, contents("b"))
    assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("state.pt", None, "state.pt is missing"),
        ("model/shards/0.safetensors", None, "model/shards/0.safetensors is missing"),
        ("state.pt", b"state c", "state.pt is corrupt"),
        ("state.pt", b"", "state.pt is corrupt"),
        (LIST_FILE, b'{"state', f"{LIST_FILE} cannot be read"),
        (LIST_FILE, b"\0\0\0", f"{LIST_FILE} cannot be read"),
    ],
)
def test_a_torn_or_corrupt_checkpoint_is_passed_over_with_a_warning(
    folder: str,
    name: str,
    content: bytes | None,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    checkpoints.save(1, contents("a"))
    checkpoints.save(2, contents("b"))
    spoil(folder, f"checkpoints/step=000002/{name}", content)
    with caplog.at_level(logging.WARNING):
        assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)
    [record] = caplog.records
    assert f"checkpoint of step 2 is passed over: {told}" in record.getMessage()


def test_a_checkpoint_without_its_list_was_never_finished_and_is_not_one(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    checkpoints.save(1, contents("a"))
    checkpoints.save(2, contents("b"))
    spoil(folder, f"checkpoints/step=000002/{LIST_FILE}", None)
    assert checkpoints.steps() == [1]
    assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)
    checkpoints.save(2, contents("c"))
    assert read_newest(checkpoints) == (2, "state c", b"c" * 1000)


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_begin_anew(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    for step in (1, 2):
        checkpoints.save(step, contents("a"))
        spoil(folder, f"checkpoints/step={step:06d}/state.pt", b"")
    told = r"all 2 checkpoints in .* are unreadable: step 1: state\.pt is corrupt; step 2"
    with pytest.raises(RuntimeError, match=told) as caught:
        read_newest(checkpoints)
    assert "\n" not in str(caught.value)
    assert checkpoints.steps() == [1, 2]


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=2)
    checkpoints.save(1, contents("a"))
    fs, _ = fsspec.core.url_to_fs(folder)
    for unlisted in ("checkpoints", "step=000001"):

        def failing(path: str, unlisted: str = unlisted, **options: object) -> object:
            if path.endswith(unlisted):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return type(fs).ls(fs, path, **options)

        monkeypatch.setattr(fs, "ls", failing)
        with pytest.raises(PermissionError):
            read_newest(checkpoints)
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["state.pt", LIST_FILE])
def test_a_checkpoint_that_the_disk_does_not_give_back_is_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=2)
    checkpoints.save(1, contents("a"))
    checkpoints.save(2, contents("b"))
    unreadable = tmp_path / "checkpoints/step=000002" / name
    open_file = Path.open

    def failing(path: Path, *how: object, **options: object) -> object:
        if path == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, *how, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)
    assert "Input/output error" in checkpoints.passed_over[2]


def test_the_list_of_a_checkpoint_names_all_its_files(folder: str) -> None:
    Checkpoints(RunFolder(folder), keep=1).save(1, contents("a"))
    listed = json.loads(files(folder)[f"/checkpoints/step=000001/{LIST_FILE}"])
    assert sorted(listed) == ["model/shards/0.safetensors", "state.pt"]


def test_a_later_checkpoint_that_was_passed_over_does_not_push_out_a_new_one(folder: str) -> None:
    checkpoints = Checkpoints(RunFolder(folder), keep=1)
    checkpoints.save(40, contents("forty"))
    checkpoints.save(25, contents("twenty-five"))
    assert checkpoints.steps() == [25]


class Store(Checkpoints):
    """Takes a checkpoint only while `is_up` is set; `error` is what it says to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(RunFolder(str(folder)), keep=2)
        self.is_up, self.error = threading.Event(), None
        self.is_up.set()

    def place(self, step: int, staging: Path) -> None:
        assert self.is_up.wait(30)
        if self.error is not None:
            raise self.error
        super().place(step, staging)


class Saving:
    """A saver of each second step and what it told; `save` does as the learner after a step."""

    def __init__(self, folder: Path, **times: float) -> None:
        self.store, self.told, self.placed = Store(folder), [], []
        self.waited, self.written = [], []
        self.is_settled, self.is_told_to_stop = True, False
        self.saver = CheckpointSaver(
            self.store,
            every=2,
            step=0,
            warn=lambda *told: self.told.append(told),
            patience=Patience(
                folder=RunFolder(str(folder)),
                waits=lambda *told: self.waited.append(told),
                written=lambda what, seconds: self.written.append(what),
                is_told_to_stop=lambda: self.is_told_to_stop,
                moves=lambda what: None,
                times=PatienceTimes(retry=0.05, away=0.5, look=0.01),
            ),
            times=SaveTimes(**{"poll": 0.01} | times),
        )

    def save(self, step: int, *, is_last: bool = False) -> bool:
        """Save if it is time to; returns whether it was."""
        if not is_last and not self.saver.is_due(step):
            return False

        def write(target: Path) -> None:
            (target / "state").write_text(f"{step}")

        contents = CheckpointContents(
            write=write,
            before_place=lambda folder: None,
            is_settled=lambda: self.is_settled,
            placed=lambda: self.placed.append(step),
            num_bytes=0,
        )
        self.saver.save(step, contents, is_last=is_last)
        return True

    def wait(self) -> None:
        self.saver.settle()


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    return Saving(tmp_path)


def test_a_checkpoint_is_saved_each_time_it_is_due_and_at_the_end(saving: Saving) -> None:
    assert [saving.save(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    saving.save(5, is_last=True)
    assert saving.placed == [2, 4, 5]
    assert saving.store.steps() == [4, 5]
    assert saving.told == []


def test_a_store_that_hangs_is_waited_for_once_and_the_checkpoint_tried_at_each_step(
    tmp_path: Path,
) -> None:
    saving = Saving(tmp_path, place=0.5)
    saving.store.is_up.clear()
    assert [saving.save(step) for step in range(2, 400)] == [True, False, *[True] * 396]
    left_out = "left out: checkpoint of step 2 is not in its place within 0.5 s"
    assert saving.told == [("checkpoint of step 4", left_out)]  # each wait would tell
    assert saving.store.steps() == []
    saving.store.is_up.set()
    saving.wait()
    assert saving.placed == [2]
    saving.save(400)
    saving.wait()
    assert saving.placed == [2, 400]


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


def test_a_checkpoint_that_is_late_and_then_fails_is_told_of_too(tmp_path: Path) -> None:
    saving = Saving(tmp_path, place=0.01)
    saving.store.is_up.clear()
    saving.save(2)
    saving.save(4)
    saving.store.error = ConnectionError("the store is gone")
    saving.store.is_up.set()
    saving.wait()
    assert saving.told[1:] == [("checkpoint of step 2", "ConnectionError: the store is gone")]


def test_the_last_checkpoint_waits_for_the_one_before_it_and_raises(tmp_path: Path) -> None:
    saving = Saving(tmp_path, place=0.01)
    saving.store.is_up.clear()
    saving.save(2)
    threading.Timer(0.2, saving.store.is_up.set).start()
    saving.save(3, is_last=True)
    assert saving.placed == [2, 3]
    saving.store.error = KeyError("a mistake of ours")
    with pytest.raises(KeyError, match="ours"):
        saving.save(4, is_last=True)


def test_the_last_checkpoint_waits_for_a_store_that_comes_back(saving: Saving) -> None:
    saving.store.error = ConnectionError("the store is gone")

    def come_back() -> None:
        while not saving.waited:
            time.sleep(0.01)
        saving.store.error = None

    threading.Thread(target=come_back, daemon=True).start()
    saving.save(5, is_last=True)
    assert saving.placed == [5] and saving.written == ["checkpoint of step 5"]
    [(what, why)] = saving.waited
    assert what == "checkpoint of step 5" and "ConnectionError: the store is gone; tried" in why


def moved_to_its_place(told: str) -> int:
    """Do as the line about a rescued checkpoint says; returns its step."""
    found = re.search(r"it is in (\S+) on \S+: move it to (\S+) to go on from it$", told)
    assert found is not None, told
    shutil.move(found[1], found[2])
    return int(found[2].rpartition("=")[2])


def test_a_checkpoint_that_is_not_waited_for_any_more_is_kept_elsewhere(saving: Saving) -> None:
    """The store does not come back; its user makes it do, and goes on."""
    assert saving.save(2)
    saving.wait()
    saving.store.error = ConnectionError("the store is gone")
    with pytest.raises(DiskRefused, match=r"after 0 s of attempts: ConnectionError: ") as caught:
        saving.save(5, is_last=True)
    assert "\n" not in str(caught.value)
    assert moved_to_its_place(str(caught.value)) == 5
    with saving.store.newest() as found:
        assert found is not None
        assert found[0] == 5 and (found[1] / "state").read_text() == "5"


@pytest.mark.parametrize("is_last", [False, True])
def test_a_stop_ends_the_wait_for_a_full_disk(saving: Saving, is_last: bool) -> None:
    staged = saving.store.stage
    saving.store.stage = lambda write: staged(full_disk)

    def stop() -> None:
        while not saving.waited:
            time.sleep(0.01)
        saving.is_told_to_stop = True

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(DiskRefused, match=r"since the run was stopped: the disk .* is full") as at:
        saving.save(2, is_last=is_last)
    assert moved_to_its_place(str(at.value)) == 2
    assert saving.store.steps() == [2] and saving.placed == []


def test_a_full_disk_is_waited_for_and_nothing_is_saved_twice(tmp_path: Path) -> None:
    """A real one, with room for two checkpoints of a megabyte and a half."""
    with small_disk(tmp_path, megabytes=4) as disk:
        saving = Saving(disk)
        ballast = disk / "ballast"

        def fill(target: Path) -> None:
            with (target / "state").open("wb") as file:
                torch.save(torch.zeros(300_000), file)

        def save(step: int, num_bytes: int, *, is_last: bool) -> None:
            contents = CheckpointContents(
                write=fill,
                before_place=lambda folder: None,
                is_settled=lambda: True,
                placed=lambda: saving.placed.append(step),
                num_bytes=num_bytes,
            )
            saving.saver.save(step, contents, is_last=is_last)

        def make_room() -> None:
            while len(saving.waited) <= len(saving.written):
                time.sleep(0.01)
            ballast.unlink()

        for step, num_bytes, is_last in ((2, 1_200_000, False), (4, 0, False), (5, 0, True)):
            ballast.write_bytes(b"0" * (free_bytes(disk) - 500_000))
            thread = threading.Thread(target=make_room, daemon=True)
            thread.start()
            save(step, num_bytes, is_last=is_last)
            thread.join()
        assert saving.placed == [2, 4, 5] and saving.told == []
        assert saving.store.steps() == [4, 5]
        needed = ["1.2 MB needed, ", "", ""]
        for (what, why), step, needs in zip(saving.waited, (2, 4, 5), needed, strict=True):
            assert what == f"checkpoint of step {step}"
            assert why.startswith(f"the disk {disk} of {disk} is full: {needs}")
            assert re.search(r"(49\d|50\d) kB free; waiting since \d\d:\d\d:\d\d until", why), why


def test_a_checkpoint_is_had_once_it_is_in_its_place_and_not_if_that_failed(
    saving: Saving,
) -> None:
    assert saving.saver.has(0) and not saving.saver.has(2), "what training began with"
    saving.save(2)
    assert saving.saver.has(2) and saving.placed == [2]
    saving.store.error = RuntimeError("refused")
    saving.save(4)
    assert saving.saver.has(2) and not saving.saver.has(4)


def test_what_comes_before_a_checkpoint_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    saving = Saving(tmp_path, settle=900.0)
    saving.is_settled = False
    saving.save(2)
    assert saving.placed == []
    saving.is_settled = True
    saving.wait()
    assert saving.placed == [2] and saving.told == []
    saving = Saving(tmp_path, settle=0.1)
    saving.is_settled = False
    saving.save(4, is_last=True)
    assert saving.placed == [4]
    late = "not in the run folder within 0.1 s"
    assert saving.told == [("what comes before the checkpoint of step 4", late)]


def test_a_disk_that_is_slow_while_training_waits_is_told(tmp_path: Path) -> None:
    saving, is_told = Saving(tmp_path, slow=0.05), threading.Event()

    def slow(write: Write) -> Path:
        while not saving.told:
            assert not is_told.wait(0.01)
        return Checkpoints.stage(saving.store, write)

    saving.store.stage = slow
    saving.save(2, is_last=True)
    assert saving.told == [("checkpoint of step 2", "the disk has not taken it within 0.05 s")]
    assert saving.store.steps() == [2]
