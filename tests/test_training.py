"""Whole runs: real Ray, real vLLM, real Ray Data and Ray Train, on two CPUs."""

import io
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

import pandas as pd
import pytest
import ray
import rich.console
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import holds_secret
from tests.test_notebook import execute, outputs
from treerpo_ray.actor import Actor, make_actor
from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.analysis import Run
from treerpo_ray.config import Config
from treerpo_ray.config_file import load
from treerpo_ray.console import Console
from treerpo_ray.engine_pool import EnginePool
from treerpo_ray.ledger import faults
from treerpo_ray.metrics import EVENTS_FILE, read_lines
from treerpo_ray.outcome import Outcome, finished_outcome
from treerpo_ray.plan import load_inputs
from treerpo_ray.records import TreeRecord
from treerpo_ray.shares import has_signal
from treerpo_ray.train import train

pytestmark = [pytest.mark.ray, pytest.mark.engine]

STRICT = ("gate.max_staleness=0", "gate.revisit=0.5")
"""Every prompt follows from the trees of the steps before."""


def run_training(config: Config, pool: Actor | None = None) -> tuple[Outcome, str]:
    """Train in the cluster that is connected; returns what the terminal showed too."""
    shown = io.StringIO()
    console = Console(config.run.num_steps, rich.console.Console(file=shown, width=120))
    return train(config, load_inputs(config), console, pool), shown.getvalue()


def assert_ledger(folder: str, *overrides: str) -> None:
    """Every ticket was consumed once, by its own step and no staler than allowed; all else of a
    finished run that `ledger` checks holds too."""
    config = load([f"{folder}/config.yaml", *overrides])
    assert faults(config, read_lines(folder, EVENTS_FILE)) == []


def trees_of(run: Run) -> dict[int, TreeRecord]:
    return {record.ticket: record for step in run.tree_steps() for record in run.trees(step)}


def sampled(record: TreeRecord) -> list[list[int]]:
    return [step.token_ids.tolist() for step in record.tree.steps]


def assert_versions_count_updates(metrics: pd.DataFrame) -> None:
    """Each step's version is the number of updates so far; a step that kept no group makes none."""
    metrics = metrics[metrics.index > 0]  # row 0 is the evaluation of the start
    updates = metrics["learner/grad_norm"].notna().cumsum()
    assert metrics["version"].tolist() == updates.tolist()


@pytest.fixture(scope="module")
def strict(small_config, ray_cluster) -> tuple[Run, Outcome, str]:
    """Three steps, strictly on-policy, half of the tickets back at prompts, without a break."""
    config = small_config("run.name=strict", "run.num_steps=3", "sync.probe_every=1", *STRICT)
    outcome, shown = run_training(config)
    return Run(config.folder), outcome, shown


def test_a_run_leaves_everything_that_its_folder_promises(strict) -> None:
    run, outcome, shown = strict
    folder = Path(run.folder)
    assert outcome.is_complete and outcome.before and outcome.after
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.yaml", "eval", "events.jsonl", "logs", "metrics.jsonl",
        "model", "trees",
    ]  # fmt: skip
    metrics = run.metrics()
    assert metrics.loc[1:, "tokens/sampled"].sum() == outcome.sampled_tokens
    assert metrics.loc[1:, "version"].tolist() == [1, 2, 3]
    assert len(run.evaluations()) == 2
    assert "3/3" in shown and "Pass@1" in shown


def test_no_secret_of_the_environment_is_in_the_run_folder(strict) -> None:
    run, _, shown = strict
    assert not holds_secret(shown.encode())
    for path in Path(run.folder).rglob("*"):
        assert not path.is_file() or not holds_secret(path.read_bytes()), path


def test_the_exported_model_is_what_was_trained(strict) -> None:
    run, _, _ = strict
    folder = Path(run.folder) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(
        Path(__file__).parents[1] / "treerpo_ray/quickstart/model"
    )
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


def test_every_ticket_is_consumed_once_by_its_step(strict) -> None:
    run, _, _ = strict
    events = run.events()
    assert events[events.kind == "consumed"]["step"].tolist() == [0, 1, 2]
    assert_ledger(run.folder)


def test_tickets_come_back_to_prompts_with_a_value_between_0_and_1(strict) -> None:
    run, _, _ = strict
    values: dict[str, float] = {}
    num_back = 0
    for step in run.tree_steps():
        batch = sorted(run.trees(step), key=lambda record: record.ticket)
        back = [values[record.prompt_id] for record in batch if record.prompt_id in values]
        assert all(0 < value < 1 for value in back)
        num_back += len(back)
        values |= {r.prompt_id: mean_backup(r.tree, r.rewards).root for r in batch}
    assert num_back > 1


def test_a_finished_run_is_not_run_again(strict, small_config) -> None:
    _, outcome, _ = strict
    config = small_config("run.name=strict", "run.num_steps=3", *STRICT)
    again = finished_outcome(config)
    assert again == outcome


def test_a_stopped_and_resumed_run_consumes_the_same_trees(strict, small_config) -> None:
    whole, _, _ = strict
    common = ("sync.probe_every=1", "run.name=resumed", *STRICT)
    first = small_config(*common, "run.num_steps=2")
    assert run_training(first)[0].is_complete
    config = small_config(*common, "run.num_steps=3")
    outcome, shown = run_training(config)
    assert outcome.is_complete
    assert "3/3" in shown and "2/3" not in shown  # only what is new
    assert_ledger(config.folder)
    ours, theirs = trees_of(Run(config.folder)), trees_of(whole)
    for ticket, record in ours.items():
        assert record.seed == theirs[ticket].seed
        assert sampled(record) == sampled(theirs[ticket])
    pd.testing.assert_series_equal(
        Run(config.folder).metrics()["loss/total"], whole.metrics()["loss/total"], rtol=1e-4
    )


def test_engines_that_served_another_run_grow_the_same_trees(strict, small_config) -> None:
    whole, _, _ = strict
    common = ("sync.probe_every=1", *STRICT)
    other = small_config(*common, "run.name=other", "run.num_steps=1", "evaluate.data.path=''")
    config = small_config(
        *common, "run.name=reused", "run.num_steps=2", "run.seed=0", "evaluate.data.path=''"
    )
    pool = make_actor(EnginePool, other, None)
    try:
        run_training(replace(other, run=replace(other.run, seed=1)), pool)
        outcome, _ = run_training(config, pool)
        # They hold the weights of a run, so that nothing else can be the start of one.
        held = small_config(*common, "run.name=held", "run.num_steps=1")
        with pytest.raises(RuntimeError, match="cannot evaluate the start"):
            run_training(held, pool)
    finally:
        ray.get(pool.stop.remote())
    assert outcome.is_complete
    run = Run(config.folder)
    assert (run.events().kind == "engine_serving").sum() == 0
    assert_ledger(run.folder)
    ours, theirs = trees_of(run), trees_of(whole)
    for ticket, record in ours.items():
        assert sampled(record) == sampled(theirs[ticket])
    assert run.metrics()["mismatch/max"].max() < 1e-3


def test_the_notebook_shows_a_real_run(strict) -> None:
    run, _, _ = strict
    assert [o for o in outputs(execute(run.folder)) if o.get("name") == "stderr"] == []


def test_two_workers_two_engines_and_a_lost_engine(small_config, ray_cluster) -> None:
    config = small_config(
        "run.name=two", "run.num_steps=6", "learner.num_workers=2", "engine.num_engines=2",
        "engine.resources.CPU=0.4", "learner.resources.CPU=0.4", "evaluate.data.path=''",
    )  # fmt: skip
    killer = threading.Thread(
        target=kill_an_engine_after_step, args=(config.folder, 2), daemon=True
    )
    killer.start()
    outcome, shown = run_training(config)
    killer.join()
    assert outcome.is_complete
    run = Run(config.folder)
    metrics, events = run.metrics(), run.events()
    assert (events.kind == "engine_lost").sum() == 1
    assert "engine lost" in shown
    assert metrics["staleness/max"].max() <= 1
    assert_versions_count_updates(metrics)
    assert_ledger(run.folder)
    assert (events.kind == "tree_finished").sum() == 36


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_lost_train_worker_is_made_good_from_the_last_checkpoint(
    strict, small_config, ray_cluster, staleness: int
) -> None:
    config = small_config(
        *STRICT, f"run.name=worker{staleness}", "run.num_steps=4", "sync.probe_every=1",
        f"gate.max_staleness={staleness}", "checkpoint.every=1", "evaluate.data.path=''",
    )  # fmt: skip
    killer = threading.Thread(
        target=kill_train_workers_after_steps, args=(config.folder, 1), daemon=True
    )
    killer.start()
    outcome, shown = run_training(config)
    killer.join()
    assert outcome.is_complete
    assert shown.count("learner lost") == 1 and shown.count("learner started") == 2
    run = Run(config.folder)
    assert run.metrics().index.tolist() == [1, 2, 3, 4]
    assert_versions_count_updates(run.metrics())
    assert_ledger(run.folder)
    assert run.metrics()["staleness/max"].max() <= staleness
    events = run.events()
    started = events[events.kind == "learner_started"]
    assert started["saved_trees"].tolist()[0] == 0
    # Whatever was sampled for later steps and is of a version that the checkpoint has.
    assert (events.kind == "tree_reused").sum() == started["saved_trees"].sum()
    if staleness == 1:
        assert started["saved_trees"].sum() > 0  # these tickets were out a whole step before
    else:
        # No block of the prefix cache outlived the weights that were rolled back.
        assert run.metrics()["mismatch/max"].max() < 1e-3
        ours, theirs = trees_of(run), trees_of(strict[0])
        assert len(theirs) == 18 and theirs.keys() <= ours.keys()
        for ticket, record in theirs.items():
            assert sampled(ours[ticket]) == sampled(record)


def test_failures_are_counted_anew_with_progress_and_no_evaluation_is_missed(
    small_config, ray_cluster
) -> None:
    config = small_config(
        "run.name=often", "run.num_steps=5", "checkpoint.every=1", "evaluate.every=2",
        "learner.max_failures=1",
    )  # fmt: skip
    # As the checkpoint is written the evaluation of the step is still to come.
    killer = threading.Thread(
        target=kill_train_workers_after_steps, args=(config.folder, 2, 3), daemon=True
    )
    killer.start()
    outcome, shown = run_training(config)
    killer.join()
    assert outcome.is_complete
    assert shown.count("learner started") == 3
    assert shown.count("learner lost") == 2
    run = Run(config.folder)
    assert run.metrics().index.tolist() == [0, 1, 2, 3, 4, 5]
    assert_versions_count_updates(run.metrics())
    assert_ledger(run.folder)
    assert run.evaluations()["step"].tolist() == [0, 2, 4, 5]
    assert [shown.count(f"step {step}: Pass@1") for step in (0, 2, 4, 5)] == [1, 1, 1, 1]


def kill_train_workers_after_steps(folder: str, *steps: int) -> None:
    """SIGKILL the first worker once the checkpoint of each of these steps is written."""
    for step in steps:
        while True:
            events = read_lines(folder, "events.jsonl")
            if any(e["kind"] == "checkpoint" and e["step"] == step for e in events):
                break
            time.sleep(0.05)
        started = [event["pid"] for event in events if event["kind"] == "learner_started"]
        os.kill(started[-1], SIGKILL)


def kill_an_engine_after_step(folder: str, step: int) -> None:
    """SIGKILL the first engine that serves, once `step` learner steps are done."""
    while len(read_lines(folder, "metrics.jsonl")) < step:
        time.sleep(0.1)
    events = read_lines(folder, "events.jsonl")
    os.kill(next(event["pid"] for event in events if event["kind"] == "engine_serving"), SIGKILL)


def test_a_run_in_which_nothing_can_be_learned_says_so_and_ends_well(
    small_config, ray_cluster
) -> None:
    config = small_config(
        "run.name=pruned", "tree.step_tokens=[3,3]", "evaluate.data.path=''",
        "run.num_steps=9", "run.max_sampled_tokens=361",  # a step has 6 trees of 60
    )  # fmt: skip
    Path(config.folder).mkdir(parents=True)
    (Path(config.folder) / "trees").touch()  # so that no tree can be saved
    outcome, shown = run_training(config)
    assert outcome.is_complete and outcome.sampled_tokens == 720
    assert finished_outcome(config) == outcome
    assert "write failed: what trees/step=000001/rank-0.parquet, reason NotADirectoryError" in shown
    assert shown.count("no step group was kept, so there was no update") == 2
    metrics = Run(config.folder).metrics()
    assert metrics["version"].tolist() == [0, 0]
    assert metrics["verdict/cut_off"].sum() > 0


def test_a_ticket_without_a_kept_group_draws_another_prompt(small_config, ray_cluster) -> None:
    config = small_config(
        "run.name=refill", "run.num_steps=3", "tree.num_children=[2]", "tree.step_tokens=[46]",
        "learner.num_workers=2", "learner.resources.CPU=0.4", "gate.max_redraws=4",
        "evaluate.data.path=''",
    )  # fmt: skip
    assert run_training(config)[0].is_complete
    run = Run(config.folder)
    assert_ledger(run.folder)
    trees = trees_of(run)
    redrawn = [tree for tree in trees.values() if tree.num_redraws]
    assert redrawn and all(tree.redrawn_tokens > 0 for tree in redrawn)
    assert all(has_signal(tree, config) or tree.num_redraws == 4 for tree in trees.values())
    metrics = run.metrics()
    assert metrics["gate/redraws"].sum() == sum(tree.num_redraws for tree in redrawn)
    own = sum(tree.tree.num_sampled_tokens for tree in trees.values())
    spent = own + sum(tree.redrawn_tokens for tree in redrawn)
    assert metrics["tokens/sampled"].sum() == spent
    assert metrics["staleness/max"].max() <= 1
