"""Stations: the actors of a run, and what its train workers are told of them."""

from dataclasses import dataclass

from treerpo_ray.actor import Actor
from treerpo_ray.config import Config
from treerpo_ray.prompts import PromptSet

STREAM = "trees"
"""Name of the workers' data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stations:
    """The actors that a worker talks to."""

    gate: Actor
    pool: Actor
    weight_sync: Actor
    run_log: Actor
    watch: Actor


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTask:
    """What every worker is given."""

    config: Config
    probe_ids: list[int]
    """Sequence that engines and learner are compared on."""
    held_out: PromptSet | None
    stations: Stations


def run_worker(settings: dict[str, WorkerTask]) -> None:
    """What each worker runs; Ray Train hands over a dict.

    Ray's own actors of a trainer import this module, too: what only a worker needs is imported
    here.
    """
    from treerpo_ray.train_worker import TrainWorker

    TrainWorker(settings["task"]).run()
