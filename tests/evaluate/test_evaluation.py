"""Evaluation: shares by hand, and intervals that cover as often as they say."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.test_scores import interval
from tests.support.trees import make_tree
from treerpo_ray.algo.tree import ROOT, StopReason
from treerpo_ray.config import Config, load
from treerpo_ray.config.sections import PromptsConfig
from treerpo_ray.evaluate.evaluation import Evaluation, Graded, read, save
from treerpo_ray.evaluate.evaluation import summarise as summarise_graded
from treerpo_ray.evaluate.scores import Score
from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier.verdict import Verdict

C, W = Verdict.CORRECT, Verdict.WRONG
CUT, SLOW, ERR = Verdict.CUT_OFF, Verdict.TIMED_OUT, Verdict.ERRORED
NORMAL_975 = 1.959964
"""The 97.5 % quantile of the normal distribution."""


def config() -> Config:
    return load(
        [
            *(
                "evaluate.num_samples=3",
                "evaluate.temperature=0.7",
                "evaluate.data.path=held.jsonl",
            ),
            "run.seed=5",
        ]
    )


def graded(*verdicts: Verdict, length: int = 2, is_full: bool = False) -> TreeRecord:
    """The answers to one problem, each of `length` tokens; requests failed where ERR stands.

    All are at the length limit if `is_full`, otherwise those that are cut off.
    """
    stops = {
        verdict: StopReason.BOUNDARY if is_full or verdict is CUT else StopReason.END_OF_TEXT
        for verdict in verdicts
    } | {ERR: StopReason.ERROR}
    tree = make_tree(
        [ROOT] * len(verdicts),
        lengths=[0 if verdict is ERR else length for verdict in verdicts],
    )
    steps = (
        replace(step, stop=stops[verdict])
        for step, verdict in zip(tree.steps, verdicts, strict=True)
    )
    tree = replace(tree, steps=tuple(steps))
    return TreeRecord(
        ticket=0,
        attempt=0,
        prompt_id="0",
        question="",
        answers=(),
        seed=0,
        engine=0,
        grow_s=0.0,
        finished_at_s=0.0,
        tree=tree,
        leaf_texts=("",) * len(verdicts),
        verdicts=verdicts,
    )


def summarise(
    config: Config, records: list[TreeRecord], step: int, version: int, seconds: float
) -> Evaluation:
    graded = [Graded(record=record, group=None) for record in records]
    return summarise_graded(
        config,
        graded,
        data=PromptsConfig(path="held.jsonl"),
        step=step,
        version=version,
        seconds=seconds,
    )


def bernoulli(num_problems: int, num_correct: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [num_correct, num_problems - num_correct])


def test_the_summary_of_graded_answers_by_hand() -> None:
    records = [
        graded(C, W, C, length=4, is_full=True),
        graded(W, W, CUT, length=10),
        graded(C, ERR, W),
        graded(ERR, SLOW, ERR, length=6),
        graded(ERR, ERR, ERR),
    ]
    result = summarise(config(), records, step=3, version=2, seconds=1.5)
    assert result.pass_at_1 == pytest.approx((2 / 3 + 0 + 1 / 2) / 3)
    assert result.pass_at_k == pytest.approx(1 / 2)  # of the two that have three verdicts
    assert result.length == pytest.approx((4 + 10 + 2 + 6) / 4)
    assert result.scores["median_length"].value == 4  # of 2, 2, 4, 4, 4, 6, 10, 10, 10
    assert result.cut_off_share == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert result.errored_share == pytest.approx(7 / 15)
    assert result.num_sampled_tokens == 12 + 30 + 4 + 6
    assert (result.num_problems, result.num_samples, result.temperature) == (5, 3, 0.7)
    assert (result.model, result.seed, result.system_prompt) == (config().model.path, 5, "")
    assert (result.step, result.version, result.data, result.seconds) == (3, 2, "held.jsonl", 1.5)
    expected = interval(np.array([2 / 3, 0, 1 / 2]), seed=5)
    assert (result.ci95_low, result.ci95_high) == expected


def test_what_stands_flat_in_an_evaluation_is_what_its_scores_say() -> None:
    result = summarise(config(), [graded(C, ERR, W), graded(W, W, CUT, length=5)], 0, 0, 0.0)
    found = result.scores
    assert result.pass_at_k == found["pass@3"].value == 0.0
    assert (result.length, result.cut_off_share) == (found["length"].value, found["cut_off"].value)
    alone = summarise(config(), [graded(C, ERR, W)], 0, 0, 0.0)
    assert alone.pass_at_k is None and "pass@3" not in alone.scores


def test_a_problem_without_a_verdict_moves_neither_share_nor_interval() -> None:
    records = [graded(C, W, C), graded(W, W, W), graded(C, C, C)]
    without = summarise(config(), records, 0, 0, 0.0)
    beside = summarise(config(), [*records, graded(ERR, ERR, SLOW)], 0, 0, 0.0)
    for name in ("pass_at_1", "pass_at_k", "ci95_low", "ci95_high"):
        assert getattr(beside, name) == getattr(without, name)


@pytest.mark.parametrize("records", [[], [graded(ERR, SLOW)]])
def test_an_evaluation_without_a_single_verdict_is_an_error(records: list[TreeRecord]) -> None:
    with pytest.raises(RuntimeError, match=f"none of {len(records)} problems has a graded answer"):
        summarise(config(), records, 0, 0, 0.0)


@pytest.mark.parametrize(("num_problems", "num_correct"), [(400, 200), (1000, 100), (2000, 1500)])
def test_the_interval_of_a_bernoulli_mean_is_close_to_the_normal_one(
    num_problems: int, num_correct: int
) -> None:
    mean = num_correct / num_problems
    half = NORMAL_975 * np.sqrt(mean * (1 - mean) / num_problems)
    low, high = interval(bernoulli(num_problems, num_correct), seed=0)
    assert low == pytest.approx(mean - half, abs=0.07 * half)
    assert high == pytest.approx(mean + half, abs=0.07 * half)


def test_the_interval_of_shares_of_several_answers_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).binomial(8, 0.4, 1000) / 8
    half = NORMAL_975 * values.std() / np.sqrt(len(values))
    low, high = interval(values, seed=1)
    assert low == pytest.approx(values.mean() - half, abs=0.07 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.07 * half)


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    rng, covered, num_trials = np.random.default_rng(0), 0, 600
    for trial in range(num_trials):
        low, high = interval((rng.random(300) < 0.3).astype(float), seed=trial)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / num_trials <= 0.975


def test_an_interval_is_reproducible_and_does_not_depend_on_the_order_of_the_problems() -> None:
    values = np.random.default_rng(0).binomial(4, 0.5, 100) / 4
    assert interval(values, seed=3) == interval(values[::-1], seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


@pytest.mark.parametrize("value", [0.0, 0.375, 1.0])
def test_equal_values_leave_no_doubt(value: float) -> None:
    assert interval(np.full(50, value), seed=0) == pytest.approx((value, value))


@pytest.mark.parametrize("place", ["local", "memory"])
def test_an_evaluation_comes_back_from_the_run_folder(place: str, tmp_path) -> None:
    folder = f"{tmp_path}/run" if place == "local" else f"memory:/{tmp_path}/run"
    assert read(folder, 12) is None
    saved = summarise(config(), [graded(C, W, C)], step=12, version=3, seconds=0.5)
    save(saved, folder)
    assert isinstance(saved.scores["pass@1"], Score)
    assert read(folder, 12) == saved
    assert read(folder, 13) is None


def test_an_evaluation_is_a_json_object_in_the_file_of_its_step(tmp_path) -> None:
    saved = summarise(config(), [graded(C, W, C)], step=12, version=3, seconds=0.5)
    save(saved, str(tmp_path))
    written = json.loads((tmp_path / "eval/step=000012.json").read_text())
    assert written == asdict(saved)
    assert written.keys() == set(Evaluation.__slots__)


def test_the_evaluations_of_committed_results_are_read_whatever_their_version() -> None:
    paths = list((Path(__file__).resolve().parents[2] / "jobs/comparisons").glob("*/*/*-*.json"))
    for path in paths:
        result = json.loads(path.read_text())
        for found in (result["before"], result["after"]):
            assert Evaluation.from_fields(found).pass_at_1 == found["pass_at_1"]
    assert len(paths) > 100
