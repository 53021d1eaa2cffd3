"""Rows and events: on disk as soon as they are logged, and read as the last resume left them."""

import json
import math
import re
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tests.support.saved_runs.run_logs import run_config, run_log_of, write
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.metrics.events import Event
from treerpo_ray.metrics.rows import last_step, latest_rows
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.lines import LogTimes


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    run_log = run_log_of(run_config(tmp_path))
    run_log.step({"step": 1, "reward/mean": 0.25})
    (row,) = map(json.loads, (tmp_path / "small/metrics.jsonl").read_text().splitlines())
    assert (row["step"], row["reward/mean"]) == (1, 0.25)
    assert row["time"] > 0


def test_not_a_number_is_null_on_disk_and_nan_when_read(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1, "loss/total": math.inf, "loss/kl": math.nan}])
    assert '"loss/total": null' in (tmp_path / "small/metrics.jsonl").read_text()
    (row,) = latest_rows(RunFolder(config.folder))
    assert math.isnan(row["loss/total"]) and math.isnan(row["loss/kl"])


def test_a_row_without_a_step_is_refused_and_leaves_no_line(tmp_path):
    run_log = run_log_of(run_config(tmp_path))
    with pytest.raises(KeyError, match="step"):
        run_log.step({"reward/mean": 0.5})
    assert run_log.rows_since(0) == []


def test_rows_since_counts_the_rows_of_earlier_sessions(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1}, {"step": 2}])
    run_log = run_log_of(config)
    num_rows = len(run_log.rows_since(0))
    run_log.step({"step": 3})
    assert num_rows == 2
    assert [row["step"] for row in run_log.rows_since(num_rows)] == [3]


def test_a_resume_replaces_what_was_rolled_back_and_keeps_it_in_the_file(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": step, "reward/mean": 0.0} for step in (1, 2, 3, 4)])
    write(config, [{"step": step, "reward/mean": 1.0} for step in (2, 3)])
    rows = latest_rows(RunFolder(config.folder))
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0), (2, 1), (3, 1)]
    assert len(RunFolder(config.folder).read_lines("metrics.jsonl")) == 6


def test_the_evaluation_of_a_step_joins_its_row(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1, "reward/mean": 0.5}, {"step": 1, "eval/pass_at_1": 0.4}])
    (row,) = latest_rows(RunFolder(config.folder))
    assert (row["reward/mean"], row["eval/pass_at_1"]) == (0.5, 0.4)


def test_a_line_that_a_crash_cut_short_is_dropped_by_reader_and_writer(tmp_path):
    config = run_config(tmp_path)
    write(config, [{"step": 1}])
    with (tmp_path / "small/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')
    assert [row["step"] for row in latest_rows(RunFolder(config.folder))] == [1]
    write(config, [{"step": 2}])
    assert [row["step"] for row in latest_rows(RunFolder(config.folder))] == [1, 2]


def test_events_are_flat_lines(tmp_path):
    run_log = run_log_of(run_config(tmp_path))
    run_log.event(Event(kind="ticket_issued", fields={"ticket": 7, "is_again": False}, time=1.5))
    run_log.event(Event(kind="version", fields={"version": 1, "mismatch": math.nan}, time=2.0))
    assert RunFolder(str(tmp_path / "small")).read_lines("events.jsonl") == [
        {"time": 1.5, "kind": "ticket_issued", "ticket": 7, "is_again": False},
        {"time": 2.0, "kind": "version", "version": 1, "mismatch": None},
    ]


def test_an_event_field_may_not_hide_the_kind_or_the_time():
    with pytest.raises(ValueError, match="time"):
        Event(kind="version", fields={"time": 1.0})


def test_rows_and_events_of_a_run_on_a_store_are_continued():
    config = run_config(f"memory://{uuid.uuid4().hex}")
    run_log = run_log_of(config)
    run_log.step({"step": 1})
    run_log.event(Event(kind="run_ended"))
    run_log.close()
    write(config, [{"step": 2}])
    folder = RunFolder(config.folder)
    assert [row["step"] for row in latest_rows(folder)] == [1, 2]
    assert [event["kind"] for event in folder.read_lines("events.jsonl")] == ["run_ended"]


def test_a_store_that_takes_nothing_is_an_error_that_names_where_the_rows_are(monkeypatch):
    times = LogTimes(patience=900.0, disk_close=900.0)  # however slow the disk of the test is
    run_log = run_log_of(run_config(f"memory://{uuid.uuid4().hex}"), times=times)

    def refuse(*args, **kwargs):
        raise ConnectionError("store is away")

    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", refuse)
    run_log.step({"step": 1})
    with pytest.raises(OSError, match=r"store is away.* the files are in ") as caught:
        run_log.close()
    [folder] = re.findall(r"the files are in (\S+)", str(caught.value))
    assert (Path(folder) / "metrics.jsonl").exists()
    assert run_log.notices_since(0)[0].kind == "upload_delayed"


def test_a_run_ends_with_the_step_that_reaches_its_tokens_or_with_the_last_of_its_steps():
    rows = [{"step": 0.0}] + [{"step": step, "tokens/sampled": 10.0} for step in (1.0, 2.0, 3.0)]
    limits = {None: 5, 30: 3, 21: 3, 20: 2, 1: 1, 31: 5}
    for limit, last in limits.items():
        assert last_step(RunConfig(num_steps=5, max_sampled_tokens=limit), rows) == last


def test_a_limit_that_is_crossed_is_an_event_and_a_notice_and_its_end_an_event_alone(tmp_path):
    run_log = run_log_of(run_config(tmp_path))
    for step, kept in ((1, 3), (2, 0), (3, 0), (4, 5)):
        run_log.step({"step": step, "reward/mean": 0.5, "groups/kept": kept})
    [notice] = run_log.notices_since(0)
    assert (notice.kind, notice.fields["step"]) == ("unhealthy", 2)
    events = RunFolder(str(tmp_path / "small")).read_lines("events.jsonl")
    assert [(event["kind"], event["step"]) for event in events] == [
        ("unhealthy", 2), ("healthy_again", 4)
    ]  # fmt: skip
    assert "learner.prune_threshold" in events[0]["remedy"]


def test_growth_counts_each_tree_of_the_next_learner_step_once(tmp_path):
    config = run_config(tmp_path)
    config = replace(config, gate=replace(config.gate, trees_per_step=3))
    run_log = run_log_of(config)
    assert run_log.growth() == (1, 0)
    for ticket in (0, 4, 0, 2, 3):  # one was grown anew, others are of the step after
        run_log.event(Event(kind="tree_finished", fields={"ticket": ticket}))
    assert run_log.growth() == (1, 2)
    run_log.step({"step": 1})
    assert run_log.growth() == (2, 2)
