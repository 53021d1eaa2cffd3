"""Diagnosis: every limit is told once when it is crossed, and again after it was over."""

import re
from dataclasses import asdict, fields, replace

import pytest

from treerpo_ray.config import Config, load
from treerpo_ray.config.health import HealthConfig
from treerpo_ray.config.keys import describe
from treerpo_ray.metrics.diagnosis import NOTHING_KEPT, RULES, Diagnosis, Finding, Limits

HEALTHY = {
    "reward/mean": 0.5,
    "groups/kept": 20.0,
    "groups/kept_share": 0.6,
    "groups/duplicate_share": 0.1,
    "tokens/trained_share": 0.5,
    "mismatch/mean": 0.004,
    "importance/truncated_share": 0.0,
    "loss/clip_share": 0.02,
    "loss/ratio": 1.01,
    "loss/kl": 0.01,
    "loss/entropy": 0.3,
    "learner/grad_norm": 0.6,
    "length/cut_off_share": 0.05,
    "values/calibration_error": 0.15,
    "verdict/error_share": 0.0,
    "staleness/mean": 0.9,
    "engine/prefix_hit_rate": 0.7,
    "idle/engines_share": 0.2,
    "idle/learner_share": 0.3,
}
SICK: dict[str, dict[str, float]] = {
    "": {"groups/kept": 0.0, "groups/kept_share": 0.0, "tokens/trained_share": 0.0},
    "max_mismatch": {"mismatch/mean": 0.2},
    "max_mismatch_growth": {"mismatch/mean": 0.05},
    "max_truncated_share": {"importance/truncated_share": 0.2},
    "max_clip_share": {"loss/clip_share": 0.5},
    "max_ratio_drift": {"loss/ratio": 0.8},
    "max_kl": {"loss/kl": 2.0},
    "min_entropy": {"loss/entropy": 0.001},
    "max_grad_norm": {"learner/grad_norm": 150.0},
    "min_kept_share": {"groups/kept_share": 0.01, "tokens/trained_share": 0.01},
    "min_trained_share": {"tokens/trained_share": 0.01},
    "max_duplicate_share": {"groups/duplicate_share": 0.99},
    "max_cut_off_share": {"length/cut_off_share": 0.8},
    "max_calibration_error": {"values/calibration_error": 0.5},
    "max_error_share": {"verdict/error_share": 0.1},
    "max_staleness_share": {"staleness/mean": 2.0, "idle/learner_share": 0.0},
    "min_prefix_hit_rate": {"engine/prefix_hit_rate": 0.01},
    "max_idle_engines": {"idle/engines_share": 0.9},
}
"""A row that crosses the limit of that key, and no other one but the growth of the mismatch."""


def found(config: Config, *rows: dict[str, float]) -> list[Finding]:
    """What is told of healthy steps with these differences."""
    diagnosis = Diagnosis(Limits.of(config))
    steps = [HEALTHY | {"step": float(number)} | row for number, row in enumerate(rows, 1)]
    return [finding for row in steps for finding in diagnosis.look(row)]


def kinds(findings: list[Finding]) -> list[tuple[str, str, int]]:
    return [(each.kind, each.key.removeprefix("health."), each.step) for each in findings]


def test_every_limit_of_the_configuration_has_a_rule() -> None:
    limits = {item.name for item in fields(HealthConfig)} - {"window"}
    assert limits == {rule.key for rule in RULES} == SICK.keys() - {""}


def test_the_remedies_name_keys_that_there_are() -> None:
    known = set(re.findall(r"^  (\w+\.\w+) = ", describe(), re.MULTILINE))
    for rule in (NOTHING_KEPT, *RULES):
        named = set(re.findall(r"\b[a-z]+\.[a-z_]+\b", rule.remedy)) - {"events.jsonl"}
        assert named and named <= known, rule.key


def test_a_healthy_run_is_told_nothing_of() -> None:
    assert found(Config(), *[{}] * 20) == []


@pytest.mark.parametrize("key", SICK)
def test_a_crossing_is_told_once_until_it_is_over_and_then_anew(key) -> None:
    """The window of three steps is full of sick ones at step 6, and of healthy ones at step 12."""
    config = load(["gate.max_staleness=2"])
    if key != "max_mismatch_growth":  # which grows with the mismatch
        config = replace(config, health=HealthConfig(max_mismatch_growth=None))
    rows = [*[{}] * 3, *[SICK[key]] * 6, *[{}] * 3, *[SICK[key]] * 3]
    told = kinds(found(config, *rows))
    assert [(kind, own) for kind, own, _ in told] == [
        ("unhealthy", key), ("healthy_again", key), ("unhealthy", key)
    ]  # fmt: skip
    first, over, again = (step for *_, step in told)
    if key:
        assert 3 < first <= 6 and 9 < over <= 12 and 12 < again <= 15
    else:  # at once
        assert (first, over, again) == (4, 10, 13)


def test_a_policy_that_is_certain_and_right_is_not_warned_of() -> None:
    certain = {"loss/entropy": 0.001}
    assert found(Config(), *[certain | {"reward/mean": 0.95}] * 20) == []
    told = found(Config(), *[certain | {"reward/mean": 0.85}] * 20)
    assert kinds(told) == [("unhealthy", "min_entropy", 3)]


def test_a_finding_has_the_mean_of_the_window_and_what_it_is_compared_with() -> None:
    config = Config(health=HealthConfig(window=2, max_kl=0.5))
    [finding] = found(config, {"loss/kl": 0.2}, {"loss/kl": 0.7}, {"loss/kl": 0.9})
    assert (finding.step, finding.value, finding.limit) == (3, pytest.approx(0.8), 0.5)
    assert finding.fields()["key"] == "health.max_kl" and "loss.kl_coef" in finding.remedy


def test_growth_is_over_the_first_steps_and_what_rounding_makes_is_none() -> None:
    config = Config(health=HealthConfig(window=1, max_mismatch=0.1, max_mismatch_growth=3.0))
    rows = [{"mismatch/mean": 1e-7}, {"mismatch/mean": 1e-4}, {"mismatch/mean": 0.029}]
    assert found(config, *rows) == []  # a tenth of the limit is what it is measured by
    [finding] = found(config, {"mismatch/mean": 0.02}, {"mismatch/mean": 0.07})
    assert finding.key == "health.max_mismatch_growth" and finding.value == pytest.approx(3.5)


def test_null_turns_a_warning_off() -> None:
    off = {name: None for name in asdict(HealthConfig()) if name != "window"}
    sick = {name: value for row in SICK.values() for name, value in row.items()} | {
        "groups/kept": 1.0
    }
    assert found(Config(health=HealthConfig(**off)), *[sick] * 9) == []


def test_old_trees_are_no_fault_where_the_learner_waits_or_nothing_may_be_old() -> None:
    waiting = {"staleness/mean": 2.0, "idle/learner_share": 0.5}
    assert found(load(["gate.max_staleness=2"]), *[waiting] * 5) == []
    for bound in (0, 1):
        row = {"staleness/mean": float(bound), "idle/learner_share": 0.0}
        assert found(load([f"gate.max_staleness={bound}"]), *[row] * 5) == []


def test_answers_without_a_common_step_share_no_prefix() -> None:
    assert found(load(["tree.num_children=[16]"]), *[{"engine/prefix_hit_rate": 0.0}] * 5) == []


def test_the_window_is_of_steps_that_have_the_metric() -> None:
    """As the hit rate, which a step has in which a request ended."""
    names = [name for name in HEALTHY if name != "engine/prefix_hit_rate"]
    diagnosis, told = Diagnosis(Limits.of(Config())), []
    for step in range(1, 9):
        row = {name: HEALTHY[name] for name in names} | {"step": float(step)}
        row |= {"engine/prefix_hit_rate": 0.0} if step % 2 else {}
        told += list(diagnosis.look(row))
    assert kinds(told) == [("unhealthy", "min_prefix_hit_rate", 5)]


def test_steps_without_an_update_fill_no_window_of_the_loss() -> None:
    without = {name: value for name, value in HEALTHY.items() if not name.startswith("loss/")}
    diagnosis = Diagnosis(Limits.of(Config()))
    for step in range(1, 9):
        assert list(diagnosis.look(without | {"step": float(step)})) == []


def test_a_resumed_run_tells_anew_what_is_still_so_and_counts_no_step_twice() -> None:
    sick = SICK["max_cut_off_share"]
    rows = [HEALTHY | sick | {"step": float(step)} for step in (1, 2, 3)]
    resumed = Diagnosis(Limits.of(Config()), past=[*rows, {"step": 3.0, "eval/pass_at_1": 0.5}])
    assert list(resumed.look({"step": 3.0, "eval/pass_at_1": 0.5})) == []
    assert [each.step for each in resumed.look(HEALTHY | sick | {"step": 3.0})] == [3]
    two_left = Diagnosis(Limits.of(Config()), past=rows)
    # Steps 2 and 3 are done once more, and there is one before them.
    assert list(two_left.look(HEALTHY | {"step": 1.0, "length/cut_off_share": 0.0})) == []


def test_limits_are_checked_as_other_numbers_are() -> None:
    for given, message in (
        ("health.window=0", "health.window=0 must be more than 0"),
        ("health.max_clip_share=1.5", "health.max_clip_share=1.5 must not be more than 1"),
        ("health.max_mismatch_growth=0", "health.max_mismatch_growth=0.0 must be more than 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load([given])
    assert load(["health.max_kl=null"]).health.max_kl is None
