"""What is published is whole or not there, and a failed write leaves everything as it was."""

import errno
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from tests.support.saved_runs.run_folders import LossyStore, contents, files, full_disk
from treerpo_ray.run_folder.checkpoints import Checkpoints
from treerpo_ray.run_folder.files import ROW_GROUP_BYTES, RunFolder, did_you_mean, named_folder


def test_a_published_folder_is_where_it_is_said_to_be_and_takes_the_old_ones_place(
    folder: str,
) -> None:
    assert RunFolder(folder).publish_model(contents("a")) == f"{folder}/model"
    RunFolder(folder).publish_model(contents("b"))
    assert files(folder) == {
        "/model/state.pt": b"state b",
        "/model/model/shards/0.safetensors": b"b" * 1000,
    }


def test_a_full_disk_leaves_the_published_folder_as_it_was(folder: str) -> None:
    RunFolder(folder).publish_model(contents("a"))
    before = files(folder)
    with pytest.raises(OSError, match="No space left on device"):
        RunFolder(folder).publish_model(full_disk)
    assert files(folder) == before


def test_a_withdrawn_folder_is_gone_and_until_then_does_not_look_whole(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(target: Path) -> None:
        contents("a")(target)
        (target / "config.json").write_text("{}")

    RunFolder(folder).withdraw_model()
    RunFolder(folder).publish_file("config.yaml", b"")
    RunFolder(folder).publish_model(model)
    fs, root = fsspec.core.url_to_fs(folder)
    remove, removed = fs.rm, []

    def rm(path: str, recursive: bool) -> None:
        remove(path, recursive=recursive)
        removed.append(path.removeprefix(root))

    monkeypatch.setattr(fs, "rm", rm)
    RunFolder(folder).withdraw_model()
    assert removed == ["/model/config.json", "/model"]
    assert files(folder) == {"/config.yaml": b""}


def test_a_published_file_takes_the_old_ones_place(folder: str) -> None:
    for content in (b"a", b"b"):
        RunFolder(folder).publish_file("eval/step=000001.json", content)
        assert files(folder) == {"/eval/step=000001.json": content}


def test_a_file_is_in_its_place_only_when_the_disk_holds_it(tmp_path: Path, monkeypatch) -> None:
    RunFolder(str(tmp_path)).publish_file("file", b"old")

    def sync(opened: int) -> None:
        assert files(str(tmp_path)) == {"/file": b"old", "/file.writing": b"new"}
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="Input/output error"):
        RunFolder(str(tmp_path)).publish_file("file", b"new")
    assert files(str(tmp_path)) == {"/file": b"old"}


def test_folders_that_are_written_can_be_read_by_others(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.publish_model(contents("a"))
    Checkpoints(folder, keep=1).save(1, contents("a"))
    for name in ("model", "checkpoints/step=000001"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o755


def test_in_a_store_the_file_that_tells_that_a_model_is_there_comes_last() -> None:
    def write(target: Path) -> None:
        contents("a")(target)
        (target / "config.json").write_text("{}")

    LossyStore.register()
    RunFolder("lossy://bucket/run").publish_model(write)
    assert LossyStore.arrived == ["0.safetensors", "state.pt", "config.json"]


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    for name in ("run[1]", "run1", "r*n"):
        RunFolder(f"{tmp_path}/{name}").publish_file("eval/a.json", name.encode())
    for name in ("run[1]", "run1", "r*n"):
        run = RunFolder(f"{tmp_path}/{name}")
        assert run.glob("eval/*.json") == ["eval/a.json"]
        assert run.read_text("eval/a.json") == name


def test_what_lies_in_a_run_folder_is_found_and_read(folder: str, tmp_path: Path) -> None:
    run = RunFolder(folder)
    assert (
        not run.exists() and run.glob("*") == run.names("eval") == run.read_lines("a.jsonl") == []
    )
    table = pa.table({"n": [1, 2]})
    run.publish_table("trees/step=000002/rank-0.parquet", table)
    run.publish_file("trees/step=000010/rank-0.parquet", b"")
    run.publish_file("a.jsonl", b'{"n": 1}\n{"n": 2}\n{"n"')
    assert run.exists() and run.exists("trees/step=000002") and not run.exists("trees/none")
    assert run.glob("trees/step=*") == ["trees/step=000002", "trees/step=000010"]
    assert run.names("trees") == ["step=000002", "step=000010"]
    assert run.read_table("trees/step=000002/rank-0.parquet") == table
    assert run.state("a.jsonl") == run.state("a.jsonl") != run.state("none") == ""
    assert run.read_lines("a.jsonl") == [{"n": 1}, {"n": 2}]
    assert RunFolder(run.uri("trees")).names("") == ["step=000002", "step=000010"]
    with run.local("trees/step=000002") as copy:
        assert [path.name for path in copy.iterdir()] == ["rank-0.parquet"]
    with run.local("a.jsonl") as copy:
        assert copy.read_text() == run.read_text("a.jsonl")
    run.remove("trees")
    run.remove("trees")
    assert sorted(files(folder)) == ["/a.jsonl"]


def test_a_row_of_a_table_of_large_rows_can_be_read_alone(folder: str) -> None:
    run = RunFolder(folder)
    for size, num_groups in ((ROW_GROUP_BYTES // 4, 6), (3 * ROW_GROUP_BYTES, 16), (10, 1)):
        table = pa.table({"n": range(16), "text": [chr(97 + n) * size for n in range(16)]})
        run.publish_table("table.parquet", table)
        with run.parquet("table.parquet") as opened:
            groups = [opened.read_row_group(n, ["n"]) for n in range(num_groups)]
            assert opened.num_row_groups == num_groups
            assert opened.read(["text"])["text"] == table["text"]
        assert pa.concat_tables(groups)["n"].to_pylist() == list(range(16))
    run.publish_table("table.parquet", table.slice(0, 0))
    assert len(run.read_table("table.parquet")) == 0


def test_a_name_is_that_of_a_run_in_the_folder_of_all_runs_unless_it_is_there_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    named = {
        **{"mine": "mine", "quickstart": "/runs/quickstart", "./other": "./other"},
        **{"/away/run": "/away/run", "memory://bucket/run": "memory://bucket/run"},
    }
    assert {place: named_folder(place, root="/runs") for place in named} == named


def test_a_name_that_is_none_is_answered_with_the_run_that_is_most_like_it(tmp_path: Path) -> None:
    for name in ("quickstart", "quickstart-grpo", "no run"):
        RunFolder(f"{tmp_path}/{name}").publish_file("config.yaml", b"")
    (tmp_path / "no run/config.yaml").unlink()
    hints = {"quikstart-grpo": "; did you mean quickstart-grpo?", "no rum": "", "countdown": ""}
    hints[f"{tmp_path}/quickstrt/"] = "; did you mean quickstart?"
    assert {place: did_you_mean(place, str(tmp_path)) for place in hints} == hints
    assert did_you_mean("quickstart", f"{tmp_path}/gone") == ""
