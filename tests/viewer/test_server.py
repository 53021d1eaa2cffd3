"""The viewer's server: what it tells and refuses."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from fnmatch import fnmatch

import numpy as np
import pytest

from tests.support.project import PROJECT
from tests.support.saved_runs.paper_run import SCRIPT
from tests.support.saved_runs.small_run import (
    metric_rows,
    save_trees,
    worked_record,
    write_small_run,
)
from tests.support.saved_runs.viewer import client_of
from treerpo_ray.algo.tree import Tree
from treerpo_ray.errors import STOPPED
from treerpo_ray.viewer.page import page
from treerpo_ray.viewer.reader import RunReader, parse_ref
from treerpo_ray.viewer.server import API, ASSETS, HEADERS
from treerpo_ray.viewer.wire import to_json

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
        assert process.communicate(timeout=600) == ("", "stopped\n")
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
