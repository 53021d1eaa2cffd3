"""Trials: which runs share engines, and what a failed or stopped one leaves; without engines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.project import PROJECT
from tests.support.saved_runs.fork_rows import measured_forks
from treerpo_ray.config import Config
from treerpo_ray.errors import RunFailed
from treerpo_ray.evaluate.evaluation import Evaluation, read_evaluation, save_evaluation
from treerpo_ray.metrics.fork_lines import fork_lines
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.comparisons.comparison import (
    CURVE,
    Comparison,
    read_comparison,
    read_results,
)
from treerpo_ray.study.comparisons.runner import Trials

FILE = """
base: [conf/quickstart.yaml, prompts.num_problems=20, evaluate.data.num_problems=4]
references: [flat]
settings:
  short: {answer_tokens: 44, sampled_tokens: 20000}
  long: {answer_tokens: 44, sampled_tokens: 20000, overrides: [prompts.max_prompt_tokens=40]}
arms:
  flat: {num_seeds: 2, overrides: ["tree.num_children=[8]", "tree.step_tokens=[46]"]}
  tree: {num_seeds: 2}
"""
START = Evaluation.from_fields(
    dict.fromkeys(Evaluation.__dataclass_fields__, 0) | {"scores": {}, "pass_at_1": 0.25}
)


class Sessions:
    """Stands in for runs and their engines: writes what a run leaves, counts what is started."""

    def __init__(self, failing: str = "", stopped: str = "") -> None:
        self.failing, self.stopped = failing, stopped
        self.started: list[list[str]] = []

    @contextmanager
    def kept_engines(self, config: Config) -> Iterator[str]:
        assert config.max_model_tokens == 40 + 46  # they can serve both settings
        self.started.append([])
        yield "pool"

    def run(
        self, config: Config, inputs: object, earlier: object, console: object, pool: str
    ) -> SimpleNamespace:
        self.started[-1].append(config.run.name)
        if config.run.name == self.failing:
            self.failing = ""
            raise RunFailed("an engine was lost")
        if config.run.name == self.stopped:
            return SimpleNamespace(is_complete=False)
        folder = RunFolder(config.folder)
        if read_evaluation(folder, 0) is None:
            assert len(self.started[-1]) == 1  # a start is evaluated on fresh engines
            save_evaluation(START, folder)
        save_evaluation(replace(START, step=1), folder)
        row = dict.fromkeys(CURVE, 1.0) | {"tokens/sampled": 20000.0} | measured_forks(0.5)
        (Path(config.folder) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return SimpleNamespace(is_complete=True)


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.chdir(PROJECT)
    (tmp_path / "two.yaml").write_text(FILE)
    return read_comparison(str(tmp_path / "two.yaml"))


def run_trials(comparison: Comparison, folder: Path, sessions: Sessions) -> int:
    configs = comparison.configs([f"run.root={folder}/runs"])
    return Trials(
        configs=configs, folder=folder, run=sessions.run, kept_engines=sessions.kept_engines
    ).run()


def test_runs_share_engines_once_their_start_is_known_and_are_not_run_again(
    comparison: Comparison, tmp_path: Path
) -> None:
    sessions = Sessions()
    assert run_trials(comparison, tmp_path, sessions) == 0
    assert sessions.started == [
        ["short-flat-0", "short-tree-0"],
        [
            *("long-flat-0", "long-tree-0"),
            *("short-flat-1", "short-tree-1", "long-flat-1", "long-tree-1"),
        ],
    ]
    results = read_results(comparison.configs([]), tmp_path)
    assert len(results) == 8
    assert {len(fork_lines(row)) for result in results for row in result.forks} == {1}
    again = Sessions()
    assert run_trials(comparison, tmp_path, again) == 0
    assert again.started == []


def test_after_a_run_that_failed_the_others_have_fresh_engines(
    comparison: Comparison,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sessions = Sessions(failing="short-flat-1")
    assert run_trials(comparison, tmp_path, sessions) == 1
    assert [len(names) for names in sessions.started] == [2, 3, 3]
    assert "an engine was lost" in capsys.readouterr().err
    again = Sessions()
    assert run_trials(comparison, tmp_path, again) == 0
    assert again.started == [["short-flat-1"]]


def test_a_run_that_was_stopped_ends_the_comparison_until_it_is_run_again(
    comparison: Comparison, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_trials(comparison, tmp_path, Sessions(stopped="short-tree-0"))
    assert len(read_results(comparison.configs([]), tmp_path)) == 1
    again = Sessions()
    assert run_trials(comparison, tmp_path, again) == 0
    assert again.started[0][0] == "short-tree-0"
