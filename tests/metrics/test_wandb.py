"""W&B: a copy of the rows that can neither stop nor delay the run."""

import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.offline_wandb import metrics, runs
from tests.support.planted_secrets import SECRETS, holds_secret
from tests.support.records import make_record
from tests.support.run_logs import FakeWandb, run_config, write
from tests.support.trees import make_tree
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.evaluate.evaluation import SAMPLES
from treerpo_ray.metrics.offline_wandb import offline_records, offline_rows
from treerpo_ray.metrics.run_log import RunLog, latest_rows
from treerpo_ray.metrics.sources import version_of
from treerpo_ray.metrics.tables import LATE_ROWS, Tables
from treerpo_ray.metrics.wandb import WandbRun, group_of
from treerpo_ray.records import to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_gets_the_configuration_the_sources_and_the_rows(tmp_path, fake_wandb):
    config = run_config(tmp_path, "p")
    write(config, [{"step": 0, "eval/pass_at_1": 0.5}, {"step": 1, "reward/mean": 0.5}])
    assert fake_wandb.rows[1]["reward/mean"] == 0.5
    assert fake_wandb.is_finished
    assert fake_wandb.settings["mode"] is None
    shown = fake_wandb.settings["config"]
    assert shown["run"]["name"] == "small" and shown["commit"] == version_of(REPOSITORY)
    assert "check" in shown["verifier"] and "sources" not in shown["verifier"] | shown["learner"]


def test_scores_are_drawn_over_all_sampled_tokens_and_the_rest_over_steps(tmp_path, fake_wandb):
    rows = [
        {"step": 0, "eval/pass_at_1": 0.2},
        {"step": 1, "reward/mean": 0.5, "loss/kl": 0.0, "tokens/total": 100},
        {"step": 1, "eval/pass_at_1": 0.3},
        {"step": 2, "reward/mean": 0.5, "tokens/total": 250},
    ]
    write(run_config(tmp_path, "p"), rows)
    assert fake_wandb.axes == {
        **{"step": None, "tokens/total": None, "loss/*": "step", "tokens/*": "step"},
        **{"eval/*": "tokens/total", "reward/*": "tokens/total"},
    }
    assert [row["tokens/total"] for row in fake_wandb.rows] == [0, 100, 100, 250]


def test_runs_that_differ_by_their_seed_are_a_group():
    names = {
        ("quickstart", 0): "quickstart",
        ("quickstart-seed=1", 1): "quickstart",
        ("quickstart-seed=1-gspo", 1): "quickstart-gspo",
        ("quickstart-seed=12", 1): "quickstart-seed=12",
        ("a_seed3", 3): "a",
        ("treerpo-2", 2): "treerpo",
        ("treerpo-2", 3): "treerpo-2",
        ("v2", 2): "v2",
        ("seed=1", 1): "seed=1",
        ("1", 1): "1",
    }
    assert {key: group_of(*key) for key in names} == names


def test_wandb_is_offline_without_a_key_and_resumes_under_its_id(tmp_path, fake_wandb):
    fake_wandb.has_key = False
    config = run_config(tmp_path, "p")
    write(config, [{"step": step} for step in (1, 2, 3)])
    first_id = fake_wandb.settings["id"]
    fake_wandb.rows.clear()
    write(config, [{"step": step} for step in (2, 3, 4)])
    assert fake_wandb.settings["mode"] == "offline"
    assert fake_wandb.settings["id"] == first_id
    # This W&B has lost all rows of the first session: there are no files of it.
    assert [row["step"] for row in fake_wandb.rows] == [1, 2, 3, 4]
    assert fake_wandb.numbers[3:] == [0, 1, 2, 5]  # lines of metrics.jsonl


def test_a_resumed_run_sends_what_was_on_its_way_and_nothing_twice(tmp_path, fake_wandb):
    """The evaluation of a step is a row of its own."""
    config = run_config(tmp_path, "p")
    write(config, [{"step": 1}, {"step": 1, "eval/pass_at_1": 0.3}, {"step": 2}])
    sent = tmp_path / "small/wandb_rows"
    assert sent.read_text() == "0 online\n1 online\n2 online\n"
    sent.write_text("0 online\n1 online\n2 onl")  # the run was killed while it noted the third
    write(config, [{"step": 2}, {"step": 2, "eval/pass_at_1": 0.4}, {"step": 3}])
    write(config, [{"step": 2, "eval/pass_at_1": 0.4}, {"step": 3}, {"step": 4}])
    assert [(row["step"], "eval/pass_at_1" in row) for row in fake_wandb.rows] == [
        (1, False), (1, True), (2, False),  # and once more, as it is not known to have arrived
        (2, False), (2, True), (3, False), (4, False),
    ]  # fmt: skip
    assert fake_wandb.numbers == [0, 1, 2, 2, 4, 5, 8]


def test_answers_and_trees_are_tables_each_once(tmp_path, fake_wandb):
    config = run_config(tmp_path, "p")
    folder = RunFolder(config.folder)
    tables = Tables(folder, config)
    assert tables.due(0) == {}  # there is nothing yet
    row = {
        **{"problem": "a", "question": "1+1=?", "references": ["2", "two"], "text": "#### 2"},
        **{"verdict": "partial", "reward": 0.3, "num_tokens": 3, "is_cut_off": False, "group": 0},
    }
    rows = [row | {"sample": sample} for sample in (0, 1)]
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    folder.publish_table("eval/step=000000.parquet", table)
    shown = tables.due(0)
    assert list(shown) == ["eval/samples"]  # and no trees
    assert shown["eval/samples"] == (
        ["step", "problem", "question", "references", "text", "verdict", "reward", "num_tokens"],
        [[0, "a", "1+1=?", "2 or two", "#### 2", "partial", 0.3, 3]],
    )
    tree = make_tree([ROOT, ROOT, 0, 0])
    record = make_record(tree, (Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG))
    folder.publish_table(saved_trees.name(1, 0), to_table([record]))
    [(name, (columns, data))] = tables.due(1).items()
    assert name == "trees" and tables.due(2) == {}
    values, advantages = mean_backup(record.tree, record.rewards), columns.index("advantage")
    assert [line[columns.index("value")] for line in data] == pytest.approx(values.steps)
    assert any(line[advantages] is not None for line in data)
    assert [line[columns.index("answer")] for line in data if line[-1]] == [*record.leaf_texts]
    again = Tables(folder, config)  # after a resume
    again.pass_over(1)
    assert again.due(2) == {}
    (tmp_path / "small/eval/step=000003.parquet").write_bytes(b"torn")
    assert set(again.due(3)) <= {"trees"}


def test_tables_are_looked_for_after_an_evaluation_alone(tmp_path, fake_wandb):
    config = run_config(tmp_path, "p")
    looked: list[str] = []

    class Folder(RunFolder):
        def glob(self, pattern):
            looked.append(pattern)
            return super().glob(pattern)

    for every in (0, 1):
        own = replace(config, metrics=replace(config.metrics, save_trees_every=every))
        tables = Tables(Folder(config.folder), own)
        tables.evaluated(1)
        looked.clear()
        for step in range(1, 4 * LATE_ROWS):
            assert tables.due(step) == {}
        assert len(looked) == LATE_ROWS  # they may be written late, or never
        rows = [dict.fromkeys(SAMPLES.names) | {"problem": "a", "sample": 0, "references": []}]
        samples = pa.Table.from_pylist(rows, schema=SAMPLES)
        RunFolder(config.folder).publish_table("eval/step=000040.parquet", samples)
        tables.evaluated(40)
        looked.clear()
        assert list(tables.due(40)) == ["eval/samples"]
        for step in range(41, 60):
            assert tables.due(step) == {}
        looks = [each for each in looked if each.startswith("eval/")]
        assert len(looks) == (LATE_ROWS if every else 1)  # for its trees
        assert tables.due(None) == {}
        (tmp_path / "small/eval/step=000040.parquet").unlink()


def test_the_evaluation_of_a_runs_end_takes_the_place_of_the_interim_one(tmp_path, fake_wandb):
    """In one session, and where a run was stopped at the step and then finished there."""

    def evaluated(step, samples, value):
        return {"step": step, "eval/pass_at_1": value, "eval/num_samples": samples}

    config = run_config(tmp_path, "p")
    write(config, [{"step": 1}, evaluated(1, 1, 0.2), {"step": 2}, evaluated(2, 1, 0.3)])
    write(config, [evaluated(2, 1, 0.3), evaluated(1, 4, 0.1), evaluated(2, 4, 0.5), {"step": 2}])
    write(config, [evaluated(2, 4, 0.5), evaluated(2, 1, 0.3)])
    assert [row.get("eval/pass_at_1") for row in fake_wandb.rows] == [None, 0.2, None, 0.3, 0.5]
    assert fake_wandb.numbers == [0, 1, 2, 3, 6]


def test_a_broken_wandb_warns_once_and_loses_nothing(tmp_path, fake_wandb):
    fake_wandb.error = RuntimeError("no such entity")
    config = run_config(tmp_path, "p")
    run_log = RunLog(config)
    for step in range(5):
        run_log.step({"step": step})
    run_log.close()
    [notice] = run_log.notices_since(0)
    assert (notice.kind, notice.fields["reason"]) == (
        "wandb_stopped", "RuntimeError: no such entity; metrics.jsonl has all rows"
    )  # fmt: skip
    assert len(latest_rows(RunFolder(config.folder))) == 5


@pytest.mark.parametrize("message", ["no connection\nin 90 s", ""])
def test_a_wandb_that_does_not_answer_is_written_offline_and_told_once(
    tmp_path, fake_wandb, message
):
    fake_wandb.error_online = ConnectionError(message)
    run_log = RunLog(run_config(tmp_path, "p"))
    for step in range(3):
        run_log.step({"step": step})
    run_log.close()
    [notice] = run_log.notices_since(0)
    assert notice.kind == "wandb_offline"
    why = message.splitlines()[0] if message else "ConnectionError"
    sync = f"`wandb sync {tmp_path}/small/wandb/offline-run-*` sends it later"
    assert notice.fields["reason"] == f"{why}; {sync}"
    assert [row["step"] for row in fake_wandb.rows] == [0, 1, 2]


def test_the_warning_of_a_failure_is_out_when_the_run_is_closed(tmp_path, fake_wandb):
    fake_wandb.error = RuntimeError("no such entity")
    is_failing, told = threading.Event(), []

    def warn(kind: str, reason: str) -> None:
        is_failing.set()
        threading.Event().wait(0.2)
        told.append(kind)

    run = WandbRun(run_config(tmp_path, "p"), folder=tmp_path, rows=[], warn=warn)
    assert is_failing.wait(600)
    run.close()
    assert told == ["wandb_stopped"]


def test_a_hanging_wandb_delays_nothing(tmp_path, fake_wandb):
    fake_wandb.hold.clear()
    config = run_config(tmp_path, "p")
    run_log = RunLog(config, make_wandb=partial(WandbRun, max_waiting=2, close_s=900.0))
    run_log.step({"step": 0})
    assert fake_wandb.is_logging.wait(600)
    for step in range(1, 5):
        run_log.step({"step": step})
    run_log.close()
    fake_wandb.hold.set()
    [notice] = run_log.notices_since(0)
    told = "left out: 2 before it still wait; metrics.jsonl has all rows"
    assert (notice.kind, notice.fields["reason"]) == ("wandb_stopped", told)
    assert len(latest_rows(RunFolder(config.folder))) == 5


def test_a_wandb_that_does_not_finish_holds_up_the_end_only_for_a_while(tmp_path, fake_wandb):
    fake_wandb.hold.clear()
    run_log = RunLog(run_config(tmp_path, "p"), make_wandb=partial(WandbRun, close_s=0.1))
    run_log.step({"step": 0})
    run_log.close()
    fake_wandb.hold.set()
    [notice] = run_log.notices_since(0)
    assert notice.fields["reason"].startswith("left out: not written within 0.1 s")


KILLED = """
import os, signal, sys
from tests.support.records import make_record
from tests.support.run_logs import run_config, write
from treerpo_ray.metrics.run_log import RunLog
log = RunLog(run_config(sys.argv[1], 'p'))
for step in range(3):
    log.step({'step': step, 'reward/mean': 0.1 * step, 'tokens/total': 10 * step})
assert log._wandb._writer.settle(600)
os.kill(os.getpid(), signal.SIGKILL)
"""
RESUMED = """
import sys
from tests.support.records import make_record
from tests.support.run_logs import run_config, write
rows = [{'step': step, 'reward/mean': 0.1 * step, 'tokens/total': 10 * step} for step in (2, 3, 4)]
write(run_config(sys.argv[1], 'p'), [*rows, {'step': 4, 'eval/pass_at_1': 0.5}])
"""


def test_the_real_wandb_has_one_history_of_an_offline_run_that_was_killed_and_resumed(tmp_path):
    """Read back from the files that it would send."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    for script in (KILLED, RESUMED):
        command = [sys.executable, "-c", script, str(tmp_path)]
        subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, check=False)
    parts = sorted((tmp_path / "small/wandb").glob("offline-run-*/*.wandb"))
    found = [list(offline_records(part.read_bytes())) for part in parts]
    assert len(parts) == 2
    ids = {run.run_id for part in found for run in runs(part)}
    assert len(ids) == 1
    assert {run.run_group for part in found for run in runs(part)} == {"small"}
    rows = offline_rows(RunFolder(str(tmp_path / "small")), ids.pop())
    assert [(row["_step"], row["step"], row["tokens/total"]) for row in rows] == [
        (0, 0, 0), (1, 1, 10), (2, 2, 20), (4, 3, 30), (5, 4, 40), (6, 4, 40)
    ]  # fmt: skip
    assert [row.get("eval/pass_at_1") for row in rows] == [*[None] * 5, 0.5]
    axes = {m.glob_name: m.step_metric for part in found for m in metrics(part) if m.glob_name}
    assert axes["eval/*"] == axes["reward/*"] == "tokens/total"


@pytest.mark.parametrize("key", [{}, {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}])
def test_the_real_wandb_writes_offline_files_without_a_key_or_a_connection(tmp_path, key):
    """In a process of its own: W&B starts a service and keeps global state."""
    script = (
        "from tests.support.run_logs import run_config, write; import sys;"
        "write(run_config(sys.argv[1], 'p'), [{'step': 0, 'reward/mean': 0.5}])"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= key
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb_stopped" not in done.stderr
    assert ("wandb_offline" in done.stderr) == bool(key)
    (saved,) = (tmp_path / "small/wandb").glob("offline-run-*/*.wandb")
    assert b"reward/mean" in saved.read_bytes()


def test_no_secret_of_the_environment_reaches_the_files_of_a_real_wandb(tmp_path):
    script = (
        "from tests.support.run_logs import run_config, write; import sys;"
        "write(run_config(sys.argv[1], 'p'), [{'step': 0, 'reward/mean': 0.5}])"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline"} | SECRETS,
        cwd=REPOSITORY,
    )
    files = [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert any(b"reward/mean" in path.read_bytes() for path in files if path.suffix == ".wandb")
    for path in files:
        assert not holds_secret(path.read_bytes())


def test_wandb_is_not_imported_when_it_is_off(tmp_path):
    script = (
        "from tests.support.run_logs import run_config, write; import sys;"
        "write(run_config(sys.argv[1]), [{'step': 0}]); print('wandb' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.strip() == "False", done.stderr
