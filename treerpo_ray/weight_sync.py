"""Weight sync: an actor that owns the newest weights and has the engines serve them."""

import time

import ray

from treerpo_ray.actor import Actor
from treerpo_ray.movement import Movement
from treerpo_ray.stacks import Stacks
from treerpo_ray.weights import Manifest, Probe


class WeightSync:
    """Takes weights from the learner's first worker and returns once every engine proved them.

    Args:
        pool: Actor of `EnginePool`; keeps what is handed on for engines that come up later.
        probe_every: Syncs between comparisons of log-probabilities; the first is compared.
    """

    def __init__(self, pool: Actor, probe_every: int) -> None:
        self.pool, self.probe_every = pool, probe_every
        self._num_syncs = 0
        self._doing = ""
        self._moved_at = time.monotonic()

    async def publish(self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe) -> None:
        """Have the engines serve `manifest`; returns once they have proved it.

        Raises:
            RuntimeError: no engine could take it over.
        """
        self._move(f"having the engines serve version {manifest.version}")
        try:
            # What the learner put dies with its worker; what is put here lives as long as the run.
            owned = [ray.put(await chunk) for chunk in chunks]
            should_probe = self._num_syncs % self.probe_every == 0
            self._num_syncs += 1
            await self.pool.serve.remote(manifest, owned, probe, should_probe)
        finally:
            self._move("")

    def _move(self, doing: str) -> None:
        self._doing, self._moved_at = doing, time.monotonic()

    async def movement(self, stacks: Stacks) -> Movement:
        """What is published, and since when."""
        stacks.arm()
        return Movement(
            stage="weight sync",
            doing=self._doing or "waiting for a version",
            is_busy=bool(self._doing),
            age_s=time.monotonic() - self._moved_at,
        )
