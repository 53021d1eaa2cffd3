"""Task: what crosses between the stages of a run, and what its train workers are told."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol, TypeVar

from treerpo_ray.actor import actor_method, actor_stream
from treerpo_ray.algo.search import TreeShape
from treerpo_ray.config import Config
from treerpo_ray.config.sections import GateConfig
from treerpo_ray.metrics.events import RunLogApi
from treerpo_ray.metrics.stage_status import StageApi
from treerpo_ray.metrics.watchdog import HeartbeatsApi
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.weights.source import OutgoingPlace

if TYPE_CHECKING:  # the stages stand above this module
    import ray

    from treerpo_ray.engine.types import EngineStats, Sampling
    from treerpo_ray.weight_sync import Probe
    from treerpo_ray.weights.manifest import Manifest
    from treerpo_ray.weights.rounds import Poll, Round
    from treerpo_ray.weights.source import WeightSource

R = TypeVar("R")
STREAM = "trees"
"""Name of the workers' data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The right and duty to grow one tree."""

    number: int
    prompt: int
    """Row of the prompt in the training set."""
    seed: int
    """Seed of the tree."""
    num_children: tuple[int, ...]
    """Its shape, as `TreeShape.num_children`."""


GateState = NewType("GateState", str)
"""What a gate must know to issue the same tickets from a learner step on; its own business."""


class GateApi(StageApi, Protocol):
    """Actor of `Gate`."""

    @actor_method
    def next(self, session: int) -> Ticket | None:
        """See `Gate`, as for all that follow."""

    @actor_method
    def consumed(self, step: int, num_children: tuple[int, ...] | None = None) -> GateState: ...

    @actor_method
    def restart(self, step: int, state: GateState | None) -> int: ...

    @actor_method
    def done(self) -> int: ...

    @actor_method
    def is_told_to_stop(self) -> bool: ...

    @actor_method
    def stop(self) -> None: ...

    @actor_method
    def close(self) -> None: ...


class TreePoolApi(StageApi, Protocol):
    """Actor of `TreePool`."""

    @actor_method
    def begin(
        self,
        *,
        gate: GateConfig,
        prompts: PromptSet,
        shape: TreeShape,
        sampling: "Sampling",
        seed: int,
        run_log: RunLogApi,
    ) -> None:
        """See `TreePool`, as for all that follow."""

    @actor_method
    def start(self) -> None: ...

    @actor_method
    def serve(
        self, manifest: "Manifest", source: "WeightSource", probe: "Probe", should_probe: bool
    ) -> None: ...

    @actor_method
    def sleep(self) -> None: ...

    @actor_method
    def wake(self) -> None: ...

    @actor_method
    def version(self) -> int: ...

    @actor_method
    def stats(self) -> "list[EngineStats]": ...

    @actor_method
    def stop(self) -> None: ...

    @actor_method
    def grow_tickets(
        self, gate: GateApi, session: int, first: int, num_workers: int, saved: list[TreeRecord]
    ) -> None: ...

    @actor_method
    def end_stream(self) -> None: ...

    @actor_method
    def worker_batch_size(self) -> int: ...

    @actor_method
    def redraw(self, reader: str, past: TreeRecord) -> None: ...

    @actor_method
    def recall(self, first: int) -> list[TreeRecord]: ...

    @actor_method
    def unconsumed(self, first: int) -> list[TreeRecord]: ...

    @actor_method
    def take(self, reader: str, max_trees: int, wait_s: float) -> list[TreeRecord] | None: ...

    @actor_stream
    def evaluate(
        self, prompts: PromptSet, shape: TreeShape, sampling: "Sampling", seed: int
    ) -> AsyncIterator[TreeRecord]: ...


class WeightSyncApi(StageApi, Protocol):
    """Actor of `WeightSync`."""

    @actor_method
    def publish(
        self, manifest: "Manifest", place: OutgoingPlace, probe: "Probe", node: str
    ) -> None:
        """See `WeightSync`, as for all that follow."""

    @actor_method
    def next_round(self, poll: "Poll") -> "Round | None": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunActors:
    """The actors of a run; each Protocol says what its users may call."""

    gate: GateApi
    pool: TreePoolApi
    weight_sync: WeightSyncApi
    run_log: RunLogApi
    heartbeats: HeartbeatsApi

    def get(self, ref: "ray.ObjectRef[R]") -> R:
        """Wait for what one of them answers."""
        import ray

        return ray.get(ref)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTask:
    """What every worker is given."""

    config: Config
    probe_ids: list[int]
    """Sequence that engines and learner are compared on."""
    held_out: PromptSet | None
    actors: RunActors
    check_node: Callable[[], None]
    """Raises NodeDiffers on a node that came later and has other versions than the run."""
