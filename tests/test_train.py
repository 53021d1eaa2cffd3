"""What a train worker does before the first ticket, and who waits for whom in its loop.

Whole runs test the rest.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.support.answers.evaluations import EVALUATION
from tests.support.learning.records import tree_of
from tests.support.stages.answering_at_once import AnsweringAtOnce
from treerpo_ray.algo.forks.adaptive_shape import ShapeChoice
from treerpo_ray.config import Config, load
from treerpo_ray.driver.result import finished_result
from treerpo_ray.evaluate.evaluation import save_evaluation
from treerpo_ray.learner.stats import BatchStats
from treerpo_ray.metrics.console import sentence
from treerpo_ray.records import TreeRecord, to_table
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.task import WorkerTask
from treerpo_ray.train import TrainWorker, interim_evaluator
from treerpo_ray.weights.files import FileMaps

LIMIT_S = 60.0
"""Time after which what a test waits for does not come any more."""


class FakeActors:
    """Stands in for all the actors of a run: notes what is called, and answers at once.

    An answer that is an event is held back until it is set.
    """

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


class FakeLearner:
    """Its version is the number of its updates."""

    checkpoint_bytes = 0
    sharding = None

    def __init__(self, version: int) -> None:
        self.version, self.device = version, torch.device("cpu")
        self.policy = SimpleNamespace(
            named_weights=lambda dtype: iter([("w", torch.full((2,), float(self.version)))]),
            sequence_logprobs=lambda token_ids: torch.zeros(len(token_ids) - 1),
        )

    def update(self) -> SimpleNamespace:
        self.version += 1
        return SimpleNamespace(
            has_updated=True, stats=BatchStats(), metrics={}, chosen=None, chosen_before=None
        )


class FakeRunActors(AnsweringAtOnce):
    """An answer that is an event is there once it is set; one that is an error is raised."""

    def get(self, ref: object) -> object:
        if isinstance(ref, threading.Event):
            assert ref.wait(LIMIT_S)
            return None
        if isinstance(ref, Exception):
            raise ref
        return ref


def no_evaluator(tokenizer: object) -> object:
    raise AssertionError("nothing is evaluated")


def make_task(config: Config, actors: FakeRunActors, held_out: object) -> WorkerTask:
    return WorkerTask(
        config=config,
        probe_ids=[1, 2],
        held_out=held_out,
        actors=actors,
        check_node=lambda: None,
    )


def make_worker(
    config: Config,
    fakes: FakeActors,
    *,
    step: int,
    rank: int = 0,
    num_workers: int = 1,
    held_out: object = None,
    start_evaluator: Callable[..., object] = no_evaluator,
) -> TrainWorker:
    """A worker at a learner step, whose version is its number."""
    actors = FakeRunActors(
        gate=fakes, pool=fakes, weight_sync=fakes, run_log=fakes, heartbeats=fakes
    )
    return TrainWorker(
        task=make_task(config, actors, held_out),
        rank=rank,
        num_workers=num_workers,
        node="node",
        step=step,
        learner=FakeLearner(step),
        checkpoints=SimpleNamespace(passed_over={}),
        heartbeat=SimpleNamespace(at=lambda doing, is_busy=True: None),
        start_evaluator=start_evaluator,
    )


def open_worker(
    config: Config, *, step: int, left_over: list[TreeRecord], grown: list[TreeRecord]
) -> FakeActors:
    fakes = FakeActors({"recall": grown, "restart": 7, "stats": []})
    checkpoint = Path(config.folder) / "restored"
    checkpoint.mkdir(parents=True)
    saved_trees.write(checkpoint, left_over, config.tree)
    make_worker(config, fakes, step=step).open(checkpoint)
    return fakes


def config_of(folder: Path, staleness: int = 1, num_steps: int = 2) -> Config:
    settings = ["gate.trees_per_step=2", "evaluate.data.path=''", f"run.num_steps={num_steps}"]
    return load([f"run.root={folder}", f"gate.max_staleness={staleness}", *settings])


def test_a_restart_goes_on_from_the_checkpoints_trees_and_from_those_that_the_pool_still_has(
    tmp_path: Path,
) -> None:
    left_over = [tree_of(4, 1), tree_of(5, 2)]
    further = tree_of(5, 2, 2)
    grown = [further, tree_of(6, 2), tree_of(7, 2, 3)]
    fakes = open_worker(config_of(tmp_path), step=2, left_over=left_over, grown=grown)
    assert fakes.arguments["recall"] == (4,)
    _, session, first, _, saved = fakes.arguments["grow_tickets"]
    assert (session, first) == (7, 4)
    assert to_table(saved).equals(to_table([left_over[0], further, grown[1]]))
    order = [fakes.calls.index(name) for name in ("recall", "publish", "grow_tickets")]
    assert order == sorted(order), "dropped before the engines turn back"
    assert fakes.arguments["event"][0].kind == "learner_started"
    assert "event" not in fakes.calls[order[-1] :], "noted before any tree is finished anew"


def test_the_model_of_a_run_that_was_stopped_does_not_pass_for_that_of_a_whole_one(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path)
    RunFolder(config.folder).publish_model(lambda path: (path / "config.json").write_text("{}"))
    done = Path(config.folder) / "checkpoints/step=000002"
    open_worker(config, step=1, left_over=[], grown=[])
    done.mkdir(parents=True)  # the last checkpoint, after which the driver is killed
    (done / "files.json").write_text("{}")
    assert finished_result(config) is None


def test_a_stop_that_came_while_the_group_was_started_ends_it_before_its_first_step(
    tmp_path: Path,
) -> None:
    """And what still waits for a ticket or for trees is told that none will come."""
    fakes = FakeActors({"is_told_to_stop": True, "rows_since": []})
    worker = make_worker(config_of(tmp_path), fakes, step=1)
    assert [*worker.steps()] == []
    waited: list[float] = []
    worker.batches = SimpleNamespace(await_end=waited.append)
    worker.learner.policy.save_pretrained = lambda path: (path / "config.json").write_text("{}")
    worker.finish()
    assert {"close", "end_stream"} <= {*fakes.calls} and len(waited) == 1
    assert RunFolder(worker.config.folder).exists("model/config.json")


def test_an_evaluation_on_the_way_does_not_pass_for_that_of_the_end(tmp_path: Path) -> None:
    """A run that is made shorter may end at a step that was evaluated on the way."""
    settings = ["evaluate.data.path=quickstart:test", "evaluate.data.num_problems=1"]
    config = load([f"run.root={tmp_path}", "run.num_steps=2", "evaluate.num_samples=4", *settings])
    folder = RunFolder(config.folder)
    folder.publish_model(lambda path: (path / "config.json").write_text("{}"))
    done = Path(config.folder) / "checkpoints/step=000002"
    done.mkdir(parents=True)
    (done / "files.json").write_text("{}")
    save_evaluation(replace(EVALUATION, step=0, num_samples=4), folder)
    for num_samples, is_finished in ((1, False), (4, True)):
        save_evaluation(replace(EVALUATION, step=2, num_samples=num_samples), folder)
        assert (finished_result(config) is not None) == is_finished


def test_one_evaluator_makes_all_evaluations_and_ends_with_the_worker(tmp_path: Path) -> None:
    """Its start takes time in which all wait, and asks a paid judge again."""
    config = load([f"run.root={tmp_path}", "run.num_steps=9", "evaluate.every=1"])
    seen: list[object] = []

    def start_evaluator(tokenizer: object) -> SimpleNamespace:
        seen.append(tokenizer)
        return SimpleNamespace(
            evaluate=lambda step, **_: seen.append(step), close=lambda: seen.append("closed")
        )

    fakes = FakeActors({"is_told_to_stop": False})
    worker = make_worker(config, fakes, step=0, held_out=object(), start_evaluator=start_evaluator)
    worker.learner.policy.tokenizer = "tokenizer"
    with worker.ending:
        for worker.step in (1, 2):
            worker.evaluate_if_due()
    assert seen == ["tokenizer", 1, 2, "closed"]


def test_an_evaluation_on_the_way_has_its_own_number_of_samples(tmp_path: Path) -> None:
    settings = ["evaluate.num_samples=4", "evaluate.interim_samples=1"]
    config = load([f"run.root={tmp_path}", *settings])
    actors = FakeRunActors(gate=None, pool=None, weight_sync=None, run_log=None, heartbeats=None)
    task = make_task(config, actors, held_out=())
    with closing(interim_evaluator(task, None)) as evaluator:
        assert evaluator.config.evaluate.num_samples == 1
        [verifier] = evaluator._scorer.verifiers
        assert verifier.grade([]) == []
    with pytest.raises(RuntimeError, match="the verifier is closed"):
        verifier.grade([])


def one_step(worker: TrainWorker) -> None:
    """What the loop does after a learner step's trees have come."""
    update = worker.learner.update()
    worker.publish()
    worker.consume(worker.step, update)


@contextmanager
def beside(work: object, *arguments: object) -> Iterator[Future[None]]:
    """Have `work` done in a thread."""
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(work, *arguments)


def until_called(fakes: FakeActors, name: str, times: int = 1) -> None:
    poll = threading.Event()
    for _ in range(int(LIMIT_S * 100)):
        if fakes.calls.count(name) >= times:
            return
        poll.wait(0.01)
    raise AssertionError(f"{name} was called {fakes.calls.count(name)} times, not {times}")


def test_with_staleness_the_next_update_is_made_while_engines_load_and_the_gate_hears_it_later(
    tmp_path: Path,
) -> None:
    is_served = threading.Event()
    fakes = FakeActors({"publish": is_served, "consumed": False, "is_told_to_stop": False})
    worker = make_worker(config_of(tmp_path, num_steps=9), fakes, step=0)
    one_step(worker)  # comes back
    assert (worker.step, worker.is_last) == (1, False)
    update = worker.learner.update()  # of the next step, with trees that are there
    assert "consumed" not in fakes.calls, "no engine has proved version 1"
    with beside(worker.publish) as publishing:  # the next version waits for the one before
        until_called(fakes, "publish")
        assert not publishing.done() and fakes.calls.count("publish") == 1
        is_served.set()
        publishing.result(LIMIT_S)
    worker.consume(1, update)
    worker.coordinator.publisher.wait()
    told = [name for name in fakes.calls if name in ("publish", "consumed")]
    assert told == ["publish", "consumed"] * 2
    assert fakes.arguments["consumed"] == (1, None)
    assert [fakes.arguments["publish"][0].version, worker.learner.version] == [2, 2]


@pytest.mark.parametrize(
    ("before", "chosen", "is_told"),
    [
        (None, (1, 8), True),
        ((1, 4), (1, 8), True),
        ((1, 8), (1, 8), False),
        (None, (1, 1), False),  # before anything is known answers are single
    ],
)
def test_the_gate_hears_what_shape_is_chosen_and_the_log_where_it_is_another(
    tmp_path: Path, before: tuple[int, ...] | None, chosen: tuple[int, ...], is_told: bool
) -> None:
    fakes = FakeActors({"consumed": "state", "is_told_to_stop": False})
    worker = make_worker(config_of(tmp_path, staleness=2, num_steps=20), fakes, step=11)
    update = worker.learner.update()
    update.chosen = ShapeChoice(num_children=chosen, token_share=0.45)
    update.chosen_before = before and ShapeChoice(num_children=before, token_share=0.6)
    worker.consume(11, update)
    worker.coordinator.publisher.wait()
    assert fakes.arguments["consumed"][1] == chosen
    [event] = fakes.arguments["event"]
    assert event.kind == ("shape_chosen" if is_told else "consumed")
    if is_told:
        # The first tickets that wait for learner step 11 are of step 14, whose row is the 15th.
        fields = {"shape": "[1, 8]", "from_step": 15, "token_share": 0.45}
        assert event.fields.items() > fields.items()
        assert sentence(event) == (
            "shape chosen: trees of [1, 8] from step 15 on: predicted to need at most 0.45 of "
            "the tokens of single answers"
        )


def test_weights_that_are_on_their_way_are_not_those_of_the_next_update(tmp_path: Path) -> None:
    is_served = threading.Event()
    fakes = FakeActors({"publish": is_served, "consumed": False, "is_told_to_stop": False})
    worker = make_worker(config_of(tmp_path, num_steps=9), fakes, step=0)
    weight = torch.ones(2)
    worker.learner.policy.named_weights = lambda dtype: iter([("w", weight)])
    one_step(worker)
    weight.zero_()
    until_called(fakes, "publish")
    _, place, _, node = fakes.arguments["publish"]
    assert node == "node", "where they lie"
    chunk = FileMaps().read(place.path, *place.parts[0])
    assert chunk.view("float32")[:2].tolist() == [1, 1]
    is_served.set()
    worker.coordinator.publisher.wait()


@pytest.mark.parametrize("staleness", [0, 1])
def test_without_staleness_and_after_the_last_step_the_engines_are_awaited(
    tmp_path: Path, staleness: int
) -> None:
    is_served = threading.Event()
    fakes = FakeActors({"publish": is_served, "consumed": False, "is_told_to_stop": False})
    num_steps = 1 if staleness else 9
    worker = make_worker(config_of(tmp_path, staleness, num_steps), fakes, step=0)
    with beside(one_step, worker) as step:
        until_called(fakes, "publish")
        assert not step.done() and "consumed" not in fakes.calls
        is_served.set()
        step.result(LIMIT_S)
    assert "consumed" in fakes.calls
    assert worker.is_last == bool(staleness)


def test_a_checkpoint_is_put_in_its_place_with_what_the_gate_says_of_its_own_step(
    tmp_path: Path,
) -> None:
    """The gate is behind when the checkpoint is written, and may be ahead when it is placed."""
    is_served = threading.Event()
    fakes = FakeActors({"publish": is_served, "is_told_to_stop": False, "num_lines": (7, 7)})
    fakes.answers["consumed"] = "after step 1"
    worker = make_worker(config_of(tmp_path, num_steps=9), fakes, step=0)
    saved = []
    worker.saver = SimpleNamespace(
        is_due=lambda step: True,
        save=lambda step, contents, **last: saved.append((step, contents, last)),
    )
    one_step(worker)
    worker.checkpoint_if_due()  # comes back
    [(step, contents, last)] = saved
    assert (step, last) == (1, {"is_last": False})
    with beside(contents.before_place, tmp_path) as placing:
        until_called(fakes, "publish")
        assert not placing.done() and "num_lines" not in fakes.calls
        is_served.set()
        placing.result(LIMIT_S)
    assert fakes.calls.index("consumed") < fakes.calls.index("num_lines")
    fakes.answers["consumed"] = "after step 2"
    one_step(worker)
    worker.coordinator.publisher.wait()
    contents.before_place(tmp_path)
    assert (tmp_path / "gate.json").read_text() == "after step 1"


def test_the_gate_begins_again_from_what_the_checkpoint_holds_of_it(tmp_path: Path) -> None:
    fakes = FakeActors({"recall": [], "restart": 7, "stats": []})
    (tmp_path / "gate.json").write_text("after step 2")
    make_worker(config_of(tmp_path), fakes, step=2).open(tmp_path)
    assert fakes.arguments["restart"] == (2, "after step 2")


def test_a_run_that_is_told_to_stop_ends_after_the_step_under_way(tmp_path: Path) -> None:
    fakes = FakeActors({"consumed": True, "is_told_to_stop": True})
    worker = make_worker(config_of(tmp_path, num_steps=9), fakes, step=0)
    one_step(worker)
    assert worker.is_last
    assert fakes.calls.count("consumed") == worker.step == 1


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_stop_that_comes_during_an_evaluation_ends_the_run_with_the_step_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool, is_saved: bool
) -> None:
    """On every worker, and with the checkpoint of that step."""
    config = load([f"run.root={tmp_path}", "run.num_steps=9", "evaluate.every=1"])
    fakes = FakeActors({"is_told_to_stop": False, "rows_since": []})
    saved: list[tuple[int, bool]] = []
    told = 0

    def of_the_first(flag: torch.Tensor, src: int) -> None:
        if not is_first:
            flag.fill_(told)

    def evaluate(**_: object) -> None:
        fakes.answers["is_told_to_stop"] = bool(told)

    worker = make_worker(
        config,
        fakes,
        step=1,
        rank=int(not is_first),
        num_workers=2,
        held_out=object(),
        start_evaluator=lambda tokenizer: SimpleNamespace(evaluate=evaluate, close=lambda: None),
    )
    worker.learner.policy.tokenizer = None
    worker.saver = SimpleNamespace(
        has=lambda step: is_saved,
        is_due=lambda step: False,
        save=lambda step, contents, *, is_last: saved.append((step, is_last)),
    )
    worker.coordinator.consumed = Future()
    monkeypatch.setattr(dist, "broadcast", of_the_first)
    worker.evaluate_if_due()
    assert not worker.is_last
    told = 1
    worker.evaluate_if_due()
    assert worker.is_last
    assert saved == ([(1, True)] if is_first and not is_saved else [])


def test_a_publication_that_failed_is_found_by_a_step_that_publishes_nothing(
    tmp_path: Path,
) -> None:
    """Else the gate would never hear of that step, and the learner wait for its tickets."""

    fakes = FakeActors({"consumed": False, "is_told_to_stop": False})
    worker = make_worker(config_of(tmp_path, num_steps=9), fakes, step=0)

    def refuse(*_: object) -> None:
        raise RuntimeError("no engine took version 1 over")

    worker.coordinator.publisher.send = refuse
    update = worker.learner.update()
    worker.publish()
    worker.consume(0, update)
    nothing = SimpleNamespace(
        has_updated=False, stats=BatchStats(), metrics={}, chosen=None, chosen_before=None
    )
    with pytest.raises(RuntimeError, match="no engine took version 1 over"):
        worker.consume(1, nothing)


def test_a_publication_that_fails_ends_the_next_step_and_the_gate_does_not_hear_of_it(
    tmp_path: Path,
) -> None:
    fakes = FakeActors({"publish": RuntimeError("no engine took it over")})
    worker = make_worker(config_of(tmp_path, num_steps=9), fakes, step=0)
    one_step(worker)
    with pytest.raises(RuntimeError, match="no engine took it over"):
        one_step(worker)
    assert "consumed" not in fakes.calls
