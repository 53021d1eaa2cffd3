"""Checkpoints are whole or passed over, and a failed write leaves everything as it was."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from treerpo_ray.run_folder.checkpoints import LIST_FILE, Checkpoints
from treerpo_ray.run_folder.files import publish_file, publish_folder, withdraw_folder

Write = Callable[[Path], None]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    name = f"memory://{uuid.uuid4().hex}/run"
    yield name
    fs, path = fsspec.core.url_to_fs(name)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def contents(content: str) -> Write:
    def write(target: Path) -> None:
        (target / "state.pt").write_text(f"state {content}")
        (target / "model/shards").mkdir(parents=True)
        (target / "model/shards/0.safetensors").write_bytes(content.encode() * 1000)

    return write


def full_disk(target: Path) -> None:
    contents("half")(target)
    raise OSError(errno.ENOSPC, "No space left on device")


def read_newest(checkpoints: Checkpoints) -> tuple[int, str, bytes] | None:
    with checkpoints.newest() as found:
        if found is None:
            return None
        step, local = found
        shard = (local / "model/shards/0.safetensors").read_bytes()
        return step, (local / "state.pt").read_text(), shard


def files(folder: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(folder)
    return {path.removeprefix(root): fs.cat_file(path) for path in fs.find(root)}


def spoil(folder: str, name: str, content: bytes | None) -> None:
    """Overwrite a file of the run folder, or remove it."""
    fs, root = fsspec.core.url_to_fs(folder)
    if content is None:
        fs.rm(f"{root}/{name}")
    else:
        fs.pipe_file(f"{root}/{name}", content)


def test_there_is_no_checkpoint_in_a_folder_that_is_not_there(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.steps() == []
    assert read_newest(checkpoints) is None


def test_the_newest_checkpoint_comes_back_as_it_was_written(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(9, contents("a"))
    checkpoints.save(10, contents("b"))
    assert read_newest(checkpoints) == (10, "state b", b"b" * 1000)
    assert read_newest(Checkpoints(folder, keep=2)) == (10, "state b", b"b" * 1000)


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_old_one(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(3, contents("a"))
    checkpoints.save(3, contents("b"))
    assert checkpoints.steps() == [3]
    assert read_newest(checkpoints) == (3, "state b", b"b" * 1000)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_are_kept(folder: str, keep: int) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in (1, 20, 300, 1_000_000):
        checkpoints.save(step, contents("x"))
    kept = [1, 20, 300, 1_000_000][-keep:]
    assert checkpoints.steps() == kept
    assert len(files(folder)) == 3 * len(kept)


def test_a_full_disk_is_raised_and_leaves_what_was_there_and_no_debris(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=1)
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
        Checkpoints(str(tmp_path), keep=1).save(1, full_disk)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2)
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
    checkpoints = Checkpoints(str(tmp_path), keep=1)
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
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    staging = checkpoints.stage(contents("a"))
    names = {"state.pt", "0.safetensors", LIST_FILE, "model", "shards", staging.name}
    monkeypatch.setattr(
        Path, "rename", lambda *places: synced.append("renamed") or os.rename(*places)
    )
    checkpoints.place(1, staging)
    assert set(synced[:-2]) == {*names, "metrics.jsonl"}
    assert synced[-2:] == ["renamed", "checkpoints"]


class LossyStore(MemoryFileSystem):
    """An object store that keeps one byte less of the file `torn`."""

    protocol = "lossy"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    torn = "nothing"
    arrived: ClassVar[list[str]] = []

    def put_file(self, local: str, remote: str, **options: object) -> None:
        content = Path(local).read_bytes()
        self.pipe_file(remote, content[:-1] if remote.endswith(self.torn) else content)
        self.arrived.append(remote.rpartition("/")[2])


@pytest.mark.parametrize("name", ["state.pt", LIST_FILE])
def test_a_store_that_did_not_get_all_is_no_reason_to_remove_older_checkpoints(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("lossy", LossyStore, clobber=True)
    LossyStore.store.clear()
    checkpoints = Checkpoints("lossy://bucket/run", keep=1)
    checkpoints.save(1, contents("a"))
    monkeypatch.setattr(LossyStore, "torn", name)
    with pytest.raises(OSError, match=f"bytes of {name} arrived"):
        checkpoints.save(2, contents("b"))
    assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)


def test_in_a_store_the_file_that_tells_that_a_model_is_there_comes_last() -> None:
    def write(target: Path) -> None:
        contents("a")(target)
        (target / "config.json").write_text("{}")

    fsspec.register_implementation("lossy", LossyStore, clobber=True)
    LossyStore.arrived.clear()
    publish_folder("lossy://bucket/run", "model", write)
    assert LossyStore.arrived == ["0.safetensors", "state.pt", "config.json"]


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
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, contents("a"))
    checkpoints.save(2, contents("b"))
    spoil(folder, f"checkpoints/step=000002/{name}", content)
    with caplog.at_level(logging.WARNING):
        assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)
    [record] = caplog.records
    assert f"checkpoint of step 2 is passed over: {told}" in record.getMessage()


def test_a_checkpoint_without_its_list_was_never_finished_and_is_not_one(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, contents("a"))
    checkpoints.save(2, contents("b"))
    spoil(folder, f"checkpoints/step=000002/{LIST_FILE}", None)
    assert checkpoints.steps() == [1]
    assert read_newest(checkpoints) == (1, "state a", b"a" * 1000)
    checkpoints.save(2, contents("c"))
    assert read_newest(checkpoints) == (2, "state c", b"c" * 1000)


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_begin_anew(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
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
    checkpoints = Checkpoints(folder, keep=2)
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
    checkpoints = Checkpoints(str(tmp_path), keep=2)
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
    Checkpoints(folder, keep=1).save(1, contents("a"))
    listed = json.loads(files(folder)[f"/checkpoints/step=000001/{LIST_FILE}"])
    assert sorted(listed) == ["model/shards/0.safetensors", "state.pt"]


def test_a_published_folder_is_where_it_is_said_to_be_and_takes_the_old_ones_place(
    folder: str,
) -> None:
    assert publish_folder(folder, "model", contents("a")) == f"{folder}/model"
    publish_folder(folder, "model", contents("b"))
    assert files(folder) == {
        "/model/state.pt": b"state b",
        "/model/model/shards/0.safetensors": b"b" * 1000,
    }


def test_a_full_disk_leaves_the_published_folder_as_it_was(folder: str) -> None:
    publish_folder(folder, "model", contents("a"))
    before = files(folder)
    with pytest.raises(OSError, match="No space left on device"):
        publish_folder(folder, "model", full_disk)
    assert files(folder) == before


def test_a_withdrawn_folder_is_gone_and_until_then_does_not_look_whole(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(target: Path) -> None:
        contents("a")(target)
        (target / "config.json").write_text("{}")

    withdraw_folder(folder, "model")
    publish_file(folder, "config.yaml", b"")
    publish_folder(folder, "model", model)
    fs, root = fsspec.core.url_to_fs(folder)
    remove, removed = fs.rm, []

    def rm(path: str, recursive: bool) -> None:
        remove(path, recursive=recursive)
        removed.append(path.removeprefix(root))

    monkeypatch.setattr(fs, "rm", rm)
    withdraw_folder(folder, "model")
    assert removed == ["/model/config.json", "/model"]
    assert files(folder) == {"/config.yaml": b""}


def test_a_published_file_takes_the_old_ones_place(folder: str) -> None:
    for content in (b"a", b"b"):
        publish_file(folder, "eval/step=000001.json", content)
        assert files(folder) == {"/eval/step=000001.json": content}


def test_a_file_is_in_its_place_only_when_the_disk_holds_it(tmp_path: Path, monkeypatch) -> None:
    publish_file(str(tmp_path), "file", b"old")

    def sync(opened: int) -> None:
        assert files(str(tmp_path)) == {"/file": b"old", "/file.writing": b"new"}
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="Input/output error"):
        publish_file(str(tmp_path), "file", b"new")
    assert files(str(tmp_path)) == {"/file": b"old"}


def test_folders_that_are_written_can_be_read_by_others(tmp_path: Path) -> None:
    publish_folder(str(tmp_path), "model", contents("a"))
    Checkpoints(str(tmp_path), keep=1).save(1, contents("a"))
    for name in ("model", "checkpoints/step=000001"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o755


def test_a_later_checkpoint_that_was_passed_over_does_not_push_out_a_new_one(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(40, contents("forty"))
    checkpoints.save(25, contents("twenty-five"))
    assert checkpoints.steps() == [25]
