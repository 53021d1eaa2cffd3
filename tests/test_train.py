"""What a train worker does before the first ticket; its loop is tested by whole runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from tests.run_folder.test_trees import tree_of
from treerpo_ray.config import Config, load
from treerpo_ray.driver.outcome import finished_outcome
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.train import TrainWorker


class Station:
    """Stands in for all the actors of a run: notes what is called, and answers at once."""

    def __init__(self, answers: dict[str, object]) -> None:
        self.answers = answers
        self.calls: list[str] = []
        self.arguments: dict[str, tuple[object, ...]] = {}

    def __getattr__(self, name: str) -> SimpleNamespace:
        def remote(*arguments: object) -> object:
            self.calls.append(name)
            self.arguments[name] = arguments
            return self.answers.get(name)

        return SimpleNamespace(remote=remote)


def open_worker(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    *,
    step: int,
    left_over: list[TreeRecord],
    grown: list[TreeRecord],
) -> Station:
    """Have a first worker begin at a learner step, whose version is its number."""
    station = Station({"unconsumed": grown, "restart": 7, "stats": []})
    monkeypatch.setattr(ray, "get", lambda result: result)
    monkeypatch.setattr(TrainWorker, "_publish", lambda worker: station.calls.append("publish"))
    worker = object.__new__(TrainWorker)
    worker.config, worker.folder, worker.step = config, RunFolder(config.folder), step
    worker.actors = SimpleNamespace(gate=station, pool=station, heartbeats=station, run_log=station)
    worker.checkpoints = SimpleNamespace(passed_over={})
    worker.learner = SimpleNamespace(version=step)
    worker.engines = SimpleNamespace(since_last=lambda stats: {})
    worker.left_over, worker.measurements, worker.num_workers = left_over, [], 1
    worker._open()
    return station


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = ["gate.trees_per_step=2", "gate.max_staleness=1", "evaluate.data.path=''"]
    return load([f"run.root={tmp_path}", "run.num_steps=2", *settings])


def test_a_restart_goes_on_from_the_checkpoints_trees_and_from_those_that_the_pool_still_has(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_over = [tree_of(4, 1), tree_of(5, 2)]
    further = tree_of(5, 2, 2)
    grown = [further, tree_of(6, 2), tree_of(7, 2, 3)]
    station = open_worker(config, monkeypatch, step=2, left_over=left_over, grown=grown)
    assert station.arguments["unconsumed"] == (4,)
    _, session, first, _, saved = station.arguments["grow_tickets"]
    assert (session, first) == (7, 4)
    assert saved == [left_over[0], further, grown[1]]
    order = [station.calls.index(name) for name in ("unconsumed", "publish", "grow_tickets")]
    assert order == sorted(order), "asked before the engines turn back and the pool drops them"


def test_the_model_of_a_run_that_was_stopped_does_not_pass_for_that_of_a_whole_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(config.folder).publish_model(lambda path: (path / "config.json").write_text("{}"))
    done = Path(config.folder) / "checkpoints/step=000002"
    open_worker(config, monkeypatch, step=1, left_over=[], grown=[])
    done.mkdir(parents=True)  # the last checkpoint, after which the driver is killed
    (done / "files.json").write_text("{}")
    assert finished_outcome(config) is None
