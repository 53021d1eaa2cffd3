"""A stage for the watchdog's tests, in a module that Ray's workers can import."""

import time

import ray

from treerpo_ray.movement import Movement
from treerpo_ray.stacks import Stacks
from treerpo_ray.watchdog import Mover


class Stage:
    """An actor of a stage that answers until it is told to sleep."""

    def movement(self, stacks: Stacks) -> Movement:
        stacks.arm()
        return Movement(stage="gate", doing="waiting", is_busy=False)

    def sleep(self) -> None:
        time.sleep(3600)

    def hang(self, watch: ray.actor.ActorHandle, folder: str) -> None:
        Mover(watch, "scoring", folder, 0.5).at("scoring ticket 7")
        time.sleep(3600)
