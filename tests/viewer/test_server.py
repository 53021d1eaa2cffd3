"""The viewer's server: what it reads, tells and refuses."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
import uuid
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from omegaconf import OmegaConf
from starlette.testclient import TestClient
from tokenizers import Tokenizer

from tests.support.paper_run import NUM_STEPS, SCRIPT, paper_record, write_paper_run
from tests.support.project import ROOT as PROJECT
from tests.support.records import some_training
from tests.support.small_run import (
    SAVED,
    TOKENIZER,
    answers_to,
    grown_record,
    metric_rows,
    save_trees,
    worked_record,
    write_small_run,
)
from treerpo_ray.algo.tree import Tree
from treerpo_ray.config import Config
from treerpo_ray.errors import STOPPED
from treerpo_ray.records import to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.analysis import Run
from treerpo_ray.user_code import pack
from treerpo_ray.viewer.__main__ import bind, main
from treerpo_ray.viewer.answers import evaluation_sightings, read_answers
from treerpo_ray.viewer.page import page, write_page
from treerpo_ray.viewer.reader import RunReader, parse_ref
from treerpo_ray.viewer.search import AFTER, BEFORE
from treerpo_ray.viewer.server import API, ASSETS, HEADERS, make_app
from treerpo_ray.viewer.step_text import decoded
from treerpo_ray.viewer.wire import to_json

OWN_CREDIT = (
    "def form(values):\n    return values\ndef rule(groups):\n    return groups.values.max(-1)\n"
)
PROBLEMS = (("test-0", "1+1=?", "2"), ("test-1", "2+2=?", "4"), ("only-once", "3+3=?", "6"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_small_run(tmp_path_factory.mktemp("runs"))
    save_trees(folder, 20, [worked_record(5)])
    run = RunFolder(folder)
    run.publish_table(*answers_to(PROBLEMS, 0, [["#### 3", "#### 2"], ["#### 4"], ["#### 1"]]))
    run.publish_table(*answers_to(PROBLEMS[:2], 12, [["#### 2", "#### 2"], ["#### 5"]]))
    return folder


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return write_paper_run(tmp_path_factory.mktemp("runs"))


def client_of(place, host="127.0.0.1:8300"):
    return TestClient(make_app(RunReader(place)), base_url=f"http://{host}")


@pytest.fixture(scope="module")
def ask(folder):
    client = client_of(folder)

    def ask(name, **query):
        return client.get(f"/api/{name}", params=query).json()

    return ask


# What it tells --------------------------------------------------------------------------------


def test_a_tree_has_its_values_advantages_errors_and_verdicts(ask):
    tree = ask("tree", ref="20:5")
    assert tree["parent"] == [-1, 0, 0, -1, 3, 3] and tree["depth"] == [1, 2, 2, 1, 2, 2]
    assert tree["root_value"] == 0.25 and tree["value"] == [0.5, 1, 0, 0, 0, 0]
    # The values of the prompt's children are 1/2 and 0: their mean is 1/4, its error
    # sqrt(1/8 / 2), and (R - mu) / (mu (1 - mu)) is 4/3. Those below step 0 have mean 1/2.
    assert tree["root_se"] == 0.25
    assert tree["advantage"] == [1.33333, 2, -2, -1.33333, None, None]
    # (1/2, 1/4) are e^2 and S^2 of the first: f (f e^2 + S^2) with f = 1/2, in the form's scale.
    assert tree["advantage_se"][:2] == [round((3 / 32) ** 0.5 * 16 / 3, 5), round(8**-0.5 * 4, 5)]
    assert tree["state"] == ["kept"] * 4 + ["pruned"] * 2
    assert tree["groups"] == {"kept": 2, "pruned": 1, "errored": 0}
    assert tree["verdict"] == [None, "correct", "wrong", None, "wrong", "wrong"]
    assert tree["text"][:2] == ["1+1=", "2\n#### 2"] and tree["length"][0] == 4
    assert tree["newest_version"] == [0] * 6 and tree["mean_logprob"] == [-0.1] * 6
    (text,) = ask("texts", ref="20:5", nodes="0")
    assert text["text"] == list("1+1=") and text["logprob"] == [-0.1] * 4
    assert ask("holding", ref="20:5", text="#### 3") == [2]


def test_partial_credit_is_the_value_of_an_answer(tmp_path):
    """Its verdict does not tell how much; an earlier version recorded the verdict alone."""
    run = RunFolder(str(tmp_path))
    file, table = answers_to(PROBLEMS[:1], 3, [["#### 2", "a", "b", "c"]])
    kinds = [["correct", "partial", "wrong", "errored"], [1.0, 0.3, 0.0, None]]
    for name, column in zip(("verdict", "reward"), kinds, strict=True):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), [column])
    for saved, expected in ((table, [1, 0.3, 0]), (table.drop_columns(["reward"]), [1, 0, 0])):
        run.publish_table(file, saved)
        view = read_answers(run, 3, "test-0").view
        assert view.value[:3].tolist() == expected and np.isnan(view.value[3])
        [met] = evaluation_sightings(run, 3)
        assert np.isnan(met.value) and np.isnan(view.root_value)  # as one has no verdict
        run.publish_table(file, saved.slice(0, 3))
        [met] = evaluation_sightings(run, 3)
        whole = read_answers(run, 3, "test-0").view.root_value
        assert met.value == pytest.approx(sum(expected) / 3) == whole


def test_the_list_of_trees_tells_the_same_without_tokens(ask, folder):
    (line,) = ask("trees", step=20)
    assert line == {
        **{"step": 20, "ticket": 5, "prompt_id": "train-5", "question": "1+1=?", "answer": "2"},
        **{"value": 0.25, "se": 0.25, "num_steps": 6, "depth": 2},
        "num_tokens": sum(ask("tree", ref="20:5")["length"]),
        "groups": {"kept": 2, "pruned": 1, "errored": 0},
        "verdicts": {"correct": 1, "wrong": 3},
    }
    assert [line["ticket"] for line in ask("trees", step=11)] == [0, 1, 2, 3]
    assert ask("trees", step=999) == []
    for line in ask("trees", step=11):
        tree = ask("tree", ref=f"11:{line['ticket']}")
        assert (line["value"], line["se"]) == (tree["root_value"], tree["root_se"])
        assert line["groups"] == tree["groups"]


def test_status_and_curves_are_those_of_the_run(ask):
    status = ask("status")
    assert (status["name"], status["step"], status["num_steps"]) == ("small", 12, 12)
    assert status["tree_steps"] == [11, 12, 20] and status["evaluations"] == [0, 12]
    assert (status["advantage"], status["prune"], status["prune_threshold"]) == (
        *("bernoulli", "range", 0.1),
    )
    curves, rows = ask("curves"), list(metric_rows())
    assert curves["steps"] == list(range(13))
    for panel in curves["panels"]:
        for name in (*panel["lines"].values(), *(panel["interval"] or ())):
            expected = [None if name not in row else round(row[name], 5) for row in rows]
            assert curves["series"].get(name, [None] * 13) == expected
    titles = [panel["title"] for panel in curves["panels"]]
    assert "Pass@1 on held-out problems" in titles  # and no panel of what the run has nothing of
    assert "KL to the reference (nats a token)" not in titles


def test_problems_that_were_met_twice_are_told_with_what_they_gained(ask):
    assert [(p["problem"], p["refs"], p["values"], p["gain"]) for p in ask("problems")] == [
        ("test-0", ["e0:test-0", "e12:test-0"], [0.5, 1.0], 0.5),
        ("test-1", ["e0:test-1", "e12:test-1"], [1.0, 0.0], -1.0),
    ]
    tree = ask("tree", ref="e0:test-0")
    assert (tree["parent"], tree["value"], tree["root_value"]) == ([-1, -1], [0, 1], 0.5)
    assert tree["verdict"] == ["wrong", "correct"] and tree["advantage"] == [None, None]
    (text,) = ask("texts", ref="e0:test-0", nodes="1")
    assert text["answer"] == "#### 2" and text["text"] == []
    assert ask("holding", ref="e0:test-0", text="3") == [0]


def test_what_training_fixed_is_told_with_how_it_was_sampled(ask, tmp_path):
    change = ask("change")
    assert (change["steps"], change["num_answers"]) == ([0, 12], [2, 2])
    # test-0 went from 1/2, which is no mistake, to 1; test-1 from 1 to 0.
    assert (change["num_problems"], change["num_fixed"], change["num_broken"]) == (2, 0, 1)
    run = RunFolder(write_small_run(tmp_path))
    assert RunReader(run.place).change() is None
    for step, answers in ((0, [["1"] * 4, ["1", "#### 4"]]), (6, [["#### 2"]]), (12, [["#### 2"]])):
        run.publish_table(*answers_to(PROBLEMS[: len(answers)], step, answers))
    change = RunReader(run.place).change()
    assert (change.steps, change.num_answers, change.num_problems) == ((0, 12), (4, 1), 1)
    assert [problem.refs for problem in change.fixed] == [("e0:test-0", "e12:test-0")]
    assert (change.num_fixed, change.num_broken) == (1, 0)
    shown = write_page(RunReader(run.place), [], tmp_path / "page.html")
    assert sorted(shown[:-2]) == [f"12:{ticket}" for ticket in SAVED[12]]
    assert shown[-2:] == ["e0:test-0", "e12:test-0"]


def test_a_search_finds_the_answers_of_all_trees_that_have_a_text(ask, tmp_path):
    (found,) = ask("search", step=20, text="#### 0")
    assert found == {
        **{"ticket": 5, "num_answers": 2, "leaf": 4},
        **{"before": "", "text": "#### 0", "after": ""},
    }
    assert ask("search", step=20, text="#### 9") == ask("search", step=999, text="#### 0") == []
    folder = write_small_run(tmp_path)
    long = replace(
        worked_record(7), leaf_texts=("x", "so " * 90 + "IT IS.*" + " end" * 90, "x", "y")
    )
    save_trees(folder, 21, [long, worked_record(5, finished_at_s=1.0)])
    save_trees(folder, 21, [replace(worked_record(5), leaf_texts=("it is.*",) * 4)])
    (found,) = RunReader(folder).search(21, "it is.*")  # ticket 5 was done once more
    assert (found.ticket, found.num_answers, found.leaf, found.text) == (7, 1, 2, "IT IS.*")
    assert (len(found.before), len(found.after)) == (BEFORE, AFTER)
    assert found.before.endswith("so so ") and found.after.startswith(" end end")


def test_tokens_tell_the_ratio_of_learner_to_engine_where_they_were_trained_on(tmp_path):
    folder, record = write_small_run(tmp_path), worked_record(5)
    made = some_training(record.tree)  # of the odd steps: log-probabilities 1/4 below the engine's
    save_trees(folder, 20, [replace(record, training=made)])
    reader = RunReader(folder)
    tree = json.loads(to_json(reader.tree("20:5")))
    assert tree["mean_log_ratio"] == [None, -0.25] * 3 and tree["largest_log_ratio"] == 0.25
    assert tree["advantage"] == [None, 1, None, 3, None, 5]  # the learner's own
    first, second = reader.texts("20:5", [0, 1])
    assert np.isnan(first.learner_logprob).all() and len(first.learner_logprob) == len(first.text)
    assert second.learner_logprob == pytest.approx([logprob - 0.25 for logprob in second.logprob])
    assert tree["groups"] == {"kept": 3, "pruned": 0, "errored": 0}
    (line,) = reader.trees(20)
    assert line.groups == tree["groups"]
    save_trees(folder, 21, [record])
    before = json.loads(to_json(reader.tree("21:5")))
    assert before["mean_log_ratio"] == [None] * 6 and before["largest_log_ratio"] is None


def test_a_problem_that_training_met_at_two_steps_is_among_them(tmp_path):
    folder = write_small_run(tmp_path)
    save_trees(folder, 20, [worked_record(5)])
    save_trees(folder, 21, [worked_record(5), worked_record(6)])
    (found,) = RunReader(folder).problems()[:1]
    by_problem = {problem.problem: problem.refs for problem in RunReader(folder).problems()}
    assert by_problem["train-5"][-2:] == ("20:5", "21:5") and not found.is_evaluation
    assert "train-0" not in by_problem


# What it reads --------------------------------------------------------------------------------


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


def test_a_run_is_found_by_its_name_and_a_wrong_one_is_one_line(folder, monkeypatch, capsys):
    config = type("Root", (), {"root": str(Path(folder).parent)})
    for module in ("viewer.reader", "run_folder.files"):
        monkeypatch.setattr(f"treerpo_ray.{module}.RunConfig", config)
    assert [RunReader(place).status().folder for place in ("small", folder)] == [folder] * 2
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


# Texts ----------------------------------------------------------------------------------------


def test_pieces_of_a_step_are_its_text_whatever_its_tokens_are(paper):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    reader, record = RunReader(paper), paper_record(0)
    texts = reader.texts("12:0", list(range(80)))
    for text in texts:
        step = record.tree.steps[text.index]
        assert sum(text.num_tokens) == len(step.token_ids)
        assert sum(text.logprob) == pytest.approx(float(step.logprobs.sum()), rel=1e-4)
    whole = "".join("".join(texts[step].text) for step in record.tree.path(8))
    assert whole == tokenizer.decode(record.tree.path_token_ids(8), skip_special_tokens=False)
    assert SCRIPT in "".join("".join(text.text) for text in texts)
    rng = np.random.default_rng(0)
    for _ in range(50):  # bytes that are no text
        token_ids = rng.integers(0, tokenizer.get_vocab_size(), 40).tolist()
        pieces = decoded(tokenizer, token_ids[:3], token_ids)
        assert sum(count for _, count in pieces) == 40
    assert decoded(tokenizer, [], tokenizer.encode("é").ids) == [("é", 2)]
    assert decoded(tokenizer, [], tokenizer.encode("é").ids[:1]) == [("\ufffd", 1)]


def test_without_a_tokenizer_a_step_has_the_answer_of_its_first_leaf(tmp_path):
    folder = write_small_run(tmp_path)
    save_trees(folder, 20, [worked_record(5)])
    config = Path(folder, "config.yaml")
    config.write_text(config.read_text().replace("quickstart/model", "somewhere/else"))
    reader = RunReader(folder)
    assert not reader.tree("20:5").has_texts
    assert [text.answer for text in reader.texts("20:5", [0, 2])] == ["#### 2", "#### 3"]
    assert reader.holding("20:5", "#### 3") == [2]
    model = Path(folder, "checkpoints/step=000012/model")  # of a run that goes on
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_text(TOKENIZER.read_text())
    assert reader.tree("20:5").has_texts and reader.texts("20:5", [0])[0].text == tuple("1+1=")


def test_a_tree_without_a_token_or_a_verdict_can_be_looked_at(tmp_path):
    folder = write_small_run(tmp_path)
    record = worked_record(5)
    steps = list(record.tree.steps)
    steps[4] = type(steps[4])(
        parent=3,
        token_ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        versions=np.empty(0, np.int32),
        stop="error",
    )
    tree = Tree.from_steps(record.tree.prompt_ids, tuple(steps))
    verdicts = (*record.verdicts[:2], type(record.verdicts[0]).ERRORED, record.verdicts[3])
    changed = type(record)(
        **{
            name: getattr(record, name)
            for name in record.__dataclass_fields__
            if name not in ("tree", "verdicts")
        },
        tree=tree,
        verdicts=verdicts,
    )
    save_trees(folder, 20, [changed])
    told = json.loads(to_json(RunReader(folder).tree("20:5")))
    assert told["root_value"] is None and told["value"][3:5] == [None, None]
    assert told["state"] == ["errored", "kept", "kept", "errored", "errored", "errored"]
    assert told["newest_version"][4] is None and told["mean_logprob"][4] is None
    (line,) = RunReader(folder).trees(20)
    assert line.groups == {"kept": 1, "pruned": 0, "errored": 2}


# What it refuses ------------------------------------------------------------------------------


def test_nothing_is_served_under_a_name_that_is_not_this_machines(folder):
    for host in ("127.0.0.1", "localhost", "localhost:9"):
        assert client_of(folder, host).get("/api/status").status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8300"):
        for path in ("/", "/api/status", "/assets/main.js"):
            assert client_of(folder, host).get(path).status_code == 400


def test_every_answer_has_the_safe_headers_and_errors_are_one_line(folder):
    client = client_of(folder)
    asked = [
        *("/", "/assets/main.js", "/assets/lib/uPlot.min.css", "/api/status", "/api/none"),
        *("/assets/../server.py", "/assets/%2e%2e/server.py"),
    ]
    for path in asked:
        answer = client.get(path)
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "access-control-allow-origin" not in answer.headers
        assert answer.status_code == (404 if "none" in path or "server" in path else 200)
    for path in (
        *("/api/tree", "/api/tree?ref=1", "/api/tree?ref=11:99", "/api/tree?ref=e1:no"),
        *("/api/tree?ref=e0:no", "/api/tree?ref=../../etc:1", "/api/trees?step=x", "/api/trees"),
        *(
            "/api/texts?ref=11:0&nodes=999",
            "/api/texts?ref=11:0",
            "/api/texts?ref=e0:test-0&nodes=7",
        ),
        f"/api/holding?ref=11:0&text={'x' * 2000}",
    ):
        answer = client.get(path)
        assert answer.status_code == 404 and list(answer.json()) == ["error"], path
        assert "\n" not in answer.json()["error"]
    for name in API:
        assert client.post(f"/api/{name}").status_code == 405
    for ref in ("1", "a:1", "1:b", "e:1", "-1:2", "1:²", f"{'9' * 20}:1"):
        with pytest.raises(ValueError, match="is no tree"):
            parse_ref(ref)


def test_no_python_that_a_run_folder_brings_along_is_run(tmp_path):
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
    Run(folder).advantages(record)  # whoever asks for it has it run
    assert taken.exists()


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


# The page -------------------------------------------------------------------------------------


def test_no_text_can_become_html_or_a_script():
    for script in ASSETS.glob("*.js"):
        source = script.read_text()
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
        ):
            assert way not in source, script.name
    html = (ASSETS / "index.html").read_text()
    assert not re.search(r"<script>|<style>| on\w+=| style=|https?:", html)
    told = to_json(
        {"text": SCRIPT + "\u2028", "nan": float("nan"), "array": np.array([1.5, np.inf])}
    )
    assert "<" not in told
    assert json.loads(told) == {"text": SCRIPT + "\u2028", "nan": None, "array": [1.5, None]}
    assert SCRIPT not in page({"text": SCRIPT})


def test_the_bundled_libraries_are_what_their_table_says_and_all_assets_are_packaged():
    lib = ASSETS / "lib"
    rows = re.findall(
        r"^\| `(.+?)` \|.*, `(.+?)` \| `([0-9a-f]{64})` \|$", (lib / "README.md").read_text(), re.M
    )
    for name, licence, digest in rows:
        assert hashlib.sha256((lib / name).read_bytes()).hexdigest() == digest
        assert "Permission" in (lib / licence).read_text()
    files = {file.name for file in lib.iterdir()} - {"README.md"}
    assert {name for row in rows for name in row[:2]} == files
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["treerpo_ray.viewer"]
    for file in ASSETS.rglob("*"):
        own = str(file.relative_to(ASSETS.parent))
        assert file.is_dir() or any(
            fnmatch(own, pattern) and own.count("/") == pattern.count("/") for pattern in patterns
        )


def test_the_command_serves_until_it_is_interrupted_and_then_ends_quietly(folder):
    command = [sys.executable, "-m", "treerpo_ray.viewer", folder, "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=PROJECT, **pipes) as process:
        address = process.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}/api/status") as answer:
            assert json.load(answer)["name"] == "small"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "stopped\n")
        assert process.returncode == STOPPED


def test_the_viewer_runs_without_ray_torch_and_vllm(folder, tmp_path):
    script = (
        "import sys; import treerpo_ray.viewer.server;"
        "from treerpo_ray.viewer.__main__ import main;"
        "code = main(sys.argv[1:]);"
        "heavy = {'ray', 'torch', 'vllm', 'transformers', 'matplotlib', 'datasets', 'wandb'};"
        "print(sorted(heavy & sys.modules.keys()));"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder, "--html", str(tmp_path / "page.html")],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
