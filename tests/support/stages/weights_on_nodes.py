"""Weights on a cluster of several nodes whose learner is killed, then its store, then its node:
prints as JSON what became of each version, which two engines of one node load at the same time. A
process of its own, since it brings its cluster."""

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psutil
import ray
import torch
import xxhash
from ray.cluster_utils import Cluster

from treerpo_ray.actor import make_actor
from treerpo_ray.config import load
from treerpo_ray.driver.versions import AgreedVersions, Versions, check_versions
from treerpo_ray.engine.engine import Engine as RealEngine
from treerpo_ray.engine.engine import make_engine
from treerpo_ray.engine.types import EngineSetup
from treerpo_ray.learner.publisher import Publisher
from treerpo_ray.preflight.placement import Stage
from treerpo_ray.weight_sync import Probe, WeightSync
from treerpo_ray.weights.files import FileMaps, FilePlace, HeldFile, WeightsLost
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.source import Receiver, WeightSource
from treerpo_ray.weights.transport import FileTransport

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
            send=lambda *sent: ray.get(sync.publish.remote(*sent)),
            transport=FileTransport(),
            node=ray.get_runtime_context().get_node_id(),
            probe_ids=[1, 2],
            dtype=torch.float32,
            chunk_bytes=2**20,
            until_written=lambda what, put: put(),
        )
        publisher.publish(Policy(version), version)
        publisher.wait()


class Pool:
    """Has two engines, on a node of their own, which load what they are told to."""

    def __init__(self, *engines: object) -> None:
        self.engines = engines

    async def serve(
        self, manifest: Manifest, source: WeightSource, probe: Probe, should_probe: bool
    ) -> None:
        self.manifest, self.source = manifest, source

    async def holder(self, node: str) -> int:
        """The process that has the file of what is served on a node."""
        place = await self.place(node)
        return int(place.path.split("/")[2])

    async def place(self, node: str) -> FilePlace:
        [place] = self.source.places([Receiver(start="its", node=node, num_workers=1)])
        return await place

    async def load(self) -> str:
        """Have the engines load what is served: its bytes are whole, or lost."""
        found = await asyncio.gather(*map(self._load, self.engines))
        return " and ".join(sorted(set(found)))

    async def _load(self, engine: object) -> str:
        try:
            place = await self.place(await engine.node.remote())
        except WeightsLost:
            return "lost"
        digests = await engine.load.remote(place)
        return "whole" if tuple(digests) == self.manifest.digests else str(digests)


class Engine:
    def node(self) -> str:
        return own_node()

    def load(self, place: FilePlace) -> list[str]:
        with closing(HeldFile(place)) as held:
            maps = FileMaps()
            found = [maps.read(held.place.path, *part) for part in held.place.parts]
            return [xxhash.xxh3_128_hexdigest(chunk.data) for chunk in found]


def on(role: str, kind: type):
    return ray.remote(kind).options(num_cpus=0, resources={role: 0.01})


def main() -> None:
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    head |= {"object_store_memory": STORE_BYTES, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)

    def add(role: str, num_gpus: int = 0):
        return cluster.add_node(
            num_cpus=1,
            num_gpus=num_gpus,
            resources={role: 1},
            object_store_memory=STORE_BYTES,
        )

    learner_node, engine_node = add("learner"), add("engine", num_gpus=4)
    ray.init(address=cluster.address, log_to_driver=False)
    pool = make_actor(Pool)(*(on("engine", Engine).remote() for _ in range(2)))
    # While there is room nobody is told of a wait, or asked whether it is to end.
    sync = make_actor(WeightSync)(
        pool=pool,
        gate=pool,
        run_log=pool,
        folder=tempfile.gettempdir(),
        probe_every=10,
        fetch_limit_s=600.0,
    )
    told: dict[str, object] = {"GPUs of two engines of two": gpus_of_engines()}

    def publish(version: int) -> None:
        ray.get(learner.publish.remote(sync, version))

    def load() -> str:
        return ray.get(pool.load.remote())

    learner = on("learner", Learner).remote()
    publish(1)
    told["its node's store has the learner's file"] = stores(learner_node.node_id) == [
        ray.get(pool.holder.remote(learner_node.node_id))
    ]
    told["stores elsewhere"] = len(stores(engine_node.node_id))
    ray.kill(learner)
    time.sleep(1)
    told["learner killed"] = load()
    told["the engines' store is one"] = len(stores(engine_node.node_id))

    learner = on("learner", Learner).remote()
    for version in range(2, 9):  # more than the store has room for
        publish(version)
        load()
    told["old versions spilled"] = spilled_bytes(cluster, learner_node.node_id)
    kill(stores(engine_node.node_id))
    told["engines' store killed"] = load()
    kill(stores(learner_node.node_id))
    told["learner's store killed, with the bytes brought"] = load()
    publish(9)
    kill(stores(learner_node.node_id))
    told["learner's store killed before"] = load()
    publish(10)
    told["published after that"] = load()

    publish(11)
    cluster.remove_node(learner_node, allow_graceful=False)
    told["node lost"] = load()
    nothing = Manifest(version=0, tensors=(), digests=())
    probe = Probe(token_ids=[], logprobs=[])
    place = FilePlace(path="", stamp=b"", parts=())
    late = sync.publish.remote(nothing, place, probe, learner_node.node_id)
    try:
        ray.get(late, timeout=600)
    except ray.exceptions.RayError as error:
        told["published for a lost node"] = type(error).__name__
    back = add("learner")
    learner = on("learner", Learner).remote()
    publish(9)
    told["moved with the learner"] = len(stores(back.node_id))
    told["published from another node"] = load()
    stages = [
        Stage(key=f"{role}.resources", count=1, resources={role: 1})
        for role in ("learner", "engine")
    ]
    told["nodes that are alike"] = len(check_versions(stages).nodes)
    differing = refusal(lambda: check_versions(stages, look=lambda: {"node": own_node()}))
    told["nodes that differ"] = "install the same on all nodes" in str(differing)
    alone = refusal(lambda: check_versions(stages[:1], look=lambda: {"node": own_node()}))
    told["one node that differs from the driver's"] = "and the driver" in str(alone)
    told |= late_nodes(stages[0])
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(told))


def late_nodes(learner: Stage) -> dict[str, object]:
    """What becomes of processes on the engines' node, which is not compared before as the
    learner's is; a real engine is one of them."""
    agreed = check_versions([learner], look=lambda: {"torch": "1"})

    def differs() -> Versions:
        return {"torch": "2"}

    def check(look: Callable[[], Versions], role: str) -> str | None:
        ask = ray.remote(lambda: refusal(lambda: agreed.check_node(look)))
        return ray.get(ask.options(num_cpus=0, resources={role: 0.01}).remote())

    setup = EngineSetup.of(load(["engine.resources={CPU: 0, engine: 0.01}"]))
    older = AgreedVersions.of_driver({"Python": "2.7.18"})
    engine = make_engine(setup, 0, None, check_node=older.check_node)
    started = refusal(lambda: ray.get(engine.api.start.remote()))
    engine.kill()
    late = check(differs, "engine")
    return {
        "a node that was compared": check(differs, "learner"),
        "a later one that is alike": check(lambda: {"torch": "1"}, "engine"),
        "a later one that differs": "has torch 2, and the driver 1" in str(late),
        "an engine on one that differs": "and the driver 2.7.18: install the same" in str(started),
    }


class EngineOnGpus(RealEngine):
    """Tells what Ray has given it; it is never started."""

    async def node(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


def gpus_of_engines() -> list[str]:
    """Those that vLLM would find in the actors of two engines of one node with four."""
    resources = "engine.resources={GPU: 2, CPU: 0, engine: 0.01}"
    config = load([resources, "engine.tensor_parallel=2", "model.dtype=bfloat16"])
    setup = EngineSetup.of(config)
    made = [make_engine(setup, number, None, EngineOnGpus) for number in range(2)]
    found = [ray.get(engine.api.node.remote()) for engine in made]
    for engine in made:
        engine.kill()
    return sorted(found)


def stores(node: str) -> list[int]:
    """The processes that keep weights on a node."""
    running = psutil.process_iter(["cmdline"])  # None for one that has just ended
    found = [p for p in running if "ray::WeightStore" in "".join(p.info["cmdline"] or ())]
    return [p.pid for p in found if node in " ".join(p.parent().cmdline())]


def kill(processes: list[int]) -> None:
    """End processes, and give Ray the time to see it."""
    for process in processes:
        psutil.Process(process).kill()
    time.sleep(1)


def own_node() -> str:
    return ray.get_runtime_context().get_node_id()


def refusal(check: Callable[[], object]) -> str | None:
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
