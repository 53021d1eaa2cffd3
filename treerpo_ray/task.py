"""Task: the actors of a run, and what its train workers are told of them."""

from dataclasses import dataclass

from treerpo_ray.actor import Actor
from treerpo_ray.config import Config
from treerpo_ray.prompts.prompt_set import PromptSet

STREAM = "trees"
"""Name of the workers' data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunActors:
    """The actors that a worker talks to."""

    gate: Actor
    pool: Actor
    weight_sync: Actor
    run_log: Actor
    heartbeats: Actor


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTask:
    """What every worker is given."""

    config: Config
    probe_ids: list[int]
    """Sequence that engines and learner are compared on."""
    held_out: PromptSet | None
    actors: RunActors
