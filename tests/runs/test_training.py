"""Whole runs: real Ray, real vLLM, real Ray Data and Ray Train, on two CPUs."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pandas as pd
import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.planted_secrets import holds_secret
from tests.support.project import PROJECT, SMALL, load_script
from tests.support.ray_tables import actors, failed_tasks
from tests.support.saved_runs.notebooks import READ_A_RUN, complaints, execute
from tests.support.saved_runs.small_disk import small_disk
from tests.support.whole_runs import (
    STRICT,
    assert_gone,
    assert_promises_kept,
    assert_same_trees,
    assert_saved_trees_were_reused,
    assert_versions_count_updates,
    process_of,
    run_training,
    trees_of,
    wait_for_step,
)
from treerpo_ray.actor import make_actor
from treerpo_ray.config import Config, load
from treerpo_ray.driver.result import RunResult, finished_result
from treerpo_ray.engine.types import EngineSetup
from treerpo_ray.evaluate.evaluation import save_evaluation
from treerpo_ray.metrics.events import EVENTS_FILE
from treerpo_ray.metrics.rows import METRICS_FILE
from treerpo_ray.metrics.stage_metrics import FINISHED, METRICS
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.study.analysis import Run
from treerpo_ray.task import TreePoolApi
from treerpo_ray.tree_stream import has_signal

pytestmark = [pytest.mark.ray, pytest.mark.engine]

TOLD_S = 3.0
"""Time after which Ray's tables have what a process tells every second."""


@pytest.fixture(scope="module")
def kept(small_config, ray_cluster) -> Iterator[TreePoolApi]:
    """Engines that serve several runs, one after the other."""
    config = small_config("run.name=kept", "engine.resources.CPU=0.1", *STRICT)
    pool = make_actor(TreePool)(setup=EngineSetup.of(config), log_folder=None)
    yield pool
    ray.get(pool.stop.remote())


@dataclass(frozen=True)
class InRay:
    """What Ray tells of a run once it has ended."""

    actors: list[dict[str, str]]
    failed_tasks: list[tuple[str, str]]


@pytest.fixture(scope="module")
def first_run(small_config, kept) -> tuple[tuple[Run, RunResult, str], InRay]:
    """`strict`, and what Ray told of it before anything else was run, and killed, there."""
    config = small_config("run.name=strict", "run.num_steps=3", *STRICT)
    others = failed_tasks()  # of tests before, in the same session of Ray
    result, shown = run_training(config, kept)
    time.sleep(TOLD_S)
    return (Run(config.folder), result, shown), InRay(
        actors(), [task for task in failed_tasks() if task not in others]
    )


@pytest.fixture(scope="module")
def strict(first_run) -> tuple[Run, RunResult, str]:
    """Three steps, strictly on-policy, without a break, the first run on the kept engines; and what
    the terminal showed."""
    return first_run[0]


@pytest.fixture(scope="module")
def refilled(small_config, kept, strict) -> tuple[Run, Config]:
    """A run of two workers on the kept engines in which groups without a signal are drawn anew."""
    config = small_config(
        "run.name=refill", "run.num_steps=3", "tree.num_children=[2]", "tree.step_tokens=[46]",
        "learner.num_workers=2", "learner.resources.CPU=0.4", "gate.max_redraws=4",
        "evaluate.data.path=''",
    )  # fmt: skip
    assert run_training(config, kept)[0].is_complete
    return Run(config.folder), config


def test_a_run_leaves_everything_that_its_folder_promises(strict) -> None:
    run, result, shown = strict
    folder = Path(run.folder)
    assert result.is_complete and result.before and result.after
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.yaml", "eval", "events.jsonl", "logs", "metrics.jsonl",
        "model", "starts", "trees",
    ]  # fmt: skip
    metrics = run.metrics()
    assert metrics.loc[1:, "tokens/sampled"].sum() == result.sampled_tokens
    assert metrics.loc[1:, "version"].tolist() == [1, 2, 3]
    assert len(run.evaluations()) == 2
    trained = metrics.loc[1:, "tokens/trained"] / metrics.loc[1:, "tokens/sampled"]
    assert metrics.loc[1:, "tokens/trained_share"].tolist() == pytest.approx(trained.tolist())
    for stage in ("engines", "scoring", "learner"):  # the scoring began within the first step
        assert metrics.loc[2:, f"idle/{stage}_share"].between(0, 1).all()
    assert (metrics.loc[1:, "groups/duplicate_share"] < 1).all()
    assert metrics.loc[1:, "values/calibration_error"].between(0, 1).all()
    assert "3/3" in shown and "Pass@1" in shown


def test_a_whole_run_is_shown_by_its_names_and_without_a_failure(first_run) -> None:
    """As Ray's dashboard has it; the engines are those of another run, and still there."""
    _, told = first_run
    shown = {actor["name"]: actor for actor in told.actors}
    for stage in ("gate", "weight sync", "heartbeats"):
        actor = shown[f"{stage} of strict"]
        assert actor["repr"] == stage
        assert actor["state"] == "DEAD" and "INTENDED_USER_EXIT" in actor["told"]
    assert shown["engine 0"]["repr"] == "engine 0" and shown["engine 0"]["state"] == "ALIVE"
    assert told.failed_tasks == []


def test_what_rays_metrics_tell_of_a_run_stands_in_its_rows_and_events(strict) -> None:
    run, _, _ = strict
    rows, events = (RunFolder(run.folder).read_lines(file) for file in (METRICS_FILE, EVENTS_FILE))
    told = {name for row in rows for name in row} | {FINISHED}
    told |= {f"{event['kind']}.{name}" for event in events for name in event}
    sources = {source for metric in METRICS for source in metric.sources}
    # The pool is told of when a look at it finds another number.
    assert {source for source in sources - told if not source.startswith("pool.")} == set()


def test_no_secret_of_the_environment_is_in_the_run_folder(strict) -> None:
    run, _, shown = strict
    assert not holds_secret(shown.encode())
    for path in Path(run.folder).rglob("*"):
        assert not path.is_file() or not holds_secret(path.read_bytes()), path


def test_the_exported_model_is_what_was_trained(strict) -> None:
    run, _, _ = strict
    folder = Path(run.folder) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(PROJECT / "treerpo_ray/quickstart/model")
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("38+47=85")) == "38+47=85"


def test_strictly_on_policy_trees_are_of_the_learners_version(strict) -> None:
    run, _, _ = strict
    metrics = run.metrics().loc[1:]
    assert (metrics["staleness/max"] == 0).all()
    assert (metrics["mismatch/max"] < 1e-3).all()
    for step in run.tree_steps():
        for record in run.trees(step):
            assert record.tree.min_version == record.tree.max_version == step - 1


def test_saved_trees_tell_the_ratio_of_learner_to_engine_token_by_token(strict) -> None:
    run, _, _ = strict
    for step in run.tree_steps():
        records = run.trees(step)
        learned = np.concatenate([record.training.logprobs for record in records])
        sampled = np.concatenate([record.tree.logprobs for record in records])
        told = run.metrics().loc[step]
        assert np.isfinite(learned).sum() == told["tokens/trained"]
        mean = float(np.nanmean(np.abs(learned - sampled)))
        assert told["mismatch/mean"] == pytest.approx(mean, rel=1e-4)


def test_every_ticket_is_consumed_once_by_its_step(strict) -> None:
    run, _, _ = strict
    events = run.events()
    assert events[events.kind == "consumed"]["step"].tolist() == [0, 1, 2]
    assert_promises_kept(run.folder)


def test_a_finished_run_is_not_run_again(strict, small_config) -> None:
    _, result, _ = strict
    config = small_config("run.name=strict", "run.num_steps=3", *STRICT)
    again = finished_result(config)
    assert again == result


def test_engines_that_hold_the_weights_of_a_run_cannot_evaluate_the_start_of_another(
    strict, small_config, kept
) -> None:
    held = small_config("run.name=held", "run.num_steps=1", *STRICT)
    with pytest.raises(RuntimeError, match="cannot evaluate the start"):
        run_training(held, kept)


@pytest.mark.parametrize(
    ("options", "gradients"),
    [
        ([], "by the layer before the head"),
        (["--all-parameters"], "by all that is trained"),
    ],
)
def test_what_trees_would_need_is_measured_on_what_a_run_has_saved(
    strict, capsys, options: list[str], gradients: str
) -> None:
    run, _, _ = strict
    assert load_script("jobs/forks.py").forks([run.folder, "--steps", "1", *options]) == 0
    shown = capsys.readouterr()
    [line] = shown.out.splitlines()
    found = json.loads(line)
    assert found["steps"] == [run.metrics().index.max()] and found["gradients"] == gradients
    assert [each["num_children"] for each in found["shapes"]] == [[4, 4], [4, 2], [4, 1]]
    assert "6 trees of learner steps" in shown.err and "[4, 2]" in shown.err


def test_the_notebook_shows_a_real_run(strict) -> None:
    run, _, _ = strict
    assert complaints(execute(READ_A_RUN, TREERPO_RUN=run.folder)) == []


@pytest.mark.slow
def test_a_lost_worker_is_made_good_from_the_checkpoint_and_no_evaluation_is_missed(
    strict, small_config, kept
) -> None:
    """How often that may happen is counted in `tests/driver/test_run.py`."""
    config = small_config(
        "run.name=lost", "run.num_steps=4", "checkpoint.every=1", "evaluate.every=2", *STRICT
    )
    # The start is evaluated by engines that have served no run.
    save_evaluation(strict[1].before, RunFolder(config.folder))
    # As the checkpoint is written the evaluation of the step is still to come.
    killer = threading.Thread(
        target=kill_train_worker_after_step, args=(config.folder, 2), daemon=True
    )
    killer.start()
    result, shown = run_training(config, kept)
    killer.join()
    assert result.is_complete
    assert shown.count("learner started") == 2
    assert shown.count("learner lost") == 1
    run = Run(config.folder)
    assert run.metrics().index.tolist() == [1, 2, 3, 4]
    assert_versions_count_updates(run.metrics())
    assert_promises_kept(run.folder)
    assert run.metrics()["staleness/max"].max() == 0
    # No block of the prefix cache outlived the weights that were rolled back.
    assert run.metrics()["mismatch/max"].max() < 1e-3
    assert_saved_trees_were_reused(run)
    assert_same_trees(strict[0], run)  # those of the run that nothing befell
    assert run.evaluations()["step"].tolist() == [0, 2, 4]
    assert [shown.count(f"step {step}: Pass@1") for step in (2, 4)] == [1, 1]


def kill_train_worker_after_step(folder: str, step: int) -> None:
    """SIGKILL the first worker once the checkpoint of this step is written."""
    while True:
        events = RunFolder(folder).read_lines("events.jsonl")
        if any(e["kind"] == "checkpoint" and e["step"] == step for e in events):
            break
        time.sleep(0.05)
    [started] = [event["pid"] for event in events if event["kind"] == "learner_started"]
    os.kill(started, SIGKILL)


@pytest.mark.slow
def test_a_run_on_a_full_disk_waits_for_room_and_loses_nothing_nor_when_it_is_made_longer(
    small_config, kept, strict, tmp_path
) -> None:
    """There is room for one checkpoint; somebody makes more once the second one waits. Its engines
    have served another run."""
    whole, _, _ = strict
    with small_disk(tmp_path, megabytes=36) as disk:
        common = (
            "run.name=full", f"run.root={disk}", "checkpoint.every=1", "checkpoint.keep=1",
            "evaluate.data.path=''", *STRICT,
        )  # fmt: skip
        config = small_config(*common, "run.num_steps=2")
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * 20 * 2**20)

        def make_room() -> None:
            events = RunFolder(config.folder)
            while not any(e["kind"] == "write_waits" for e in events.read_lines("events.jsonl")):
                time.sleep(0.05)
            ballast.unlink()

        helper = threading.Thread(target=make_room, daemon=True)
        helper.start()
        result, shown = run_training(config, kept)
        helper.join()
        assert result.is_complete
        told = r"the disk \S+/disk of \S+/full is full: 10\.5 MB needed, \S+ MB free; waiting since"
        assert re.search(rf"write waits: checkpoint of step 2: {told}", shown)
        assert "write done: checkpoint of step 2, after" in shown

        result, shown = run_training(small_config(*common, "run.num_steps=3"), kept)
        assert result.is_complete
        assert "3/3" in shown and "2/3" not in shown  # only what is new
        run = Run(config.folder)
        assert (run.events().kind == "learner_started").sum() == 2
        assert not {"learner_lost", "engine_serving"} & set(run.events().kind)
        assert_promises_kept(run.folder, "run.num_steps=3")
        assert_same_trees(run, whole)
        metrics = run.metrics()
        assert metrics.index.tolist() == [1, 2, 3]
        assert metrics["mismatch/max"].max() < 1e-3
        pd.testing.assert_series_equal(
            metrics["loss/total"], whole.metrics()["loss/total"].loc[1:], rtol=1e-4
        )


def test_a_run_in_which_nothing_can_be_learned_says_so_and_ends_well(
    small_config, kept, strict
) -> None:
    config = small_config(
        "run.name=pruned", "tree.step_tokens=[3,3]", "evaluate.data.path=''",
        "run.num_steps=9", "run.max_sampled_tokens=361",  # a step has 6 trees of 60
    )  # fmt: skip
    Path(config.folder).mkdir(parents=True)
    (Path(config.folder) / "trees").touch()  # so that no tree can be saved
    result, shown = run_training(config, kept)
    assert result.is_complete and result.sampled_tokens == 720
    assert finished_result(config) == result
    assert "write failed: trees/step=000001/rank-0.parquet: NotADirectoryError" in shown
    # Told once, of both steps, with what can be done.
    told = "warning at step 1: no step group was kept, so there was no update; take prompts of"
    assert shown.count("no step group was kept") == shown.count(told) == 1
    metrics = Run(config.folder).metrics()
    assert metrics["version"].tolist() == [0, 0]
    assert metrics["verdict/cut_off"].sum() > 0


def test_a_ticket_without_a_kept_group_draws_another_prompt(refilled) -> None:
    run, config = refilled
    assert_promises_kept(run.folder)
    trees = trees_of(run)
    redrawn = [tree for tree in trees.values() if tree.num_redraws]
    assert redrawn and all(tree.redrawn_tokens > 0 for tree in redrawn)
    assert all(has_signal(tree, config.learner) or tree.num_redraws == 4 for tree in trees.values())
    metrics = run.metrics()
    assert metrics["gate/redraws"].sum() == sum(tree.num_redraws for tree in redrawn)
    own = sum(tree.tree.num_sampled_tokens for tree in trees.values())
    spent = own + sum(tree.redrawn_tokens for tree in redrawn)
    assert metrics["tokens/sampled"].sum() == spent
    assert metrics["staleness/max"].max() <= 1


@pytest.mark.slow
def test_a_train_worker_that_stands_still_ends_the_run_with_a_report(
    small_config, kept, strict
) -> None:
    config = small_config(
        "run.name=stalled", "run.num_steps=50", "evaluate.data.path=''",
        "engine.request_timeout_s=60", "engine.load_timeout_s=30",
        "run.stall_timeout_s=300",  # a busy machine takes minutes to start a group
    )  # fmt: skip
    stopped: set[psutil.Process] = set()
    ended = threading.Event()

    def stop() -> None:
        """Hold the worker, and any that takes its place: a machine short of memory loses some."""
        while not ended.wait(0.05):
            if any(
                row["step"] >= 1 for row in RunFolder(config.folder).read_lines("metrics.jsonl")
            ):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker = process_of(config.folder, "learner_started")
                    worker.suspend()
                    stopped.add(worker)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    try:
        # Which stage is named depends on what the worker was at: stopped as it waits, it is idle.
        with pytest.raises(RuntimeError, match=r"nothing moved for \d+ s: \w+") as caught:
            run_training(config, kept)
    finally:
        ended.set()
        stopper.join()
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    [report] = (Path(config.folder) / "logs").glob("stall-*.txt")
    assert str(report) in str(caught.value)
    assert "stalled: learner 0 (" in report.read_text()
    for stage in ("gate", "engines", "weight sync", "metrics", "scoring", "learner 0"):
        assert f"{stage} (" in report.read_text()


SETTINGS = [
    "run.name=killed",
    *STRICT,
    "run.num_steps=3",
    "checkpoint.every=1",
    "evaluate.data.path=''",
]


IN_TURNS = ("engine.sleep=true", "sync.transport=nccl")


def start_run(root: Path) -> subprocess.Popen[str]:
    """`jobs/train.py` with a cluster of its own, for the run that `strict` is without a break, on
    engines that sleep while the learner updates, and get its weights from a group."""
    return subprocess.Popen(
        [
            sys.executable,
            "jobs/train.py",
            *SMALL,
            *SETTINGS,
            *IN_TURNS,
            f"run.root={root}",
        ],
        cwd=PROJECT,
        # Ray's processes wait so long for a head that is gone before they end; else a minute.
        env=os.environ
        | {"PYTHONPATH": str(PROJECT), "RAY_gcs_rpc_server_reconnect_timeout_s": "3"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_after_its_head_and_its_driver_were_killed_the_same_command_goes_on_with_the_same_trees(
    strict, kept, tmp_path
) -> None:
    """The last time on engines that are kept: what goes on is in the run folder alone."""
    folder = tmp_path / "killed"
    headless = start_run(tmp_path)
    wait_for_step(str(folder), 1)
    core = process_of(str(folder), "engine_serving", "core")
    core.suspend()  # else the run might be over before Ray misses its head
    [head] = [p for p in psutil.Process(headless.pid).children() if p.name() == "gcs_server"]
    head.kill()
    _, shown = headless.communicate(timeout=1500)
    assert headless.returncode > 0 and "GCS may have been killed" in shown
    core.resume()
    assert_gone(core)

    killed = start_run(tmp_path)
    wait_for_step(str(folder), 2)
    core = process_of(str(folder), "engine_serving", "core")
    killed.kill()
    killed.communicate()
    assert_gone(core)
    newest = max((folder / "checkpoints").glob("step=*"))
    moments = "moments/shard-00001-model-00001-of-00001.safetensors"
    os.truncate(newest / moments, 100)

    result, shown = run_training(load([*SMALL, *SETTINGS, f"run.root={tmp_path}"]), kept)
    assert result.is_complete
    assert "checkpoint passed over: step" in shown
    assert f"{moments} is corrupt" in shown
    assert_promises_kept(str(folder))
    run = Run(str(folder))
    assert_same_trees(run, strict[0])
    metrics = run.metrics()
    assert metrics.index.tolist() == [1, 2, 3]
    assert_versions_count_updates(metrics)
    assert metrics["staleness/max"].max() == 0
    assert (run.events().kind == "learner_started").sum() == 3
