"""The train group: when one that failed is started again, and after what wait."""

import json
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pyarrow
import pytest
import ray
import ray.train

from tests.support.stages.answering_at_once import AnsweringAtOnce
from treerpo_ray.config.sections import LearnerConfig
from treerpo_ray.driver.train_group import TrainGroup, restart_wait_s
from treerpo_ray.errors import NodeDiffers
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.events import Event
from treerpo_ray.run_folder.patience import DiskRefused

LOST = {0: OSError("the store is gone")}


def fit(
    reached: Iterable[int | None],
    max_failures: int,
    failures: dict[int, Exception] = LOST,
    is_stopping: Callable[[], bool] = lambda: False,
) -> tuple[int | None, list[float], list[Event]]:
    """Run groups that fail at the steps `reached`, or end well (None), a run of nine steps.

    Returns the steps that are done (None: it gave up), the waits and the events.
    """
    waits: list[float] = []
    events: list[Event] = []
    groups = iter(reached)
    done: list[int] = []

    def fit_once() -> Exception | None:
        step = next(groups)
        done.append(9 if step is None else step)
        if step is None:
            return None
        return ray.train.WorkerGroupError("a worker failed", failures)

    def remote(call: Callable[..., object]) -> SimpleNamespace:
        return SimpleNamespace(remote=call)

    actors = AnsweringAtOnce(
        pool=None,
        weight_sync=None,
        gate=SimpleNamespace(done=remote(lambda: done[-1])),
        run_log=SimpleNamespace(event=remote(events.append)),
        heartbeats=SimpleNamespace(forget=remote(lambda stage: None)),
    )
    group = TrainGroup(
        limits=LearnerConfig(max_failures=max_failures),
        fit_once=fit_once,
        actors=actors,
        supervisor=SimpleNamespace(
            console=Console(is_quiet=True), run=lambda work: work(), show_last=lambda: None
        ),
        is_stopping=is_stopping,
        sleep=waits.append,
    )
    try:
        return group.fit(), waits, events
    except ray.train.TrainingFailedError:
        return None, waits, events


def test_a_group_that_fails_again_without_progress_is_waited_for_longer_and_longer() -> None:
    steps, waits, events = fit([0, 0, 0, 0, 0, None], max_failures=5)
    assert steps == 9
    assert waits == [1, 20, 40, 60, 60]
    assert [event.fields["wait_s"] for event in events] == waits, "each wait is told"
    assert {event.fields["cause"] for event in events} == {"OSError: the store is gone"}


def test_an_outage_of_a_minute_does_not_use_up_the_default_number_of_failures() -> None:
    failures = range(1, LearnerConfig().max_failures + 1)
    assert sum(restart_wait_s(number) for number in failures) > 60


def test_after_progress_the_first_wait_is_short_again() -> None:
    assert fit([3, 3, 5, 5, None], max_failures=2)[:2] == (9, [1, 20, 1, 20])


def test_a_group_that_is_given_up_is_not_waited_for() -> None:
    steps, waits, events = fit([3, 3], max_failures=1)
    assert (steps, waits) == (None, [1])
    assert [event.fields["failures"] for event in events] == [1, 2]


def test_input_that_a_worker_refuses_is_not_given_to_it_again() -> None:
    refused = {0: RuntimeError("connection closed by peer"), 1: ValueError("two rows\nof tokens")}
    with pytest.raises(ValueError, match=r"^two rows of tokens$"):
        fit([3, None], max_failures=5, failures=refused)


def test_a_node_with_other_versions_is_not_tried_again_and_ends_the_run_with_its_line() -> None:
    differs = NodeDiffers("10.0.0.9 has torch 2.8.0, and the driver 2.9.1: install the same")
    with pytest.raises(ValueError, match=f"^{differs}$"):
        fit([3, None], max_failures=5, failures={0: RuntimeError("closed by peer"), 1: differs})


def test_a_file_that_a_store_gave_in_half_is_read_again() -> None:
    for failure in (json.JSONDecodeError("no end", "{", 1), pyarrow.ArrowInvalid("no footer")):
        assert isinstance(failure, ValueError)
        assert fit([3, None], max_failures=1, failures={0: failure})[:2] == (9, [1])


def test_a_disk_that_was_waited_for_in_vain_is_not_trained_for_again() -> None:
    refused = {1: DiskRefused("the model is not written, after 3600 s of attempts: EIO")}
    steps, waits, events = fit([3, None], max_failures=5, failures=refused)
    assert (steps, waits) == (None, [])
    assert events[0].fields["cause"] == f"DiskRefused: {refused[1]}"


def test_a_run_that_is_told_to_stop_is_not_started_again() -> None:
    """Neither where the group fails meanwhile nor where it is only waited for."""
    for asked_at in (0, 1, 2):  # before the first group, while it runs, in the wait for the second
        looks = iter([*[False] * asked_at, *[True] * 9])
        groups = iter([3, 3, 3])
        with pytest.raises(KeyboardInterrupt):
            fit(groups, max_failures=5, is_stopping=lambda looks=looks: next(looks))
        assert 3 - len([*groups]) == min(asked_at, 1)
