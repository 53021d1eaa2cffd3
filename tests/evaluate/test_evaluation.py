"""Evaluations come back from their files as they were written, or are passed over."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support.answers.evaluations import EVALUATION
from treerpo_ray.config.sections import EvaluateConfig
from treerpo_ray.evaluate.evaluation import Evaluation, read_evaluation, save_evaluation
from treerpo_ray.evaluate.scores import Score
from treerpo_ray.run_folder.files import RunFolder

SCORE = {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 4}


@pytest.mark.parametrize("place", ["local", "memory"])
def test_an_evaluation_comes_back_from_the_run_folder(place: str, tmp_path) -> None:
    folder = RunFolder(f"{tmp_path}/run" if place == "local" else f"memory:/{tmp_path}/run")
    assert read_evaluation(folder, 12) is None
    saved = replace(EVALUATION, step=12, scores={"pass@1": Score(**SCORE)})
    save_evaluation(saved, folder)
    found = read_evaluation(folder, 12)
    assert found == saved and isinstance(found.scores["pass@1"], Score)
    assert read_evaluation(folder, 13) is None


def test_an_evaluation_is_a_json_object_in_the_file_of_its_step(tmp_path) -> None:
    saved = replace(EVALUATION, step=12, scores={"pass@1": Score(**SCORE)})
    save_evaluation(saved, RunFolder(str(tmp_path)))
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


def test_an_evaluation_on_the_way_has_fewer_answers_and_is_no_result() -> None:
    settings = EvaluateConfig(num_samples=4, interim_samples=1, pass_ks=(1, 4))
    assert (settings.interim.num_samples, settings.interim.pass_ks) == (1, ())
    on_the_way = replace(EVALUATION, num_samples=1)
    assert on_the_way.is_of(settings.interim) and not on_the_way.is_of(settings)
    assert EvaluateConfig(num_samples=4).interim.num_samples == 4


@pytest.mark.parametrize("content", ["", '{"step": 3', "[]", "{}", '{"step": 3, "unknown": 0}'])
def test_a_torn_or_foreign_evaluation_is_passed_over(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_evaluation(EVALUATION, RunFolder(str(tmp_path)))
    (tmp_path / "eval/step=000003.json").write_text(content)
    assert read_evaluation(RunFolder(str(tmp_path)), 3) is None
    [record] = caplog.records
    assert "eval/step=000003.json cannot be read and is passed over" in record.getMessage()
