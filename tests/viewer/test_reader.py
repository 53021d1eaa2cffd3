"""What the viewer reads of a run, of whomever it is, and what it refuses."""

import json
import re
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from omegaconf import OmegaConf

from tests.support.learning.records import some_training
from tests.support.saved_runs.paper_run import NUM_STEPS, paper_record
from tests.support.saved_runs.small_run import (
    grown_record,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import client_of
from treerpo_ray.config import Config
from treerpo_ray.records import to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.analysis import NotThere, Run
from treerpo_ray.user_code import pack
from treerpo_ray.viewer.__main__ import bind, main
from treerpo_ray.viewer.reader import RunReader
from treerpo_ray.viewer.wire import to_json

OWN_CREDIT = (
    "def form(values):\n    return values\ndef rule(groups):\n    return groups.values.max(-1)\n"
)


class CountingStore(MemoryFileSystem):
    """A store that counts the bytes that are read of its files."""

    protocol = "counting"
    store = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs = [""]  # noqa: RUF012
    num_read = 0

    def _open(self, path, mode="rb", **options):
        opened = super()._open(path, mode, **options)
        return CountedFile(opened) if mode == "rb" else opened


class CountedFile:
    """A file of that store; what it is asked for is passed on."""

    def __init__(self, opened: MemoryFile) -> None:
        self._opened = opened

    def read(self, size=-1):
        found = self._opened.read(size)
        CountingStore.num_read += len(found)
        return found

    def __getattr__(self, name):
        return getattr(self._opened, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._opened.seek(0)


def test_only_what_is_looked_at_is_read_of_a_run_of_paper_sized_trees():
    fsspec.register_implementation("counting", CountingStore, clobber=True)
    place = f"counting://{uuid.uuid4().hex}/paper"
    folder = RunFolder(place)
    folder.publish_file("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(Config())).encode())
    file = saved_trees.name(3, 0)
    folder.publish_table(file, to_table([paper_record(0), paper_record(1)] * 2))
    size = folder.fs.size(folder._path(file))
    assert size > 3_000_000

    def read_by(look):
        CountingStore.num_read = 0
        look()
        return CountingStore.num_read

    reader = RunReader(place)
    assert read_by(reader.status) == 0
    assert read_by(lambda: reader.trees(3)) < size / 10
    assert read_by(lambda: reader.trees(3)) == 0  # it is as it was
    assert read_by(lambda: reader.problems()) < size / 20
    assert read_by(reader.change) == 0  # no evaluation is there
    assert 0 < read_by(lambda: reader.search(3, "no such text")) < size / 3
    assert read_by(lambda: reader.tree("3:1")) < 0.6 * size  # two of the four have this ticket
    assert read_by(lambda: reader.texts("3:1", list(range(NUM_STEPS)))) == 0


def test_what_comes_or_is_replaced_while_it_is_looked_at_is_seen(tmp_path):
    folder = write_small_run(tmp_path)
    reader = RunReader(folder)
    before = reader.status()
    assert reader.status().state == before.state
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "time": 2000.0, "reward/mean": 0.5}) + "\n")
    grown = reader.status()
    assert (grown.step, grown.written_at_s) == (13, 2000.0) and grown.state != before.state
    save_trees(folder, 13, [grown_record(3)])
    assert reader.status().tree_steps == (11, 12, 13) and reader.status().state != grown.state
    assert [line.num_steps for line in reader.trees(13)] == [len(grown_record(3).tree)]
    assert reader.tree("13:3").question == grown_record(3).question
    (Path(folder) / "trees/step=000013/0.parquet").unlink()  # a resume does the step once more
    table = to_table([worked_record(3, finished_at_s=5.0), worked_record(4)])
    RunFolder(folder).publish_table("trees/step=000013/0.parquet", table)
    assert [line.ticket for line in reader.trees(13)] == [3, 4]
    assert reader.tree("13:3").question == "1+1=?"
    assert not reader.status().is_finished
    RunFolder(folder).publish_file("model/config.json", b"{}")
    assert reader.status().is_finished


def test_a_run_at_a_uri_reads_like_a_local_one(folder):
    uri = f"memory://{uuid.uuid4().hex}/small"
    fsspec.filesystem("memory").put(folder, uri, recursive=True)
    local, remote = RunReader(folder), RunReader(uri)
    assert remote.status().poll_s > local.status().poll_s
    for look in (
        lambda reader: reader.curves(),
        lambda reader: reader.trees(11),
        lambda reader: reader.tree("20:5"),
        lambda reader: reader.texts("20:5", [0, 1]),
        lambda reader: reader.problems(),
    ):
        assert to_json(look(remote)) == to_json(look(local))


def test_a_run_is_found_by_its_name_and_a_wrong_one_is_one_line(
    folder, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "treerpo_runs").symlink_to(Path(folder).parent)
    found = [RunReader(place).status().folder for place in ("small", folder)]
    assert found == [f"{tmp_path}/treerpo_runs/small", folder]
    with pytest.raises(ValueError, match=r"^tiny is no run: it has no config.yaml; .*: small$"):
        RunReader("tiny")
    assert main(["tiny"]) == 2
    assert main([folder, "--tree", "1:1"]) == 2
    assert main([folder, "--html", f"{folder}/none/page.html"]) == 2
    taken = bind("127.0.0.1", 0)
    assert main([folder, "--port", str(taken.getsockname()[1])]) == 2
    taken.close()
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert "--port 0 takes a free one" in errors[-1]


def test_no_python_that_a_run_folder_brings_along_is_run(tmp_path, monkeypatch):
    """Its configuration has the source of the functions that make and prune its advantages."""
    folder, taken = write_small_run(tmp_path), tmp_path / "taken"
    source = f"open({str(taken)!r}, 'w').close()\n{OWN_CREDIT}"
    learner = {"advantage": "own.py:form", "prune": "own.py:rule"}
    learner["sources"] = {"own.py": pack(source)}
    config = OmegaConf.merge(OmegaConf.load(f"{folder}/config.yaml"), {"learner": learner})
    config.run.name = "${oc.env:HOME}"
    OmegaConf.save(config, f"{folder}/config.yaml")
    (tmp_path / "own.py").write_text(source)
    record = worked_record(5)
    save_trees(folder, 20, [record])
    save_trees(folder, 21, [replace(record, training=some_training(record.tree))])
    client = client_of(folder)

    def ask(path):
        answer = client.get(f"/api/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    status = ask("status")
    assert status["own_code"] == ["own.py:form", "own.py:rule"]
    assert status["name"] == "${oc.env:HOME}"
    for path in ("curves", "problems", "change", "search?step=20&text=2", "texts?ref=20:5&nodes=0"):
        ask(path)
    unknown, known = ask("tree?ref=20:5"), ask("tree?ref=21:5")
    assert unknown["value"] == known["value"] and unknown["advantage"] == [None] * 6
    assert unknown["state"] == [None] * 6 and sum(unknown["groups"].values()) == 0
    assert known["advantage"] == [None, 1, None, 3, None, 5]
    assert known["groups"] == ask("trees?step=21")[0]["groups"]
    assert main([folder, "--html", str(tmp_path / "page.html")]) == 0
    assert not taken.exists()
    run = Run(folder)
    for compute in (run.advantages, run.advantage_errors, lambda record: run.pruning):
        with pytest.raises(NotThere, match=r"brings own\.py:(form|rule) .*trusts_code=True"):
            compute(record)
    assert not taken.exists()
    Run(folder, trusts_code=True).advantages(record)
    assert taken.exists()
    monkeypatch.chdir(tmp_path)  # where the file is as it was, so that it is the user's own
    assert Run(folder).pruning.rule is not None


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            "a: !!python/object/apply:os.system ['touch CANARY']",
            "is no configuration: .*python/obj",
        ),
        ("a: [", "is no configuration: "),
        ("- 1", "is none of a run: it has no section run"),
        ("", "is none of a run: it has no section run"),
        (
            "{run: {}, model: {}, gate: {}, learner: 3}",
            "is none of a run: it has no section learner",
        ),
    ],
)
def test_a_configuration_of_something_else_is_one_clear_line(tmp_path, capsys, config, told):
    (tmp_path / "config.yaml").write_text(config)
    assert main([str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: {tmp_path}/config.yaml {told}.*\n", capsys.readouterr().err)


def test_a_tree_that_lacks_something_of_its_run_is_one_clear_line(tmp_path):
    folder = write_small_run(tmp_path)
    config = Path(folder, "config.yaml")
    known = config.read_text()
    config.write_text(known.replace("advantage: BERNOULLI", "advantage: PAST_BASELINE"))
    answer = client_of(folder).get("/api/tree?ref=11:0").json()
    assert answer["error"].endswith("has no learner/baseline of step 1 yet")
    config.write_text(known.replace("  advantage: BERNOULLI\n", ""))
    with pytest.raises(ValueError, match=r"config\.yaml has no 'advantage': it is of another vers"):
        RunReader(folder)


def test_trees_of_another_schema_are_one_clear_line(tmp_path):
    folder = write_small_run(tmp_path)
    file = Path(folder, "trees/step=000012/0.parquet")
    table = pq.read_table(file).replace_schema_metadata({"treerpo_schema": "1"})
    pq.write_table(table, file)
    client = client_of(folder)
    for path in ("/api/trees?step=12", "/api/tree?ref=12:4", "/api/problems"):
        assert "trees were written with schema 1" in client.get(path).json()["error"]
    file.write_bytes(b"torn")
    assert client.get("/api/trees?step=12").status_code == 404
