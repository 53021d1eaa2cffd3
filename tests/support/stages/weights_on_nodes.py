"""Weights on a cluster of several nodes whose learner is killed, then its store, then its node:
prints as JSON what became of each version. A process of its own, since it brings its cluster."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations

from treerpo_ray.actor import make_actor
from treerpo_ray.driver.versions import check_versions
from treerpo_ray.learner.publisher import Publisher
from treerpo_ray.preflight.placement import Stage
from treerpo_ray.weight_sync import Manifest, Probe, WeightSync

STORE_BYTES = 100 * 2**20
NUM_FLOATS = 5 * 2**20
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class Policy:
    """Weights of 20 MiB that are their version."""

    def __init__(self, version: int) -> None:
        self.version = version

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", torch.full((NUM_FLOATS,), float(self.version))

    def sequence_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        return torch.zeros(len(token_ids) - 1)


class Learner:
    """A train worker's first rank, on the learner's node."""

    def publish(self, sync: object, version: int) -> None:
        publisher = Publisher(
            send=sync.publish.remote,
            node=ray.get_runtime_context().get_node_id(),
            probe_ids=[1, 2],
            dtype=torch.float32,
            chunk_bytes=2**20,
            until_written=lambda what, put: put(),
        )
        publisher.publish(Policy(version), version)
        publisher.wait()

    def kill_store(self) -> int:
        """End the process that holds the weights on this node; returns how many there were."""
        mine = ray.get_runtime_context().get_node_id()
        running = psutil.process_iter(["cmdline"])  # None for one that has just ended
        found = [p for p in running if "ray::WeightStore" in "".join(p.info["cmdline"] or ())]
        stores = [p for p in found if mine in " ".join(p.parent().cmdline())]
        for process in stores:
            process.kill()
        return len(stores)


class Pool:
    """Has one engine, on a node of its own, which loads what it is told to."""

    def __init__(self, engine: object) -> None:
        self.engine = engine
        self.chunks: list[ray.ObjectRef] = []

    async def serve(
        self, manifest: Manifest, chunks: list[ray.ObjectRef], probe: Probe, should_probe: bool
    ) -> None:
        self.manifest, self.chunks = manifest, chunks

    async def nodes(self) -> list[str]:
        """Where the weights lie."""
        return sorted(set(get_object_locations(self.chunks)[self.chunks[0]]["node_ids"]))

    async def load(self) -> str:
        """Have the engine load what is served: its bytes are whole, or lost."""
        digests = await self.engine.load.remote(self.chunks)
        return "whole" if tuple(digests) == self.manifest.digests else str(digests)


class Engine:
    def load(self, chunks: list[ray.ObjectRef]) -> list[str]:
        try:
            found = [ray.get(chunk, timeout=60) for chunk in chunks]
        except ray.exceptions.ObjectLostError:
            return ["lost"]
        return [hashlib.blake2b(chunk.data, digest_size=16).hexdigest() for chunk in found]


def on(role: str, kind: type):
    return ray.remote(kind).options(num_cpus=0, resources={role: 0.01})


def main() -> None:
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    head |= {"object_store_memory": STORE_BYTES, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)

    def add(role: str):
        return cluster.add_node(num_cpus=1, resources={role: 1}, object_store_memory=STORE_BYTES)

    learner_node, _ = add("learner"), add("engine")
    ray.init(address=cluster.address, log_to_driver=False)
    pool = make_actor(Pool)(on("engine", Engine).remote())
    # While there is room nobody is told of a wait, or asked whether it is to end.
    sync = make_actor(WeightSync)(
        pool=pool, gate=pool, run_log=pool, folder=tempfile.gettempdir(), probe_every=10
    )
    told: dict[str, object] = {}

    learner = on("learner", Learner).remote()
    ray.get(learner.publish.remote(sync, 1))
    told["lies on the learner's node"] = ray.get(pool.nodes.remote()) == [learner_node.node_id]
    ray.kill(learner)
    time.sleep(1)
    told["learner killed"] = ray.get(pool.load.remote())

    learner = on("learner", Learner).remote()
    for version in range(2, 9):  # more than the store has room for
        ray.get(learner.publish.remote(sync, version))
    told["old versions spilled"] = spilled_bytes(cluster, learner_node.node_id)
    told["stores killed"] = ray.get(learner.kill_store.remote())
    time.sleep(1)
    told["store killed"] = ray.get(pool.load.remote())
    ray.get(learner.publish.remote(sync, 9))
    told["published after that"] = ray.get(pool.load.remote())

    ray.get(learner.publish.remote(sync, 10))
    cluster.remove_node(learner_node, allow_graceful=False)
    told["node lost"] = ray.get(pool.load.remote())
    nothing = Manifest(version=0, tensors=(), digests=())
    probe = Probe(token_ids=[], logprobs=[])
    late = sync.publish.remote(nothing, [ray.put(b"0")], probe, learner_node.node_id)
    try:
        ray.get(late, timeout=60)
    except ray.exceptions.RayError as error:
        told["published for a lost node"] = type(error).__name__
    back = add("learner")
    learner = on("learner", Learner).remote()
    ray.get(learner.publish.remote(sync, 9))
    told["moved with the learner"] = ray.get(pool.nodes.remote()) == [back.node_id]
    told["published from another node"] = ray.get(pool.load.remote())
    stages = [
        Stage(key=f"{role}.resources", count=1, resources={role: 1})
        for role in ("learner", "engine")
    ]
    told["nodes that are alike"] = refusal(lambda: check_versions(stages))
    differing = refusal(lambda: check_versions(stages, look=lambda: {"node": own_node()}))
    told["nodes that differ"] = "install the same on all nodes" in str(differing)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(told))


def own_node() -> str:
    return ray.get_runtime_context().get_node_id()


def refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def spilled_bytes(cluster: Cluster, node_id: str) -> int:
    """What a node's store has put on disk for want of room."""
    from ray._private.internal_api import node_stats

    [node] = [n for n in ray.nodes() if n["NodeID"] == node_id]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
    return stats.store_stats.spilled_bytes_total


if __name__ == "__main__":
    main()
