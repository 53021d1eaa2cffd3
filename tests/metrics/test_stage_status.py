"""Health: who holds up a run, from when each stage last moved, and the stacks of a hang."""

import time

from treerpo_ray.metrics.stage_status import EARLY, IdleTimes, StackDump, StageStatus, stalled

LIMIT_S = 60.0


def status(stage: str, age_s: float, is_busy: bool = True) -> StageStatus:
    return StageStatus(stage=stage, doing="something", is_busy=is_busy, age_s=age_s)


def names(*statuses: StageStatus) -> list[str]:
    return [found.stage for found in stalled(list(statuses), LIMIT_S)]


def test_a_stage_may_work_for_as_long_as_the_limit() -> None:
    assert names(status("learner 0", 60.0)) == []
    assert names(status("learner 0", 60.1)) == ["learner 0"]


def test_a_stage_that_waits_is_not_blamed_while_another_works() -> None:
    assert names(status("gate", 900.0, False), status("learner 0", 50.0)) == []
    waiting = status("gate", 900.0, False), status("scoring", 900.0, False)
    assert names(*waiting, status("learner 0", 61.0)) == ["learner 0"]


def test_the_stage_that_stands_longest_comes_first_and_those_that_move_are_left_out() -> None:
    found = names(status("a", 70.0), status("b", 90.0), status("c", 5.0))
    assert found == ["b", "a"]


def test_where_all_wait_for_each_other_all_are_named_once_nothing_moved_for_so_long() -> None:
    waiting = status("gate", 61.0, False), status("engines", 75.0, False)
    assert names(*waiting) == ["engines", "gate"]
    assert names(*waiting, status("metrics", 59.0, False)) == []
    assert names() == []


def test_a_process_writes_its_stacks_unless_it_is_heard_of_in_time(tmp_path) -> None:
    soon, late = (
        StackDump(stage="weight sync", folder=str(tmp_path), limit_s=limit)
        for limit in (2.0, 900.0)
    )
    path = tmp_path / "logs/stacks-weight-sync.txt"
    start = time.monotonic()
    soon.arm()
    late.arm()
    was_heard_in_time = time.monotonic() < start + EARLY * soon.limit_s
    time.sleep(2.1)
    assert path.read_text() == "" or not was_heard_in_time
    StackDump(stage="weight sync", folder=str(tmp_path), limit_s=0.1).arm()
    end = time.monotonic() + 600
    while "test_a_process_writes" not in path.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    soon.arm()
    soon.disarm()


def test_idle_shares_are_the_means_of_stages_that_were_there_all_the_time() -> None:
    before = IdleTimes(at_s=10.0, idle_s={"learner 0": 1.0, "learner 1": 0.0, "scoring": 4.0})
    now = IdleTimes(
        at_s=18.0,
        idle_s={"learner 0": 3.0, "learner 1": 2.0, "learner 2": 1.0, "scoring": 12.0},
    )
    assert now.shares_since(before) == {"learner": (2 / 8 + 2 / 8) / 2, "scoring": 1.0}
    assert now.shares_since(now) == {}
