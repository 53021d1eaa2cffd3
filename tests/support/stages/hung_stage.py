"""A stage for the watchdog's tests, in a module that Ray's workers can import."""

import time

import ray

from treerpo_ray.metrics.stage_status import StackDump, StageStatus, WatchedStage
from treerpo_ray.metrics.watchdog import Heartbeat


class Stage(WatchedStage):
    """An actor of a stage that answers until it is told to sleep."""

    def status(self) -> StageStatus:
        return StageStatus(stage="gate", doing="waiting", is_busy=False)

    def sleep(self, stacks: StackDump) -> None:
        stacks.arm()  # the last answer may be long ago, on a busy machine
        time.sleep(3600)

    def hang(self, watch: ray.actor.ActorHandle, folder: str) -> None:
        Heartbeat(heartbeats=watch, stage="scoring", folder=folder, limit_s=0.5).at(
            "scoring ticket 7"
        )
        time.sleep(3600)
