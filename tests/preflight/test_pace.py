"""Pace: simulated steps against closed forms, and what a recorded run tells."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.saved_runs.small_run import write_small_run
from treerpo_ray.config import load
from treerpo_ray.metrics.rows import METRICS_FILE
from treerpo_ray.preflight.pace import (
    FEWEST_ROWS,
    Measured,
    Pace,
    Simulation,
    enough,
    lines,
    main,
    measured_of,
    sweep,
)
from treerpo_ray.run_folder.files import RunFolder

MEASURED = Measured(tree_tokens=(1000.0,), engine_rate=1000.0, tree_s=0.5, update_s=3.0, load_s=0.5)
"""An engine makes a tree a second, and two at a time take two seconds; one alone takes one, as half
a tree fills it."""


def pace(num_engines: int, trees: int, staleness: int, measured: Measured = MEASURED) -> Pace:
    return Simulation(
        measured=measured,
        num_engines=num_engines,
        trees_per_step=trees,
        max_staleness=staleness,
    ).run()


def test_without_staleness_engines_and_learner_wait_for_each_other() -> None:
    found = pace(2, 8, 0)
    assert found.step_s == pytest.approx(8 / 2 + 3.0 + 0.5)
    assert found.idle_engines == pytest.approx(3.5 / 7.5)
    assert found.idle_learner == pytest.approx(4.5 / 7.5)
    assert found.staleness == 0


def test_with_staleness_the_slower_of_them_is_the_pace() -> None:
    slow_engines = pace(1, 8, 1)
    assert slow_engines.step_s == pytest.approx(8 + 0.5, rel=0.01), "loads stop engines"
    assert 0.05 < slow_engines.idle_engines < 0.1, "loads, and where both batches end at once"
    slow_learner = pace(8, 8, 1)
    assert slow_learner.step_s == pytest.approx(3.0) and slow_learner.idle_learner == 0
    assert slow_learner.idle_engines == pytest.approx(1 - 1 / 3.0)
    assert 0 < slow_learner.staleness <= 1


def test_a_tree_is_no_faster_than_it_is_alone_however_many_engines_there_are() -> None:
    alone = replace(MEASURED, tree_s=4.0, load_s=0.0)
    assert pace(1024, 8, 0, alone).step_s == pytest.approx(4.0 + 3.0)
    # Four trees fill an engine, so that two of them on one are no slower either.
    assert pace(4, 8, 0, alone).step_s == pytest.approx(4.0 + 3.0)
    assert pace(1, 8, 0, alone).step_s == pytest.approx(8.0 + 3.0)


def test_a_version_is_published_once_the_one_before_is_served() -> None:
    slow_loads = replace(MEASURED, update_s=1.0, load_s=5.0)
    assert pace(64, 8, 4, slow_loads).step_s >= 5.0


def test_trees_of_all_lengths_make_a_step_as_long_as_its_last_one() -> None:
    mixed = replace(MEASURED, tree_tokens=(500.0, 1500.0), load_s=0.0)
    found = pace(8, 8, 0, mixed)
    assert found.step_s + 1e-9 >= 1.5 + 3.0 and found.step_s == pytest.approx(4.5, rel=0.02)


def test_enough_are_the_fewest_engines_that_more_make_little_faster() -> None:
    config = load(["gate.trees_per_step=8", "gate.max_staleness=1"])
    paces = sweep(MEASURED, config)
    assert [found.num_engines for found in paces] == [2**n for n in range(11)]
    steps = [found.step_s for found in paces]
    assert steps == sorted(steps, reverse=True) or steps[-1] == pytest.approx(min(steps))
    best = enough(paces)
    assert best.num_engines == 4 and best.step_s == pytest.approx(3.0)


def test_a_run_that_has_made_steps_tells_its_pace_and_another_one_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_small_run(tmp_path)
    times = {"time/update_s": 3.0, "time/sync_s": 0.5}
    times |= {"tokens/per_s": 900.0, "idle/engines_share": 0.1}
    rows = (json.loads(row) for row in Path(folder, METRICS_FILE).read_text().splitlines())
    timed = [json.dumps(row | times if row["step"] else row) + "\n" for row in rows]
    Path(folder, METRICS_FILE).write_text("".join(timed[: FEWEST_ROWS + 1]))
    assert list(lines(load([]), RunFolder(folder))) == [], "its first row is that of the start"
    Path(folder, METRICS_FILE).write_text("".join(timed))
    measured = measured_of(RunFolder(folder), 1)
    assert measured is not None and measured.found.engine_rate == 900.0 / 0.9
    assert (measured.found.update_s, measured.found.load_s) == (3.0, 0.5)
    assert len(measured.found.tree_tokens) == 8, "of both steps whose trees are saved"
    [line] = lines(load(["gate.trees_per_step=8"]), RunFolder(folder))
    assert "a step with 1 engine, by its steps so far: engines idle" in line
    more = ["gate.trees_per_step=8", "engine.num_engines=1024"]
    [faster] = lines(load(more), RunFolder(folder))
    assert faster.endswith(line.rpartition("; ")[2]), "measured with the engines that it had"
    assert list(lines(load([]), RunFolder(str(tmp_path / "gone")))) == []
    # The newest steps had two engines, as their rows tell: those alone count.
    rows = [json.loads(row) for row in timed]
    faster_rows = [row | {"engine/count": 2, "tokens/per_s": 1800.0} for row in rows[-6:]]
    both = [row | {"engine/count": 1} for row in rows[:-6]] + faster_rows
    Path(folder, METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in both))
    newest = measured_of(RunFolder(folder), 1)
    assert newest == replace(measured, num_engines=2, num_steps=6, num_others=5)
    assert main([folder]) == 0
    shown = capsys.readouterr().out
    assert "over 6 steps with 2 engine(s) (5 with others left out)" in " ".join(shown.split())
    Path(folder, METRICS_FILE).write_text("".join(timed))
    assert main([folder]) == 0
    shown = capsys.readouterr().out
    assert "staleness" in shown and "1,024" in shown and "enough: " in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80
    assert main([str(tmp_path)]) == 2 and "is no run" in capsys.readouterr().err
    assert main([]) == 2
