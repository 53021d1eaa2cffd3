"""Run folders that cannot be written."""

import sys
import threading
from pathlib import Path

import fsspec
import fsspec.implementations.memory
import pytest

from tests.support.project import PROJECT, load_script
from treerpo_ray.config import load
from treerpo_ray.preflight.storage import StoragePlan, check_folder

QUICKSTART = [str(PROJECT / "conf/quickstart.yaml"), "run.root=/runs"]


def check(*overrides: str) -> None:
    check_folder(load([*QUICKSTART, *overrides]))


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=r"^run\.root=\S+: .*file is a file, not a folder"):
            check(f"run.root={root}")
    with pytest.raises(ValueError, match=r"^run\.root=nosuch://bucket: "):
        check("run.root=nosuch://bucket")
    check(f"run.root={tmp_path}/new/deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_inside_the_folder_of_another_one_is_refused(tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").touch()
    for name in ("other/mine", "other/checkpoints/mine"):
        with pytest.raises(ValueError, match=r"in the folder of another run: .*/other$"):
            check(f"run.root={tmp_path}", f"run.name={name}")
    check(f"run.root={tmp_path}", "run.name=other")
    check(f"run.root={tmp_path}", "run.name=group/mine")


def test_checkpoints_of_adapters_have_a_size_once_the_model_is_at_hand(tmp_path: Path) -> None:
    config = load([*QUICKSTART, f"run.root={tmp_path}", "lora.rank=8"])
    known = StoragePlan.of(config, 1e9, 1e6)
    assert known.line().startswith("3 checkpoints of 12 MB, ")
    unknown = StoragePlan.of(config, 1e15, None)
    assert unknown.line().startswith("3 checkpoints of adapters alone, ")
    assert known.total - StoragePlan.of(config, 1e9, None).total == 3 * 12_000_000
    assert unknown.misfit() is None


class Store(fsspec.implementations.memory.MemoryFileSystem):
    """A store of buckets, which may refuse or never answer."""

    protocol = "s3"
    cachable = False
    buckets: tuple[str, ...] = ()
    fault: Exception | None = None
    answers = threading.Event()

    def exists(self, path: str, **more: object) -> bool:
        assert self.answers.wait(60)
        if self.fault:
            raise self.fault
        return path.removeprefix("s3://").strip("/").split("/")[0] in self.buckets


def test_a_store_that_cannot_be_written_to_is_told_before_anything_starts(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Store)
    monkeypatch.setattr(Store, "buckets", ("mine",))
    Store.answers.set()
    check("run.root=s3://mine/runs")
    with pytest.raises(ValueError, match=r"^run\.root=s3://yours/runs: there is no bucket yours"):
        check("run.root=s3://yours/runs")
    monkeypatch.setattr(Store, "fault", PermissionError("no key"))
    for command in (check, lambda root: load_script("jobs/train.py").train([*QUICKSTART, root])):
        with pytest.raises(ValueError, match=r"the store refuses: PermissionError: no key$"):
            command("run.root=s3://mine/runs")
    Store.answers.clear()
    with pytest.raises(ValueError, match=r"the store has not answered for 0\.1 s$"):
        check_folder(load([*QUICKSTART, "run.root=s3://mine/runs"]), answer_s=0.1)
    Store.answers.set()
