"""Replica: one engine of the pool, and the weights that it serves."""

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, cast

import ray
from ray.actor import ActorHandle

from treerpo_ray.actor import actor_method, actor_stream
from treerpo_ray.algo.search import SiblingGroup, TreeShape
from treerpo_ray.engine.types import EngineStats, Sampling
from treerpo_ray.engine.waits import Waits
from treerpo_ray.weight_sync import Manifest, Probe


class EngineApi(Protocol):
    """Actor of `Engine`."""

    @actor_method
    def node(self) -> str:
        """See `Engine`, as for all that follow."""

    @actor_method
    def start(self) -> tuple[int, int]: ...

    @actor_stream
    def grow(
        self,
        prompt_ids: list[int],
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
        held: list[SiblingGroup],
    ) -> AsyncIterator[SiblingGroup]: ...

    @actor_method
    def load(self, manifest: Manifest, chunks: list[ray.ObjectRef]) -> None: ...

    @actor_method
    def probe(self, token_ids: list[int]) -> list[float]: ...

    @actor_method
    def stats(self) -> EngineStats: ...

    @actor_method
    def stop(self) -> None: ...


@dataclass(eq=False, slots=True)
class Replica:
    """An engine of the pool."""

    index: int
    actor: EngineApi
    node: str = ""
    """Ray's id of its node; empty until it has one."""
    is_serving: bool = False
    version: int = -1
    """Newest version that it has proved; -1 before the first."""
    num_trees: int = 0
    moved_at: float = -math.inf
    """Monotonic time in seconds at which a sibling group of any tree last came from it."""
    num_starts: int = 1
    stats: EngineStats | None = None
    """Its last answer for its totals."""
    ends_at_s: float = math.inf
    """Unix time at which its node will be gone, once that is known."""

    def kill(self) -> None:
        """End its process at once; its trees move on."""
        ray.kill(cast(ActorHandle, self.actor))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """A version of the weights."""

    manifest: Manifest
    chunks: list[ray.ObjectRef]
    probe: Probe

    async def load_into(
        self, replica: Replica, waits: Waits, timeout_s: float, tolerance: float | None
    ) -> None:
        """Have an engine take the weights over and prove it, either within `timeout_s`.

        It proves digests and version, and log-probabilities unless `tolerance` (nats a token)
        is None. Whatever is raised, the engine must be replaced.

        Raises:
            TimeoutError: it does not answer.
            RuntimeError: it serves something else.
        """
        version = self.manifest.version
        load = replica.actor.load.remote(self.manifest, self.chunks)
        await waits.wait(load, f"engine {replica.index} to load version {version}", timeout_s)
        if tolerance is not None:
            probe = replica.actor.probe.remote(self.probe.token_ids)
            found: list[float] = await waits.wait(
                probe, f"engine {replica.index} to be probed", timeout_s
            )
            off = self.probe.distance(found)
            if off > tolerance:
                raise RuntimeError(
                    f"engine {replica.index} is {off:.2g} nats a token off the learner at version "
                    f"{version} (sync.probe_tolerance={tolerance})"
                )
        replica.version = version
