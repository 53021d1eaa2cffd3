"""Forecasts: predicted shares at an arm's own number of forks, its partner, and the plot."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.saved_runs.results import curve_result
from treerpo_ray.algo.forks.rule import CutSamples, fork_estimate
from treerpo_ray.metrics.fork_lines import fork_lines, fork_row
from treerpo_ray.metrics.rows import Row
from treerpo_ray.study.comparisons.comparison import Arm, Comparison, Result, Setting
from treerpo_ray.study.comparisons.forecasts import Forecast, forecasts, share_at, write_forecasts

RISING = [0.05 * step for step in range(1, 21)]
FAST = [min(0.1 * step, 1.0) for step in range(1, 21)]
SLOW = [0.025 * step for step in range(1, 21)]


def measured(within: float, between: float, *, step: float = 1.0) -> Row:
    """Of 50 trees whose mean gradients are about 1; a is 16 and b 4."""
    rng, ones = np.random.default_rng(0), np.ones(50)
    samples = CutSamples(
        square=(1 + between + within) * ones + rng.normal(0, 0.01, 50),
        product=(1 + between) * ones + rng.normal(0, 0.01, 50),
        others=49 * ones,
        num_others=49 * ones,
        before=16 * ones,
        after=4 * ones,
        num_prefixes=2 * ones,
    )
    estimate = fork_estimate(1, [samples])
    assert estimate is not None
    return {"step": step} | fork_row(estimate, 16)


def arm(
    name: str, rewards: list[float], form: str, *, shape: str = "[1]", more: str = "", seed: int = 0
) -> Result:
    return curve_result(
        name,
        rewards,
        seed=seed,
        shape=shape,
        more=f"{more}learner:\n  advantage: {form}\n",
    )


def told(*results: Result) -> dict[str, Forecast]:
    """By arm."""
    comparison = Comparison(
        base=[],
        references=[],
        settings={"short": Setting(answer_tokens=1, sampled_tokens=1)},
        arms={result.trial.arm: Arm() for result in results},
    )
    return {each.arm: each for each in forecasts(comparison, list(results))}


def test_the_share_at_another_number_has_the_error_that_leaving_out_trees_gives() -> None:
    """15 to 1: of [1, 4] it is 4.75/16 of the variance for 32/20 of the tokens."""
    row = measured(15.0, 1.0)
    [line] = fork_lines(row)
    share, error = share_at(line, 4)
    assert share == pytest.approx(4.75 / 16 * 32 / 20, rel=0.01)
    assert line.children == 8
    assert share_at(line, 8) == pytest.approx((line.token_share, line.token_share_se))
    # Of the share s of variance within, it is the cost times 1 - s * 3 / 4: 1.6 * 3 / 4 an s,
    # where of [1, 8] it is 2.4 * 7 / 8.
    assert error / line.token_share_se == pytest.approx(1.6 * 0.75 / (2.4 * 0.875))
    assert share_at(line, 1) == (1.0, 0.0)


def test_a_fork_is_held_against_single_answers_with_its_form_or_else_reinforce() -> None:
    fork = replace(arm("fork", FAST, "SHRUNK_BASELINE", shape="[1, 4]"), forks=[measured(15, 1)])
    few = replace(arm("few", FAST, "TREEPO", shape="[1, 4]"), forks=[measured(15, 1)])
    flat = arm("flat", SLOW, "SHRUNK_BASELINE")
    group = arm("group", FAST, "TREEPO", shape="[4]")
    slow, reinforce = arm("slow", SLOW, "PAST_BASELINE"), arm("reinforce", RISING, "PAST_BASELINE")
    found = told(fork, few, flat, group, slow, reinforce)
    assert {name: each.partner for name, each in found.items()} == {
        "fork": "flat",
        "few": "reinforce",
    }
    assert found["few"].predicted.mean == pytest.approx(4.75 / 16 * 32 / 20, rel=0.01)
    assert found["few"].predicted.low < found["few"].predicted.mean
    # 10 steps to 0.975, for which REINFORCE needs its last tenth
    assert found["few"].realised.ratio.mean == pytest.approx(10 / 20)
    assert not told(fork, few, group), "there are no single answers"


def test_what_is_no_single_fork_or_was_not_measured_has_no_forecast() -> None:
    reinforce = arm("reinforce", RISING, "PAST_BASELINE")
    twice = replace(arm("twice", FAST, "TREEPO", shape="[4, 4]"), forks=[measured(15, 1)])
    assert told(twice, arm("old", FAST, "TREEPO", shape="[1, 4]"), reinforce) == {}


def test_an_adaptive_arm_is_predicted_at_the_shapes_that_it_chose() -> None:
    rows = [
        measured(15, 1) | {f"tree/next_children_depth_{d}": n for d, n in enumerate(shape)}
        for shape in ((1.0, 8.0), (1.0, 1.0))
    ]
    adaptive = arm("adaptive", FAST, "TREEPO", shape="[4, 4]", more="  adaptive: true\n")
    found = told(replace(adaptive, forks=rows), arm("reinforce", RISING, "PAST_BASELINE"))
    share = rows[0]["fork/token_share_depth_1"]
    assert found["adaptive"].predicted.mean == pytest.approx((share + 1) / 2)


def test_seeds_make_the_interval_and_both_files_are_written(tmp_path: Path) -> None:
    own = [
        replace(
            arm("fork", FAST if seed else RISING, "TREEPO", shape="[1, 4]", seed=seed),
            forks=[measured(15.0 - 5 * seed, 1.0)],
        )
        for seed in range(2)
    ]
    late = replace(arm("late", SLOW, "TREEPO", shape="[1, 4]"), forks=[measured(1.0, 15.0)])
    flat = [arm("reinforce", RISING, "PAST_BASELINE", seed=seed) for seed in range(2)]
    found = told(*own, late, *flat)
    shares = [4.75 / 16 * 1.6, 3.5 / 11 * 1.6]
    half = 12.7062 * abs(shares[0] - shares[1]) / 2
    assert found["fork"].predicted.high == pytest.approx(np.mean(shares) + half, rel=0.05)
    write_forecasts([], tmp_path)
    assert not list(tmp_path.iterdir())
    write_forecasts(list(found.values()), tmp_path)
    points = json.loads((tmp_path / "ratio.json").read_text())
    assert [point["arm"] for point in points] == ["fork", "late"]
    assert points[1]["realised"]["is_bound"] and points[1]["realised"]["ratio"]["low"] is None
    assert (tmp_path / "ratio.png").stat().st_size > 10_000
