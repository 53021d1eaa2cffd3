"""The audit of a run: what it finds wrong, and what it lets pass."""

import math
import uuid
from pathlib import Path

import pytest
import torch

from tests.support.learning.records import tree_of
from tests.support.learning.tiny_models import save_tiny_model
from tests.support.saved_runs.run_logs import run_log_of
from treerpo_ray.config import load
from treerpo_ray.learner.policy import load_policy
from treerpo_ray.records import to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study import audit
from treerpo_ray.study.audit import ConsumedTree, check_promises, standing
from treerpo_ray.weights.manifest import pack_weights

NUM_STEPS, SIZE = 3, 2


def event(time, kind, **fields):
    return {"time": float(time), "kind": kind, **fields}


def consumed(time, step, version):
    return event(time, "consumed", step=step, first=step * SIZE, trees=SIZE, version=version)


def good_events():
    """Step 1 is done twice: the learner died after it, and began again at the checkpoint of 1."""
    return [
        event(0, "learner_started", step=0, version=0, pid=1),
        event(0, "published", version=0, digest="start"),
        consumed(1, 0, 1),
        event(1, "checkpoint", step=1, version=1),
        consumed(2, 1, 2),
        event(3, "learner_started", step=1, version=1, pid=2),
        consumed(4, 1, 2),
        event(4, "checkpoint", step=2, version=2),
        event(5, "published", version=2, digest="end"),
        consumed(5, 2, 2),  # nothing was kept, so there was no update
        event(5, "checkpoint", step=3, version=2),
    ]


def good_rows():
    versions = {1: 1.0, 2: 2.0, 3: 2.0}
    return [
        {"step": step, "version": v, "engine/oldest_version": v, "engine/newest_version": v}
        for step, v in versions.items()
    ]


def good_trees():
    spans = {0: (0, 0), 1: (0, 1), 2: (1, 2)}
    return {
        step: [
            ConsumedTree(ticket=step * SIZE + i, min_version=low, max_version=high)
            for i in range(SIZE)
        ]
        for step, (low, high) in spans.items()
    }


def faults(events=None, rows=None, trees=None, max_staleness=1):
    return check_promises(
        events or good_events(),
        rows or good_rows(),
        trees or good_trees(),
        num_steps=NUM_STEPS,
        trees_per_step=SIZE,
        max_staleness=max_staleness,
    )


def test_a_run_that_kept_its_promises_has_no_faults() -> None:
    assert faults() == []


def test_a_restart_takes_back_what_came_after_its_step() -> None:
    kept, wrong = standing(good_events())
    assert [(e["time"], e["step"]) for e in kept] == [(1.0, 0), (4.0, 1), (5.0, 2)]
    assert wrong == []


def test_a_step_that_was_consumed_twice_is_found() -> None:
    events = good_events()
    events.insert(3, consumed(1.5, 0, 1))
    assert "step 0 was consumed when 1 was due" in faults(events)


def test_a_step_that_was_left_out_is_found() -> None:
    events = [e for e in good_events() if e["time"] != 4.0]
    assert "step 2 was consumed when 1 was due" in faults(events)
    assert "2 steps stand, should be 3" in faults(events)


def test_a_learner_that_goes_on_ahead_of_what_was_consumed_is_found() -> None:
    events = [*good_events(), event(6, "learner_started", step=4, version=2, pid=3)]
    assert "the learner went on at step 4 after 3 steps" in faults(events)


@pytest.mark.parametrize(
    ("tickets", "lost", "more"),
    [((2, 2), [3], [2]), ((2, 4), [3], [4]), ((2,), [3], []), ((2, 2, 3, 2), [], [2, 2])],
)
def test_a_doubled_foreign_or_lost_ticket_is_found(tickets, lost, more) -> None:
    trees = good_trees()
    trees[1] = [ConsumedTree(ticket=t, min_version=1, max_version=1) for t in tickets]
    told = [f"step 1 was not trained on its tickets {lost}"] if lost else []
    told += [f"step 1 was trained on tickets {more} too many"] if more else []
    assert faults(trees=trees) == told


@pytest.mark.parametrize("place", ["local", "memory"])
def test_wrong_tickets_and_weights_in_a_run_folder_are_found(place, tmp_path) -> None:
    root = tmp_path if place == "local" else f"memory://{uuid.uuid4().hex}"
    config = load(
        [
            *(f"run.root={root}", "run.name=run", f"run.num_steps={NUM_STEPS}"),
            *(f"gate.trees_per_step={SIZE}", "metrics.wandb_project=null"),
        ]
    )
    run_log = run_log_of(config)
    for row in good_rows():
        run_log.step(row)
    run_log.close()

    def keep(rank: int, *tickets: int) -> None:
        for ticket in tickets:
            step = ticket // SIZE
            table = to_table([tree_of(ticket, step)])
            RunFolder(config.folder).publish_table(saved_trees.name(step + 1, rank), table)

    policy = load_policy(
        save_tiny_model(tmp_path / "start", "qwen2"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    manifest, _ = pack_weights(
        policy.named_weights(), version=2, dtype=torch.float32, chunk_bytes=2**30
    )
    events = [*good_events(), event(6, "published", version=2, digest=manifest.digests[0])]
    RunFolder(config.folder).publish_model(policy.save_pretrained)
    keep(0, 0, 2, 4)
    keep(1, 1, 3, 5)
    assert audit.faults(config, events) == []
    keep(2, 2)  # once more, by a worker of a larger group
    keep(1, 4)  # in the place of 5
    with torch.no_grad():
        next(policy.model.parameters())[0, 0] += 1e-6
    RunFolder(config.folder).publish_model(policy.save_pretrained)
    assert audit.faults(config, events) == [
        "step 1 was trained on tickets [2] too many",
        "step 2 was not trained on its tickets [5]",
        "step 2 was trained on tickets [4] too many",
        "the exported model is not there or not what was published last",
    ]


def test_of_a_run_that_trains_adapters_those_beside_the_model_are_what_was_published(
    tmp_path: Path,
) -> None:
    config = load([f"run.root={tmp_path}", "run.name=run", "lora.rank=3"])
    policy = load_policy(
        save_tiny_model(tmp_path / "start", "qwen2"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
        lora=config.lora,
    )
    manifest, _ = pack_weights(
        policy.named_weights(), version=2, dtype=torch.float32, chunk_bytes=2**30
    )
    RunFolder(config.folder).publish_model(policy.save_pretrained)
    assert audit.exported_digest(config) == manifest.digests[0]
    assert policy.adapters is not None
    for _, weight in policy.adapters.named():
        weight[0, 0] += 1e-6
    RunFolder(config.folder).publish_model(policy.save_pretrained)
    assert audit.exported_digest(config) != manifest.digests[0]


def test_a_tree_that_is_too_old_or_from_the_future_is_found() -> None:
    old = "ticket 2 is of versions 0 to 1, trained on at 1"
    assert old in faults(max_staleness=0)
    trees = good_trees()
    trees[0][0] = ConsumedTree(ticket=0, min_version=0, max_version=1)
    assert faults(trees=trees) == ["ticket 0 is of versions 0 to 1, trained on at 0"]


def test_an_engine_that_serves_something_stale_is_found() -> None:
    rows = good_rows()
    rows[1]["engine/oldest_version"] = 0.0
    assert faults(rows=rows) == ["after step 2 of version 2 the engines serve [0.0, 2.0]"]


def test_engines_may_be_one_version_behind_while_the_learner_goes_on_but_not_in_the_end() -> None:
    rows = good_rows()
    rows[1]["engine/oldest_version"] = 1.0
    assert faults(rows=rows) == []
    told = "after step 2 of version 2 the engines serve [1.0, 2.0]"
    assert told in faults(rows=rows, max_staleness=0), "there the learner waits for them"
    rows = good_rows()
    rows[2]["engine/oldest_version"] = 1.0
    assert faults(rows=rows) == ["after step 3 of version 2 the engines serve [1.0, 2.0]"]


@pytest.mark.parametrize("kind", ["published", "checkpoint"])
def test_a_last_version_that_is_not_the_learners_is_found(kind) -> None:
    events = [*good_events(), event(6, kind, version=1)]
    assert faults(events) == [f"the last {kind} has version [1], the learner 2"]


def test_a_missing_row_is_found() -> None:
    assert faults(rows=good_rows()[:2]) == ["metrics are there of 2 steps, should be 3"]


def test_a_row_without_any_engine_is_no_fault_but_the_last_one_must_have_one() -> None:
    def without_engines(place: int) -> list[dict[str, float]]:
        rows = good_rows()
        gone = {"engine/oldest_version": math.nan, "engine/newest_version": math.nan}
        rows[place] = rows[place] | gone
        return rows

    assert faults(rows=without_engines(0)) == []
    assert len(faults(rows=without_engines(-1))) == 1
