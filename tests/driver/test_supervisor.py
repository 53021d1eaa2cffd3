"""What the driver waits for, whichever part of a run it is."""

import io
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
import rich.console

from treerpo_ray.actor import make_actor
from treerpo_ray.config import Config
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.driver.supervisor import Supervisor
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.events import FATAL, Event, RunLogApi
from treerpo_ray.metrics.run_log import RunLog, RunLogSetup
from treerpo_ray.metrics.step_table import StepTable

pytestmark = pytest.mark.ray


@pytest.fixture
def run_log(small_config, ray_cluster) -> Iterator[RunLogApi]:
    actor = make_actor(RunLog)(
        setup=RunLogSetup.of(small_config("run.name=followed"), commit="0a1b2c3")
    )
    ray.get(actor.step.remote({"step": 1.0, "reward/mean": 0.111}))
    yield actor
    ray.kill(actor)


def supervisor(
    run_log: RunLogApi, failure: str | None = None, **settings: float
) -> tuple[Supervisor, io.StringIO]:
    shown = io.StringIO()
    console = Console(console=rich.console.Console(file=shown, width=120))
    console.expect_steps(StepTable.of(Config(run=RunConfig(num_steps=3))))
    return Supervisor(
        run_log=run_log, console=console, watchdog=SimpleNamespace(failure=failure), **settings
    ), shown


def test_what_is_new_in_the_log_is_shown_while_the_work_goes_on(run_log) -> None:
    ours, shown = supervisor(run_log)

    def work() -> int:
        ray.get(run_log.step.remote({"step": 2.0, "reward/mean": 0.222}))
        ray.get(run_log.event.remote(Event(kind="waiting", fields={"what": "an engine"})))
        return 7

    assert ours.run(work) == 7
    assert ours.run(lambda: 8) == 8
    assert shown.getvalue().count("0.222") == 1 and "0.111" not in shown.getvalue()
    assert shown.getvalue().count("waiting: what an engine") == 1


def test_what_a_slow_log_tells_after_the_work_is_shown_before_its_end_and_its_failure(
    run_log,
) -> None:
    """The looks meanwhile are over before anybody answers."""

    def fail() -> None:
        run_log.step.remote({"step": 2.0, "reward/mean": 0.222})
        run_log.event.remote(Event(kind=FATAL, fields={"reason": "too many errors"}))
        raise ZeroDivisionError

    ours, shown = supervisor(run_log, poll_s=1e-6)
    with pytest.raises(RuntimeError, match="too many errors"):
        ours.run(fail)
    assert "0.222" in shown.getvalue()


def test_a_failure_of_the_work_is_its_own(run_log) -> None:
    with pytest.raises(ZeroDivisionError):
        supervisor(run_log)[0].run(lambda: 1 // 0)


def test_work_that_hangs_is_given_up_when_the_watchdog_says_so(run_log) -> None:
    with pytest.raises(RuntimeError, match="nothing moved for 9 s"):
        supervisor(run_log, "nothing moved for 9 s")[0].run(threading.Event().wait)


def test_work_is_given_up_when_a_stage_cannot_go_on(run_log) -> None:
    ray.get(run_log.event.remote(Event(kind=FATAL, fields={"reason": "too many errors"})))
    with pytest.raises(RuntimeError, match="too many errors"):
        supervisor(run_log)[0].run(threading.Event().wait)
