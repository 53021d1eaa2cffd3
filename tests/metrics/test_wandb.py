"""W&B: a copy of the rows that can neither stop nor delay the run."""

import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.support.planted_secrets import SECRETS, holds_secret
from tests.support.run_logs import FakeWandb, run_config, write
from treerpo_ray.metrics.run_log import RunLog, latest_rows
from treerpo_ray.metrics.wandb import WandbRun
from treerpo_ray.run_folder.files import RunFolder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_gets_the_configuration_and_the_rows_on_the_step_axis(tmp_path, fake_wandb):
    write(run_config(tmp_path, "p"), [{"step": 1, "reward/mean": 0.5}])
    assert fake_wandb.axis == ("*", "step")
    assert fake_wandb.rows[0]["reward/mean"] == 0.5
    assert fake_wandb.is_finished
    assert fake_wandb.settings["mode"] is None
    shown = fake_wandb.settings["config"]
    assert shown["run"]["name"] == "small"
    assert "check" in shown["verifier"] and "sources" not in shown["verifier"] | shown["learner"]


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

    run = WandbRun(run_config(tmp_path, "p"), folder=tmp_path, last_step=-1, warn=warn)
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
