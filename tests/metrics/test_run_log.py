import json
import math
import subprocess
import sys
import threading
import types
import uuid
from pathlib import Path

import fsspec
import pytest

from tests.support.secrets import SECRETS, holds_secret
from treerpo_ray.config import Config
from treerpo_ray.config.sections import MetricsConfig, RunConfig
from treerpo_ray.metrics import wandb as wandb_run
from treerpo_ray.metrics.run_log import Event, RunLog, latest_rows, read_lines
from treerpo_ray.run_folder import lines as spool

REPOSITORY = Path(__file__).parents[2]


def run_config(root, project=None):
    return Config(
        run=RunConfig(name="small", root=str(root)), metrics=MetricsConfig(wandb_project=project)
    )


def write(config, rows):
    run_log = RunLog(config)
    for row in rows:
        run_log.step(row)
    run_log.close()


class FakeWandb(types.ModuleType):
    """Stands where `import wandb` finds it; `hold` makes its log call hang."""

    def __init__(self, has_key=True, error=None):
        super().__init__("wandb")
        self.has_key, self.error = has_key, error
        self.rows, self.settings, self.is_finished = [], {}, False
        self.hold, self.is_logging = threading.Event(), threading.Event()
        self.hold.set()

    def login(self, prompt, verify):
        assert not prompt
        return self.has_key

    def Settings(self, **settings):
        return settings

    def init(self, **settings):
        self.settings = settings
        if self.error:
            raise self.error
        return self

    def define_metric(self, name, step_metric):
        self.axis = (name, step_metric)

    def log(self, row):
        self.is_logging.set()
        assert self.hold.wait(30)
        self.rows.append(row)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    run_log = RunLog(run_config(tmp_path))
    run_log.step({"step": 1, "reward/mean": 0.25})
    (row,) = map(json.loads, (tmp_path / "small/metrics.jsonl").read_text().splitlines())
    assert (row["step"], row["reward/mean"]) == (1, 0.25)
    assert row["time"] > 0


def test_not_a_number_is_null_on_disk_and_nan_when_read(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1, "loss/total": math.inf, "loss/kl": math.nan}])
    assert '"loss/total": null' in (tmp_path / "small/metrics.jsonl").read_text()
    (row,) = latest_rows(config.folder)
    assert math.isnan(row["loss/total"]) and math.isnan(row["loss/kl"])


def test_a_row_without_a_step_is_refused_and_leaves_no_line(tmp_path):
    run_log = RunLog(run_config(tmp_path))
    with pytest.raises(KeyError, match="step"):
        run_log.step({"reward/mean": 0.5})
    assert run_log.rows_since(0) == []


def test_rows_since_counts_the_rows_of_earlier_sessions(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1}, {"step": 2}])
    run_log = RunLog(config)
    num_rows = len(run_log.rows_since(0))
    run_log.step({"step": 3})
    assert num_rows == 2
    assert [row["step"] for row in run_log.rows_since(num_rows)] == [3]


def test_a_resume_replaces_what_was_rolled_back_and_keeps_it_in_the_file(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": step, "reward/mean": 0.0} for step in (1, 2, 3, 4)])
    write(config, [{"step": step, "reward/mean": 1.0} for step in (2, 3)])
    rows = latest_rows(config.folder)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0), (2, 1), (3, 1)]
    assert len(read_lines(config.folder, "metrics.jsonl")) == 6


def test_the_evaluation_of_a_step_joins_its_row(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1, "reward/mean": 0.5}, {"step": 1, "eval/pass_at_1": 0.4}])
    (row,) = latest_rows(config.folder)
    assert (row["reward/mean"], row["eval/pass_at_1"]) == (0.5, 0.4)


def test_a_line_that_a_crash_cut_short_is_dropped_by_reader_and_writer(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1}])
    with (tmp_path / "small/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')
    assert [row["step"] for row in latest_rows(config.folder)] == [1]
    write(config, [{"step": 2}])
    assert [row["step"] for row in latest_rows(config.folder)] == [1, 2]


def test_events_are_flat_lines(tmp_path):
    run_log = RunLog(run_config(tmp_path))
    run_log.event(Event(kind="ticket_issued", fields={"ticket": 7, "is_again": False}, time=1.5))
    run_log.event(Event(kind="version", fields={"version": 1, "mismatch": math.nan}, time=2.0))
    assert read_lines(str(tmp_path / "small"), "events.jsonl") == [
        {"time": 1.5, "kind": "ticket_issued", "ticket": 7, "is_again": False},
        {"time": 2.0, "kind": "version", "version": 1, "mismatch": None},
    ]


def test_an_event_field_may_not_hide_the_kind_or_the_time():
    with pytest.raises(ValueError, match="time"):
        Event(kind="version", fields={"time": 1.0})


def test_an_object_store_gets_the_files_while_the_run_goes_on_and_continues_them(monkeypatch):
    monkeypatch.setattr(spool, "UPLOAD_EVERY_S", 0.01)
    config = run_config(f"memory://{uuid.uuid4().hex}")
    run_log = RunLog(config)
    local = run_log._spool.path
    run_log.step({"step": 1})
    for _ in range(1000):
        if latest_rows(config.folder):
            break
        threading.Event().wait(0.01)
    assert [row["step"] for row in latest_rows(config.folder)] == [1]
    run_log.event(Event(kind="run_ended"))
    run_log.close()
    assert not local.exists()
    write(config, [{"step": 2}])
    assert [row["step"] for row in latest_rows(config.folder)] == [1, 2]
    assert [event["kind"] for event in read_lines(config.folder, "events.jsonl")] == ["run_ended"]


def test_a_store_that_takes_nothing_is_an_error_that_names_the_spool(monkeypatch):
    run_log = RunLog(run_config(f"memory://{uuid.uuid4().hex}"))
    run_log.step({"step": 1})

    def refuse(*args, **kwargs):
        raise ConnectionError("store is away")

    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", refuse)
    with pytest.raises(OSError, match=str(run_log._spool.path)):
        run_log.close()
    assert (run_log._spool.path / "metrics.jsonl").exists()


def test_wandb_gets_the_configuration_and_the_rows_on_the_step_axis(tmp_path, fake_wandb):
    write(run_config(tmp_path, "p"), [{"step": 1, "reward/mean": 0.5}])
    assert fake_wandb.axis == ("*", "step")
    assert fake_wandb.rows[0]["reward/mean"] == 0.5
    assert fake_wandb.is_finished
    assert fake_wandb.settings["mode"] is None
    assert fake_wandb.settings["config"]["run"]["name"] == "small"


def test_wandb_is_offline_without_a_key_and_resumes_under_its_id(tmp_path, fake_wandb):
    fake_wandb.has_key = False
    config = run_config(tmp_path, "p")
    write(config, [{"step": step} for step in (1, 2, 3)])
    first_id = fake_wandb.settings["id"]
    fake_wandb.rows = []
    write(config, [{"step": step} for step in (2, 3, 4)])
    assert fake_wandb.settings["mode"] == "offline"
    assert fake_wandb.settings["id"] == first_id
    assert [row["step"] for row in fake_wandb.rows] == [3, 4]


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
    assert len(latest_rows(config.folder)) == 5


def test_the_warning_of_a_failure_is_out_when_the_run_is_closed(tmp_path, fake_wandb):
    fake_wandb.error = RuntimeError("no such entity")
    is_failing, told = threading.Event(), []

    def warn(kind: str, reason: str) -> None:
        is_failing.set()
        threading.Event().wait(0.2)
        told.append(kind)

    run = wandb_run.WandbRun(run_config(tmp_path, "p"), tmp_path, -1, warn)
    assert is_failing.wait(10)
    run.close()
    assert told == ["wandb_stopped"]


def test_a_hanging_wandb_delays_nothing(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setattr(wandb_run, "QUEUE_ROWS", 2)
    monkeypatch.setattr(wandb_run, "CLOSE_S", 0.1)
    fake_wandb.hold.clear()
    config = run_config(tmp_path, "p")
    run_log = RunLog(config)
    run_log.step({"step": 0})
    assert fake_wandb.is_logging.wait(10)
    for step in range(1, 5):
        run_log.step({"step": step})
    run_log.close()
    fake_wandb.hold.set()
    [notice] = run_log.notices_since(0)
    assert notice.fields["reason"].startswith("it is too slow")
    assert len(latest_rows(config.folder)) == 5


def test_the_real_wandb_writes_offline_files_without_a_key(tmp_path):
    """In a process of its own: W&B starts a service and keeps global state."""
    script = (
        "from tests.metrics.test_run_log import run_config, write; import sys;"
        "write(run_config(sys.argv[1], 'p'), [{'step': 0, 'reward/mean': 0.5}])"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb_stopped" not in done.stderr
    (saved,) = (tmp_path / "small/wandb").glob("offline-run-*/*.wandb")
    assert b"reward/mean" in saved.read_bytes()


def test_no_secret_of_the_environment_reaches_the_files_of_a_real_wandb(tmp_path):
    script = (
        "from tests.metrics.test_run_log import run_config, write; import sys;"
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
        "from tests.metrics.test_run_log import run_config, write; import sys;"
        "write(run_config(sys.argv[1]), [{'step': 0}]); print('wandb' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.strip() == "False", done.stderr
