"""Tables: what is printed of three arms whose curves are known."""

import pytest

from tests.support.saved_runs.results import curve_result
from treerpo_ray.study.comparisons.comparison import Arm, Comparison, Setting
from treerpo_ray.study.comparisons.report import report
from treerpo_ray.study.comparisons.tables import print_table

RISING = [0.05 * step for step in range(1, 21)]
FAST = [min(0.1 * step, 1.0) for step in range(1, 21)]
COMPARISON = Comparison(
    base=[],
    references=["flat"],
    settings={"short": Setting(answer_tokens=1, sampled_tokens=1)},
    arms={name: Arm(num_seeds=2) for name in ("flat", "slow", "tree")},
)


def test_a_table_names_the_best_flat_arm_who_gets_there_and_who_is_told_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pass@1 is the last training reward: 100, 50 and 100 %, of which only the slow one varies."""
    results = [
        curve_result(arm, curve, seed=seed, shape=shape)
        for arm, shape, curve in (
            ("flat", "[4, 1]", RISING),
            ("slow", "[1]", [0.5 * reward for reward in RISING]),
            ("tree", "[1, 4]", FAST),
        )
        for seed in range(2)
    ]
    results[3] = curve_result("slow", [0.501 * reward for reward in RISING], seed=1)
    table = report(COMPARISON, results)
    assert table.best_flat == {"short": "flat"}
    assert [line.is_flat for line in table.lines] == [True, True, False]
    print_table(table)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.replace("│", " ").splitlines()]
    assert ["short", "slow", "flat", ">", "1.11"] in rows
    assert "9 k" in printed and "0.50 [0.50, 0.50]" in printed
    assert "short: flat, 87.8 %" in printed
    assert "all 2 pairs of arms" in printed and "2 of them differ" in printed
    assert "flat is ahead of slow" in printed and "tree is ahead of slow" in printed


@pytest.mark.parametrize("is_shorter", [False, True])
def test_lengths_half_way_are_told_where_answers_differ(
    capsys: pytest.CaptureFixture[str], is_shorter: bool
) -> None:
    """The flat arm is half-way, at 52.5 %, with its eleventh step, the tree with its sixth."""
    shorter = [90.0 - step for step in range(20)] if is_shorter else [40.0] * 20
    results = [
        *(curve_result("flat", RISING, seed=seed, lengths=shorter) for seed in range(2)),
        curve_result("tree", FAST, shape="[1, 4]", lengths=shorter),
    ]
    print_table(report(COMPARISON, results))
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.replace("│", " ").splitlines()]
    assert ("Half-way: where the training reward is first in the middle" in printed) == is_shorter
    assert ("short: 52.5 %" in printed) == is_shorter
    assert (["short", "tree", "85.0", "1.06"] in rows) == is_shorter
