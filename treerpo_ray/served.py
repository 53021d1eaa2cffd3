"""Served: a version of the weights that engines serve, and how one of them comes to do so."""

from dataclasses import dataclass

import ray

from treerpo_ray.engine_places import Member
from treerpo_ray.waits import Waits
from treerpo_ray.weights import Manifest, Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A version of the weights."""

    manifest: Manifest
    chunks: list[ray.ObjectRef]
    probe: Probe

    async def load_into(
        self, member: Member, waits: Waits, timeout_s: float, tolerance: float | None
    ) -> None:
        """Have an engine take the weights over and prove it, either within `timeout_s`.

        It proves digests and version, and log-probabilities unless `tolerance` (nats a token)
        is None. Whatever is raised, the engine must be replaced.

        Raises:
            TimeoutError: it does not answer.
            RuntimeError: it serves something else.
        """
        version = self.manifest.version
        load = member.actor.load.remote(self.manifest, self.chunks)
        await waits.wait(load, f"engine {member.index} to load version {version}", timeout_s)
        if tolerance is not None:
            probe = member.actor.probe.remote(self.probe.token_ids)
            found: list[float] = await waits.wait(
                probe, f"engine {member.index} to be probed", timeout_s
            )
            off = self.probe.distance(found)
            if off > tolerance:
                raise RuntimeError(
                    f"engine {member.index} is {off:.2g} nats a token off the learner at version "
                    f"{version} (sync.probe_tolerance={tolerance})"
                )
        member.version = version
