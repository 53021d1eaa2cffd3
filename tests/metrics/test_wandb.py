"""W&B: a copy of the rows that can neither stop nor delay the run."""

import json
import math
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from tests.support.learning.records import make_record, some_training
from tests.support.learning.trees import make_tree
from tests.support.planted_secrets import SECRETS, holds_secret
from tests.support.project import PROJECT
from tests.support.saved_runs.offline_wandb import artifacts, metrics, runs
from tests.support.saved_runs.run_folders import contents
from tests.support.saved_runs.run_logs import COMMIT, FakeWandb, run_config, run_log_of, write
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.loss import LossSums
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.config import load
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.evaluate.evaluation import SAMPLES, Evaluation
from treerpo_ray.learner.stats import BatchStats
from treerpo_ray.metrics.output import console_for
from treerpo_ray.metrics.rows import latest_rows
from treerpo_ray.metrics.wandb.offline import offline_records, offline_rows
from treerpo_ray.metrics.wandb.panels import UNITS
from treerpo_ray.metrics.wandb.run import WandbRun, WandbSettings, group_of
from treerpo_ray.metrics.wandb.tables import LATE_ROWS, Tables
from treerpo_ray.records import to_table, with_training
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.checkpoints import Checkpoints
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", "/nowhere")  # else it would be set for good
    return fake


def test_wandb_gets_the_configuration_the_sources_and_the_rows(tmp_path, fake_wandb):
    config = run_config(tmp_path, "p")
    write(config, [{"step": 0, "eval/pass_at_1": 0.5}, {"step": 1, "reward/mean": 0.5}])
    assert fake_wandb.rows[1]["reward/mean"] == 0.5
    assert fake_wandb.is_finished
    assert fake_wandb.settings["mode"] is None
    shown = fake_wandb.settings["config"]
    assert shown["run"]["name"] == "small" and shown["commit"] == COMMIT
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
        **{"step": None, "time": None, "tokens/total": None},
        **{"loss/*": "step", "tokens/*": "step"},
        **{"eval/*": "tokens/total", "reward/*": "tokens/total"},
    }
    assert fake_wandb.hidden == {"step", "time"}
    assert [row["tokens/total"] for row in fake_wandb.rows] == [0, 100, 100, 250]


def test_names_have_units_and_what_never_changes_has_no_panel(tmp_path, fake_wandb):
    row = {"step": 1, "length/mean": 40.0, "loss/kl": 0.1, "mismatch/max": 0.2, "version": 1}
    evaluation = {"step": 1, "eval/pass_at_1": 0.5, "eval/length": 41.0, "eval/top_p": 1.0}
    write(run_config(tmp_path, "p"), [row, evaluation])
    first, second = fake_wandb.rows
    assert first.keys() == {
        *("step", "time", "version", "tokens/total"),
        *("length/mean_tokens", "loss/kl_nats", "mismatch/max_nats"),
    }
    assert second["eval/length_tokens"] == 41.0
    assert fake_wandb.hidden == {"step", "time", "version", "eval/top_p"}
    assert fake_wandb.axes["eval/top_p"] == "tokens/total"


def test_units_are_given_to_metrics_that_there_are():
    loss = LossSums.from_vector(torch.ones(12)).metrics()
    batch = BatchStats(verdicts=Counter([Verdict.CORRECT])).metrics(0)
    assert UNITS.keys() <= {*batch, *loss, "eval/length"}


def test_evaluations_checkpoints_and_models_are_artifacts_that_lead_from_one_to_the_next(
    tmp_path, fake_wandb
):
    """Of a run with a seed in its name; what is large is referred to."""
    config = replace(run_config(tmp_path, "p"), run=RunConfig(name="a/s=1", root=str(tmp_path)))
    folder, root = RunFolder(config.folder), tmp_path / "a/s=1"
    result = {"step": 2, "pass_at_1": 0.5, "ci95_low": 0.4, "num_problems": 9, "scores": {"x": {}}}
    folder.publish_file("eval/step=000002.json", json.dumps(result, indent=1).encode())
    Checkpoints(folder, keep=2).save(2, contents("weights"))
    (root / "model").mkdir()
    (root / "model/config.json").write_text("{}")
    write(config, [{"step": 2, "eval/pass_at_1": 0.5}])
    [start] = fake_wandb.used
    assert start.type == "model" and start.metadata == {"path": config.model.path}
    logged = {artifact.type: artifact for artifact in fake_wandb.logged}
    assert len(fake_wandb.logged) == len(logged) == 3
    evaluation, checkpoint, model = (logged[k] for k in ("evaluation", "checkpoint", "model"))
    assert evaluation.name == "a_s_1-evaluation" and evaluation.aliases == ["latest", "step-2"]
    assert evaluation.metadata.items() >= {"step": 2, "pass_at_1": 0.5, "num_problems": 9}.items()
    assert json.loads(evaluation.files["scores.json"]) == result
    assert evaluation.references["samples.parquet"] == f"file://{root}/eval/step=000002.parquet"
    assert checkpoint.aliases == ["latest", "step-2"] and checkpoint.metadata["step"] == 2
    assert "state.pt" in checkpoint.files["files.json"]
    assert checkpoint.references == {"checkpoint": f"file://{root}/checkpoints/step=000002"}
    assert model.references == {"model": f"file://{root}/model"}
    assert model.metadata["place"] == f"file://{root}/model"


def test_artifacts_that_fail_stop_no_metrics(tmp_path, fake_wandb, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError("no room")

    for name in ("log_artifact", "use_artifact"):
        monkeypatch.setattr(fake_wandb, name, fail)
    config = run_config(tmp_path, "p")
    RunFolder(config.folder).publish_file("eval/step=000001.json", b'{"step": 1}')
    RunFolder(config.folder).publish_file("eval/step=000002.json", b"torn")
    write(config, [{"step": 1, "eval/pass_at_1": 0.5}, {"step": 2}])
    assert len(fake_wandb.rows) == 2 and fake_wandb.is_finished


def test_in_a_sweep_the_run_has_the_id_that_wandb_gives_it(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setattr(FakeWandb, "id", "of-the-sweep")
    write(run_config(tmp_path, "p"), [{"step": 1}])
    assert (tmp_path / "small/wandb_id").read_text() == "of-the-sweep"


def test_the_sweep_is_one_that_wandb_takes_and_all_its_runs_can_be_loaded(tmp_path):
    """With the words that W&B's own agent makes of it."""
    sweep = yaml.safe_load((PROJECT / "conf/sweep.yaml").read_text())
    assert sweep["method"] in ("grid", "random", "bayes")
    evaluated = Evaluation.__dataclass_fields__.keys()
    assert sweep["metric"]["name"].removeprefix("eval/") in evaluated
    assert sweep["metric"]["goal"] == "maximize"
    names = set()
    for key, space in sweep["parameters"].items():
        ends = [space[end] for end in ("min", "max", "value") if end in space]
        for value in space.get("values", ends):
            own = {each: _one_of(other) for each, other in sweep["parameters"].items()}
            args = {each: {"value": other} for each, other in (own | {key: value}).items()}
            made = create_sweep_command_args({"args": args})
            words = [word for part in sweep["command"] for word in made.get(part[2:-1], [part])]
            assert words[:2] == ["${interpreter}", "${program}"]
            assert (PROJECT / sweep["program"]).is_file()
            _, given = console_for(words[2:])
            config = load([*given, f"run.root={tmp_path}"])
            assert f"{attrgetter(key)(config)}" == f"{value}"
            assert config.metrics.wandb_project and config.evaluate.data.path
            names.add(config.run.name)
    assert len(names) > 5  # each combination is a run folder of its own


def _one_of(space):
    return space["values"][0] if "values" in space else space.get("value", space.get("min"))


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
    tables = Tables(
        folder=folder,
        has_trees=True,
        make_page=lambda place, refs: f"page of {place} {' '.join(refs)}",
    )
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
    training = some_training(tree)
    table = with_training(to_table([record]), [training])
    folder.publish_table(saved_trees.name(1, 0), table)
    found = tables.due(1)
    assert found.keys() == {"trees/steps", "trees/page"} and tables.due(2) == {}
    assert found["trees/page"] == f"page of {config.folder} 1:{record.ticket}"
    columns, data = found["trees/steps"]
    values, advantages = mean_backup(record.tree, record.rewards), columns.index("advantage")
    assert [line[columns.index("value")] for line in data] == pytest.approx(values.steps)
    given = [None if math.isnan(each) else each for each in training.advantages]
    assert [line[advantages] for line in data] == given  # what the learner gave, as it is saved
    assert [line[columns.index("answer")] for line in data if line[-1]] == [*record.leaf_texts]
    again = Tables(folder=folder, has_trees=True)  # after a resume
    again.pass_over(1)
    assert again.due(2) == {}
    (tmp_path / "small/eval/step=000003.parquet").write_bytes(b"torn")
    assert set(again.due(3)) <= {"trees/steps", "trees/page"}


def test_tables_are_looked_for_after_an_evaluation_alone(tmp_path, fake_wandb):
    config = run_config(tmp_path, "p")
    looked: list[str] = []

    class Folder(RunFolder):
        def glob(self, pattern):
            looked.append(pattern)
            return super().glob(pattern)

    for every in (0, 1):
        own = replace(config, metrics=replace(config.metrics, save_trees_every=every))
        tables = Tables(folder=Folder(config.folder), has_trees=bool(own.metrics.save_trees_every))
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
    run_log = run_log_of(config)
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
    run_log = run_log_of(run_config(tmp_path, "p"))
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

    run = WandbRun(
        settings=WandbSettings.of(run_config(tmp_path, "p"), commit=COMMIT),
        folder=tmp_path,
        rows=[],
        warn=warn,
    )
    assert is_failing.wait(600)
    run.close()
    assert told == ["wandb_stopped"]


def test_a_hanging_wandb_delays_nothing(tmp_path, fake_wandb):
    fake_wandb.hold.clear()
    config = run_config(tmp_path, "p")
    run_log = run_log_of(config, make_wandb=partial(WandbRun, max_waiting=2, close_s=900.0))
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
    run_log = run_log_of(run_config(tmp_path, "p"), make_wandb=partial(WandbRun, close_s=0.1))
    run_log.step({"step": 0})
    run_log.close()
    fake_wandb.hold.set()
    [notice] = run_log.notices_since(0)
    assert notice.fields["reason"].startswith("left out: not written within 0.1 s")


KILLED = """
import os, signal, sys
from tests.support.learning.records import make_record
from tests.support.saved_runs.run_logs import run_config, run_log_of, write
log = run_log_of(run_config(sys.argv[1], 'p'))
for step in range(3):
    log.step({'step': step, 'reward/mean': 0.1 * step, 'tokens/total': 10 * step})
assert log._wandb._writer.settle(600)
os.kill(os.getpid(), signal.SIGKILL)
"""
RESUMED = """
import sys
from tests.support.learning.records import make_record
from tests.support.saved_runs.run_logs import run_config, run_log_of, write
rows = [{'step': step, 'reward/mean': 0.1 * step, 'tokens/total': 10 * step} for step in (2, 3, 4)]
write(run_config(sys.argv[1], 'p'), [*rows, {'step': 4, 'eval/pass_at_1': 0.5}])
"""


def test_the_real_wandb_has_one_history_of_an_offline_run_that_was_killed_and_resumed(tmp_path):
    """Read back from the files that it would send."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    for script in (KILLED, RESUMED):
        command = [sys.executable, "-c", script, str(tmp_path)]
        subprocess.run(command, env=env, cwd=PROJECT, capture_output=True, check=False)
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


SHOWN = """
import json, sys
import pyarrow as pa
from tests.support.learning.records import make_record
from tests.support.saved_runs.run_folders import contents
from tests.support.saved_runs.run_logs import run_config, run_log_of, write
from tests.support.learning.trees import make_tree
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.config.files import to_yaml
from treerpo_ray.evaluate.evaluation import SAMPLES
from treerpo_ray.records import to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.checkpoints import Checkpoints
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict
config = run_config(sys.argv[1], 'p')
folder = RunFolder(config.folder)
folder.publish_file('config.yaml', to_yaml(config).encode())
scores = json.dumps({'step': 1, 'pass_at_1': 0.5})
folder.publish_file('eval/step=000001.json', scores.encode())
row = {'problem': 'a', 'question': '1+1=?', 'references': ['2'], 'sample': 0, 'text': '2'}
row |= {'verdict': 'correct', 'reward': 1.0, 'num_tokens': 1, 'is_cut_off': False, 'group': 0}
table = pa.Table.from_pylist([row], schema=SAMPLES)
folder.publish_table('eval/step=000001.parquet', table)
verdicts = Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG
record = make_record(make_tree([ROOT, ROOT, 0, 0]), verdicts)
folder.publish_table(saved_trees.name(1, 0), to_table([record]))
Checkpoints(folder, keep=2).save(1, contents('weights'))
row = {'step': 1, 'reward/mean': 0.5, 'tokens/total': 9}
write(config, [row, {'step': 1, 'eval/pass_at_1': 0.5, 'eval/length': 3.0}])
"""


def test_the_real_wandb_has_tables_a_page_of_trees_and_artifacts_in_the_run_folder(tmp_path):
    """Read back from the files that it would send; the page is the viewer's own."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, str(tmp_path)],
        env=env, cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [part] = (tmp_path / "small/wandb").glob("offline-run-*/*.wandb")
    [run] = (tmp_path / "small/wandb").glob("offline-run-*")
    records = list(offline_records(part.read_bytes()))
    [page] = run.glob("files/media/html/trees/page*.html")
    assert "Content-Security-Policy" in page.read_text() and '"tree' in page.read_text()
    assert len([*run.glob("files/media/table/trees/steps*")]) == 1
    assert len([*run.glob("files/media/table/eval/samples*")]) == 1
    *_, last = offline_rows(RunFolder(str(tmp_path / "small")), run.name.rpartition("-")[2])
    assert last["eval/length_tokens"] == 3 and "eval/length" not in last
    hidden = {m.name for m in metrics(records) if m.options.hidden}
    assert hidden == {"step", "time"}
    found = artifacts(records)
    assert {"evaluation", "checkpoint"} <= found.keys()
    evaluation, checkpoint = found["evaluation"], found["checkpoint"]
    assert sorted(evaluation.aliases) == sorted(checkpoint.aliases) == ["latest", "step-1"]
    assert json.loads(evaluation.metadata)["pass_at_1"] == 0.5
    referred = {c.path: c.ref for c in checkpoint.manifest.contents if c.ref}
    place = f"file://{tmp_path}/small/checkpoints/step=000001"
    assert referred["checkpoint/state.pt"] == f"{place}/state.pt"
    sent = [c for each in found.values() for c in each.manifest.contents if not c.ref]
    assert sum(c.size for c in sent) < 10_000  # no weight among it
    home = str(tmp_path / "small/wandb/")
    assert all(c.local_path.startswith(home) and Path(c.local_path).exists() for c in sent)


@pytest.mark.parametrize("key", [{}, {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}])
def test_the_real_wandb_writes_offline_files_without_a_key_or_a_connection(tmp_path, key):
    """In a process of its own: W&B starts a service and keeps global state."""
    script = (
        "from tests.support.saved_runs.run_logs import run_config, write; import sys;"
        "write(run_config(sys.argv[1], 'p'), [{'step': 0, 'reward/mean': 0.5}])"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= key
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb_stopped" not in done.stderr
    assert ("wandb_offline" in done.stderr) == bool(key)
    (saved,) = (tmp_path / "small/wandb").glob("offline-run-*/*.wandb")
    assert b"reward/mean" in saved.read_bytes()


def test_no_secret_of_the_environment_reaches_the_files_of_a_real_wandb(tmp_path):
    script = (
        "from tests.support.saved_runs.run_logs import run_config, write; import sys;"
        "write(run_config(sys.argv[1], 'p'), [{'step': 0, 'reward/mean': 0.5}])"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline"} | SECRETS,
        cwd=PROJECT,
    )
    files = [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert any(b"reward/mean" in path.read_bytes() for path in files if path.suffix == ".wandb")
    for path in files:
        assert not holds_secret(path.read_bytes())


def test_wandb_is_not_imported_when_it_is_off(tmp_path):
    script = (
        "from tests.support.saved_runs.run_logs import run_config, write; import sys;"
        "write(run_config(sys.argv[1]), [{'step': 0}]); print('wandb' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.stdout.strip() == "False", done.stderr
