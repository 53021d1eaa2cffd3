"""Comparison: which runs it has, how long they are, and what its table says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.project import PROJECT
from tests.support.saved_runs.results import make_result
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config.files import to_yaml
from treerpo_ray.study.comparisons.comparison import (
    Arm,
    Comparison,
    Trial,
    expected_tokens,
    read_comparison,
    read_results,
    result_path,
    write_result,
)
from treerpo_ray.study.comparisons.curves import write_plot
from treerpo_ray.study.comparisons.report import report

FILE = """
base: [conf/quickstart.yaml]
references: [flat]
settings:
  short: {answer_tokens: 40, sampled_tokens: 96000}
  long: {answer_tokens: 80, sampled_tokens: 96000, overrides: [prompts.num_problems=99]}
arms:
  flat:
    num_seeds: 2
    overrides: ["tree.num_children=[10]", "tree.step_tokens=[46]"]
  tree: {num_seeds: 1, overrides: [learner.advantage=difference]}
"""


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.chdir(PROJECT)
    path = tmp_path / "two.yaml"
    path.write_text(FILE)
    return read_comparison(str(path))


def test_trials_come_by_number_of_seeds_then_seed(comparison: Comparison) -> None:
    found = [(trial.seed, trial.setting, trial.arm) for trial in comparison.trials()]
    assert found == [
        *((0, "short", "flat"), (0, "long", "flat"), (1, "short", "flat"), (1, "long", "flat")),
        *((0, "short", "tree"), (0, "long", "tree")),
    ]


def test_a_result_of_other_settings_start_or_tokens_is_passed_over(
    comparison: Comparison, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = ["learner.cpu_threads=2"]
    trials = list(comparison.trials())[:5]
    for trial, rate in zip(trials, (1e-5, *[3e-4] * 4), strict=True):
        overrides = ["run.root=elsewhere", f"learner.learning_rate={rate}", *common]
        config = to_yaml(comparison.configs(overrides)[trial])
        write_result(replace(make_result(trial, 0.5), config=config), tmp_path)
    changes = ("start", "more tokens", "fewer tokens")
    for trial, changed in zip(trials[1:4], changes, strict=True):
        path = result_path(trial, tmp_path)
        found = json.loads(path.read_text())
        if changed == "start":
            found["start"] = "0123456789abcdef"
        elif changed == "more tokens":
            found["curve"]["tokens/sampled"] += [4800.0, 4800.0]  # two steps more
        else:
            found["curve"]["tokens/sampled"][:2] = [0.0, 0.0]
        path.write_text(json.dumps(found))
    assert [r.trial for r in read_results(comparison.configs(common), tmp_path)] == [trials[4]]
    told = [record.message.partition("it has other ")[2] for record in caplog.records]
    assert told == [
        *("learner.learning_rate", "weights at the start"),
        "tokens: 105,600 instead of 96,000",
        "tokens: 86,400 instead of 96,000: answers are much shorter than the setting's "
        "answer_tokens",
    ]


def test_a_setting_that_a_result_is_older_than_had_its_default(
    comparison: Comparison, tmp_path: Path
) -> None:
    trial = next(comparison.trials())
    old = "".join(
        line
        for line in to_yaml(comparison.configs([])[trial]).splitlines(keepends=True)
        if "final_rate" not in line
    )
    result = replace(make_result(trial, 0.5), config=old)
    write_result(result, tmp_path)
    assert read_results(comparison.configs([]), tmp_path) == [result]
    assert not read_results(comparison.configs(["learner.final_rate=0"]), tmp_path)


def test_all_runs_spend_the_same_time_on_checkpoints_unless_the_comparison_says_otherwise(
    comparison: Comparison,
) -> None:
    for base, every in (([], 20), (["checkpoint.every=3"], 3)):
        runs = replace(comparison, base=[*comparison.base, *base]).configs([])
        assert {config.checkpoint.every for config in runs.values()} == {every}


def test_the_seeds_of_all_arms_begin_where_the_comparison_says(tmp_path: Path) -> None:
    path = tmp_path / "fresh.yaml"
    path.write_text(FILE + "first_seed: 10\n")
    trials = read_comparison(str(path)).trials()
    assert {(trial.arm, trial.seed) for trial in trials} == {
        *(("flat", 10), ("flat", 11), ("tree", 10))
    }


def test_steps_share_their_tokens_and_an_answer_ends_where_it_ends() -> None:
    flat = TreeShape(num_children=(10,), step_tokens=(46,))
    assert expected_tokens(flat, 40) == 400
    assert expected_tokens(flat, 50) == 460
    tree = TreeShape(num_children=(4, 4, 4), step_tokens=(23, 23, 23))
    assert expected_tokens(tree, 40) == 4 * 23 + 16 * 17 + 64 * 0


def test_a_run_whose_shape_adapts_has_steps_enough_for_single_answers(
    comparison: Comparison,
) -> None:
    """Of 24 answers of 40 and of 46 tokens a step, five times as many as that is."""
    adaptive = Arm(overrides=["conf/methods/adaptive.yaml"], num_seeds=1)
    configs = replace(comparison, arms={"flat": adaptive}).configs([])
    assert {t.setting: config.run.num_steps for t, config in configs.items()} == {
        "short": 500,
        "long": 435,
    }


def test_every_run_samples_the_tokens_of_its_setting(comparison: Comparison) -> None:
    configs = comparison.configs(["run.root=runs"])
    steps = {(t.setting, t.arm): config.run.num_steps for t, config in configs.items()}
    # 24 trees a step: of 10 * 40, of 4 * 23 + 16 * 17, and of 10 * 46 tokens; five times that
    assert steps == {
        ("short", "flat"): 50,
        ("short", "tree"): 55,
        ("long", "flat"): 44,
        ("long", "tree"): 44,
    }
    assert {config.run.max_sampled_tokens for config in configs.values()} == {96000}
    seeded = configs[Trial(setting="long", arm="flat", seed=1)]
    assert (seeded.run.seed, seeded.prompts.num_problems) == (1, 99)
    assert len({config.folder for config in configs.values()}) == len(configs)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("references: [flat]", "references: [other]", "references: .*other.* none of the arms"),
        ("num_seeds: 1", "seeds: 1", "seeds"),
        ("answer_tokens: 40", "answer_tokens: many", "many"),
        ("answer_tokens: 40", "answer_tokens: 0", "answer_tokens and sampled_tokens .* more than"),
        ("num_seeds: 1", "num_seeds: 0", "arms.tree.num_seeds=0 must be more than 0"),
        ("short: {", "short: {{", "two.yaml"),
        (FILE, "- base", "two.yaml"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=told) as caught:
        read_comparison(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such comparison"):
        read_comparison(str(tmp_path / "none.yaml"))


def test_results_come_back_and_make_a_table_and_a_plot(
    comparison: Comparison, tmp_path: Path
) -> None:
    shares = {"flat": [0.5, 0.6], "tree": [0.75]}
    configs = comparison.configs([])
    given = [
        replace(
            make_result(trial, shares[trial.arm][trial.seed], {"flat": 20, "tree": 10}[trial.arm]),
            config=to_yaml(config),
        )
        for trial, config in configs.items()
        if trial.setting == "short"
    ]
    for result in given:
        write_result(result, tmp_path)
    results = read_results(configs, tmp_path)
    assert results == given
    table = report(comparison, results)
    flat, tree = table.lines
    assert (flat.arm, flat.num_seeds, flat.num_steps) == ("flat", 2, 20)
    assert flat.pass_at_1.mean == pytest.approx(55)
    assert flat.ahead == {} and tree.ahead["flat"].mean == pytest.approx(20)
    assert np.isnan(tree.ahead["flat"].low)
    # Step 10 is where the tree ends. 12,000 tokens are 2.5 steps of the flat
    # run, of which three end in the window, and 1.25 of the tree's, of which two do.
    assert flat.same_steps.mean == pytest.approx(4 * 9)
    assert tree.same_steps.mean == pytest.approx(4 * 9.5)
    table.write(tmp_path)
    write_plot(comparison, results, tmp_path)
    lines_of_table = json.loads((tmp_path / "table.json").read_text())["lines"]
    assert [line["same_steps"]["low"] is None for line in lines_of_table] == [False, True]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 40


def test_the_training_reward_of_what_was_chosen_is_not_compared(
    comparison: Comparison, tmp_path: Path
) -> None:
    configs = comparison.configs([])
    trials = [Trial(setting="short", arm=arm, seed=0) for arm in ("flat", "tree")]
    plain = replace(make_result(trials[0], 0.5), config=to_yaml(configs[trials[0]]))
    chosen = to_yaml(comparison.configs(["gate.max_redraws=2"])[trials[1]])
    results = [plain, replace(make_result(trials[1], 0.5, num_steps=10), config=chosen)]
    flat, tree = report(comparison, results).lines
    assert flat.same_steps.mean == pytest.approx(4 * 19)
    assert tree.pass_at_1.mean == 50 and str(tree.same_steps) == ""
    write_plot(comparison, results[1:], tmp_path)
    assert not (tmp_path / "curves.csv").exists()
    write_plot(comparison, results, tmp_path)
    assert ",tree," not in (tmp_path / "curves.csv").read_text()
