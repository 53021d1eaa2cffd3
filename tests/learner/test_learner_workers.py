"""Two data-parallel learners, in processes of their own, make the updates of one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.learning.learner_runs import (
    FREE,
    Seen,
    State,
    Updates,
    all_wrong,
    assert_nothing_moved,
    forked,
    make_config,
    mixed,
    run_updates,
    run_worker,
)
from tests.support.learning.tiny_models import save_tiny_model
from treerpo_ray.algo.advantages.forms import AdvantageForm
from treerpo_ray.config import Config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(scope="module")
def cases(path: str) -> dict[str, tuple[Config, Updates]]:
    a, b, c, d = mixed()
    halves = [[a, b], [c, d]]
    pruned = [all_wrong(first=4, count=2), all_wrong(first=6, count=2)]
    one_idle = [mixed(first=8)[:2], all_wrong(first=10, count=2)]
    resumed = [[mixed(first=4, version=1)[:2], mixed(first=4, version=1)[2:]]]
    return {
        "resumed": (make_config(path, replace(FREE, warmup_steps=5)), resumed),
        "whole": (make_config(path, replace(FREE, warmup_steps=5)), [halves, pruned, one_idle]),
        "minibatches": (make_config(path, replace(FREE, minibatches=2)), [[[a, c], [b, d]]]),
        "past_baseline": (
            make_config(path, replace(FREE, advantage=AdvantageForm.PAST_BASELINE)),
            [halves, one_idle],
        ),
        "shrunk_baseline": (
            make_config(path, replace(FREE, advantage=AdvantageForm.SHRUNK_BASELINE)),
            [halves, one_idle, [mixed(first=12, version=2)[:2], mixed(first=12, version=2)[2:]]],
        ),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def workers(cases: dict[str, tuple[Config, Updates]], folder: Path) -> list[dict[str, Seen]]:
    config = cases["resumed"][0]
    run_updates(config, [[mixed()]], None, end=folder / "start-resumed")
    started = forked(run_worker, 2, folder, cases)
    while not started.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["whole", "minibatches", "past_baseline", "shrunk_baseline"])
def test_two_workers_make_the_update_of_one(
    cases: dict[str, tuple[Config, Updates]], workers: list[dict[str, Seen]], case: str
) -> None:
    alone = run_updates(*cases[case], None)
    for seen in workers:
        for (result, state), (expected, whole) in zip(seen[case], alone, strict=True):
            torch.testing.assert_close(state.gradients, whole.gradients, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(state.parameters, whole.parameters, atol=1e-5, rtol=1e-5)
            assert result.has_updated == expected.has_updated
            assert (state.version, state.num_steps) == (whole.version, whole.num_steps)
            assert result.stats.metrics(1) == pytest.approx(expected.stats.metrics(1))
            assert result.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    if len(alone) > 1:
        assert any("fork/gain_depth_1" in result.metrics for result, _ in alone)
    ours, theirs = (seen[case][-1][1].parameters for seen in workers)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_one_worker_then_two_then_one_make_the_updates_of_one(
    cases: dict[str, tuple[Config, Updates]], workers: list[dict[str, Seen]], folder: Path
) -> None:
    config, [[first, second]] = cases["resumed"]
    last = mixed(first=8, version=2)
    alone = run_updates(config, [[mixed()], [first, second], [last]], None)
    for seen in workers:
        assert_near(seen["resumed"][0][1], alone[1][1])
    [(_, state)] = run_updates(config, [[last]], None, start=folder / "end-resumed")
    assert_near(state, alone[2][1])
    assert (state.version, state.num_steps) == (3, 3)


def assert_near(state: State, expected: State) -> None:
    torch.testing.assert_close(state.parameters, expected.parameters, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.moments, expected.moments, atol=1e-5, rtol=1e-4)
    assert (state.version, state.num_steps) == (expected.version, expected.num_steps)
    assert state.learning_rate == expected.learning_rate


def test_no_kept_group_on_any_of_two_workers_moves_nothing(workers: list[dict[str, Seen]]) -> None:
    for seen in workers:
        (_, before), (result, after), (later, _) = seen["whole"]
        assert not result.has_updated
        assert_nothing_moved(before, after)
        assert later.has_updated, "one worker with a kept group is enough"
