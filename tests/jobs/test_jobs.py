"""The scripts as users call them: as a job of a cluster, as a command, with wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.drills.autoscale_demo import free_ports
from tests.support.project import PROJECT, SMALL, load_script

SCRIPT = [sys.executable, "jobs/train.py"]
TINY = [
    *[item for item in SMALL if not item.endswith(".yaml")],
    "run.num_steps=2",
    "gate.trees_per_step=4",
    "evaluate.data.num_problems=6",
]
PATIENCE_S = 1500
"""Far more than anything takes that is waited for."""
TOKEN = uuid.uuid4().hex
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *arguments], cwd=PROJECT, capture_output=True, text=True)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster started as a user starts it, with a token; yields the address of its job server."""
    folder = Path("/tmp") / f"tr{os.getpid()}"  # Ray's sockets need a short path
    gcs, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    head = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0",
            f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--temp-dir={folder}", "--disable-usage-stats",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--runtime-env-agent-port={runtime_env}",
            f"--metrics-export-port={metrics}",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            JobSubmissionClient(address, headers=WITH_TOKEN)
            break
        except ConnectionError:
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(0.5)
    yield address
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(timeout=PATIENCE_S)


def logs_of(client: JobSubmissionClient, entrypoint: str) -> list[str]:
    """Run a job to its good end; returns the lines of its log."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            job = client.submit_job(
                entrypoint=entrypoint, runtime_env={"working_dir": str(PROJECT)}
            )
            break
        except RuntimeError as error:  # the head's agent comes up after the job server
            assert "No available agent" in str(error) and time.monotonic() < deadline
            time.sleep(1)
    deadline = time.monotonic() + PATIENCE_S
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(1)
    logs = client.get_job_logs(job)
    assert status is JobStatus.SUCCEEDED, logs
    return logs.strip().splitlines()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.engine
def test_training_evaluation_and_comparison_run_when_they_are_submitted_to_a_cluster(
    cluster: str, tmp_path: Path
) -> None:
    comparison = {
        "base": ["conf/quickstart.yaml", *TINY],
        "references": ["grpo"],
        "settings": {"tiny": {"answer_tokens": 44, "sampled_tokens": 2000}},
        "arms": {"grpo": {"overrides": ["conf/methods/grpo.yaml", "tree.num_children=[2]"]}},
    }
    (tmp_path / "methods.yaml").write_text(json.dumps(comparison))  # which is YAML too
    with pytest.raises(AuthenticationError, match="Missing authentication token"):
        JobSubmissionClient(cluster).list_jobs()
    client = JobSubmissionClient(cluster, headers=WITH_TOKEN)
    overrides = " ".join([*TINY, f"run.root={tmp_path}", "run.name=job"])
    result = json.loads(
        logs_of(client, f"python jobs/train.py conf/quickstart.yaml {overrides}")[-1]
    )
    run = tmp_path / "job"
    assert result["run"] == str(run)
    assert (run / "model" / "model.safetensors").exists()

    benchmark = "evaluate.max_tokens=46 evaluate.benchmarks.quickstart.num_problems=6"
    evaluation = f"python jobs/evaluate.py {run} --benchmarks quickstart {benchmark}"
    result = json.loads(logs_of(client, evaluation)[-1])
    assert result["folder"] == str(tmp_path / "eval-job")
    assert result["scores"]["quickstart"]["pass@1"]["num_problems"] == 6
    assert (tmp_path / "eval-job/eval/quickstart.parquet").exists()

    logs = logs_of(client, f"python jobs/compare.py {tmp_path}/methods.yaml run.root={tmp_path}")
    assert any("grpo" in line and "Pass@1" not in line for line in logs)
    result = json.loads((tmp_path / "methods/tiny/grpo-0.json").read_text())
    assert result["version"].startswith("sources-")  # the job's copy of the project is no clone
    assert sum(result["curve"]["tokens/sampled"]) >= 2000
    assert (tmp_path / "methods/curves.png").exists()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`jobs/train.py` as a module: what it says of mistakes needs no process of its own."""
    return load_script(SCRIPT[1])


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON for programs, and nothing for whoever wants quiet."""
    few = ["prompts.num_problems=100", "evaluate.data.num_problems=20"]
    dry = ["--dry-run", str(PROJECT / "conf/quickstart.yaml"), f"run.root={tmp_path}", *few]
    assert script.main(dry) == 0
    plan = capsys.readouterr().err
    for word in ("tokens a question", "trees in flight", "staleness", "memory", "missing"):
        assert word in plan
    assert list(tmp_path.iterdir()) == []
    assert "complete" not in plan
    assert script.main(["--json", *dry]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert {line["kind"] for line in lines} == {"stage", "plan"}
    assert any(line.get("text", "").startswith("staleness") for line in lines)
    assert script.main(["--quiet", *dry]) == 0
    assert capsys.readouterr() == ("", "")


def test_help_explains_every_section() -> None:
    shown = run_script("--help").stdout
    for section in ("run", "model", "tree", "gate", "engine", "learner", "loss", "health"):
        assert f"\n{section}: " in shown


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lerning_rate=1", "did you mean learner.learning_rate?"),
        ("prompts.path=nowhere.jsonl", "nowhere.jsonl"),
        ("model.path=nowhere/model/x", "model.path="),
        ("learner.num_workers=5", "must be a multiple"),
        ("tree.delimiter='ab'", "must be one"),
        ("model.path=tests", "no config.json"),
        ("verifier.check=treerpo_ray.nothing", "verifier.check="),
        ("engine.kv_cache_gib=null", "engine.kv_cache_gib is needed"),
        ("engine.tensor_parallel=4", "needs as many GPUs"),
        ("evaluate.every=-1", "must be at least 0"),
    ],
)
def test_a_users_mistake_is_one_clear_line(
    script: ModuleType, override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--dry-run", str(PROJECT / "conf/quickstart.yaml"), override]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("error: ") and expected in lines[-1]


def test_a_training_of_nothing_asks_for_a_configuration(script: ModuleType, capsys) -> None:
    assert script.main(["--dry-run"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "error: name a configuration, such as conf/quickstart.yaml; --help tells more"


@pytest.mark.ray
def test_a_run_that_the_cluster_cannot_hold_says_what_is_missing(tmp_path: Path) -> None:
    many = ("engine.num_engines=99", "engine.kv_cache_gib=0.01")  # which its memory would hold
    done = run_script("conf/quickstart.yaml", f"run.root={tmp_path}", *many)
    assert done.returncode == 2
    assert "the cluster lacks {'CPU': " in done.stderr


OUTSIDER = """
import os, subprocess, sys, ray
from treerpo_ray.driver.cluster import connected
from treerpo_ray.config import Config
with connected(Config()):
    address = ray.get_runtime_context().gcs_address
    join = f"import ray; ray.init(address='{address}', log_to_driver=False)"
    for token in ("wrong", os.environ["RAY_AUTH_TOKEN"]):
        env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = subprocess.run([sys.executable, "-c", join], env=env, capture_output=True, text=True)
        print(done.returncode, "nauthenticated" in done.stderr)
"""


@pytest.mark.ray
def test_nobody_without_its_token_joins_the_ray_that_a_job_starts(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDER],
        cwd=PROJECT,
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["1 True", "0 False"], done.stderr
    assert not (tmp_path / ".ray").exists()  # the token is in no file


@pytest.mark.parametrize(
    "command", [["jobs/train.py", "--dry-run", "gone.yaml"], ["jobs/evaluate.py", "gone"]]
)
def test_the_first_line_comes_before_anything_that_takes_time(command: list[str]) -> None:
    """Python notes every module that it imports, and what that takes, on the same stream."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=PROJECT, capture_output=True, text=True
    )
    before, _, after = done.stderr.partition("loading the libraries ...")
    assert " treerpo_ray.config.config\n" in after and done.returncode == 2
    names = {line.rpartition("|")[2].strip() for line in before.splitlines()}
    assert "rich.console" in names
    heavy = {"numpy", "pyarrow", "omegaconf", "torch", "ray", "transformers", "vllm", "fsspec"}
    assert not heavy & names
