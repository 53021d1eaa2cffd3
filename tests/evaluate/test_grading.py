"""Grading: shares by hand, and what is left of an evaluation whose files cannot be written."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.answers.evaluations import CUT, ERR, SLOW, C, W, graded
from tests.support.saved_runs.run_folders import HangingStore
from tests.support.stages.answering_at_once import AnsweringAtOnce
from treerpo_ray.config import Config, load
from treerpo_ray.config.data import PromptsConfig
from treerpo_ray.evaluate import grading
from treerpo_ray.evaluate.evaluation import Evaluation, Graded, read_evaluation
from treerpo_ray.evaluate.grading import HeldOutEvaluator
from treerpo_ray.evaluate.intervals import share
from treerpo_ray.metrics.events import FATAL, Event
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import BackgroundWriter
from treerpo_ray.verifier.verifier import VariableNotSet


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


def summarise(
    config: Config, records: list[TreeRecord], step: int, version: int, seconds: float
) -> Evaluation:
    graded = [Graded(record=record, group=None) for record in records]
    return grading.summarise(
        config,
        graded,
        data=PromptsConfig(path="held.jsonl"),
        model="quickstart/model",
        step=step,
        version=version,
        seconds=seconds,
    )


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
    assert (result.model, result.seed, result.system_prompt) == ("quickstart/model", 5, "")
    assert (result.step, result.version, result.data, result.seconds) == (3, 2, "held.jsonl", 1.5)
    expected = share(np.array([2 / 3, 0, 1 / 2]), num_draws=3 + 3 + 2)
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


def actors_of(pool: object, run_log: object) -> AnsweringAtOnce:
    return AnsweringAtOnce(gate=None, pool=pool, weight_sync=None, run_log=run_log, heartbeats=None)


def evaluate(
    root: str | Path, writer: BackgroundWriter
) -> tuple[Evaluation, list[dict[str, float]]]:
    """Evaluate answers that are graded already, at step 3; returns the result and the rows."""
    rows: list[dict[str, float]] = []
    pool = SimpleNamespace(
        evaluate=SimpleNamespace(
            options=lambda num_returns: SimpleNamespace(
                remote=lambda *arguments: iter([graded(C, W, C)])
            )
        )
    )
    scorer = SimpleNamespace(score=list, group=lambda records: [None] * len(records))
    evaluator = HeldOutEvaluator(
        config=load([f"run.root={root}", "run.name=run", "evaluate.num_samples=3"]),
        prompts=None,
        actors=actors_of(pool, SimpleNamespace(step=SimpleNamespace(remote=rows.append))),
        tokenizer=None,
        start_scorer=lambda settings, tokenizer, on_fault: scorer,
    )
    advanced: list[int] = []
    result = evaluator.evaluate(step=3, version=2, advance=advanced.append, writer=writer)
    assert advanced == [1]
    return result, rows


def test_an_evaluation_that_cannot_be_written_is_told_and_its_result_is_not_lost(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/eval").touch()  # so that nothing can be written there
    told: list[str] = []
    with closing(BackgroundWriter(warn=lambda name, reason: told.append(name))) as writer:
        result, rows = evaluate(tmp_path, writer)
    assert result.pass_at_1 == pytest.approx(2 / 3) and rows == [result.row()]
    assert told == ["eval/step=000003.parquet", "eval/step=000003.json"]
    (tmp_path / "run/eval").unlink()
    with closing(BackgroundWriter(warn=lambda name, reason: told.append(name))) as writer:
        result, _ = evaluate(tmp_path, writer)
    assert len(told) == 2
    assert read_evaluation(RunFolder(f"{tmp_path}/run"), 3) == result


def test_an_evaluation_does_not_wait_for_a_store_that_hangs(
    hanging: str,
) -> None:
    told: list[str] = []
    folder = RunFolder(f"{hanging}/run")
    writer = BackgroundWriter(warn=lambda name, reason: told.append(reason))
    result, rows = evaluate(hanging, writer)
    assert rows == [result.row()]
    assert read_evaluation(folder, 3) is None
    HangingStore.hold.set()
    assert writer.close() is None
    assert told == []
    assert read_evaluation(folder, 3) == result


def test_a_variable_that_a_check_needs_and_this_node_lacks_ends_the_run() -> None:
    told: list[Event] = []
    with pytest.raises(VariableNotSet):
        HeldOutEvaluator(
            config=load(["verifier.env=[NO_SUCH_KEY]"]),
            prompts=None,
            actors=actors_of(None, SimpleNamespace(event=SimpleNamespace(remote=told.append))),
            tokenizer=None,
        )
    [event] = told
    assert event.kind == FATAL and "NO_SUCH_KEY" in event.fields["reason"]
