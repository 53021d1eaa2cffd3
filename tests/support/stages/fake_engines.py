"""Engines for the pool's tests: in this process, with tokens that follow from seeds, and faults."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from treerpo_ray.algo.search import SiblingGroup, TreeShape, assemble, grow
from treerpo_ray.algo.tree import ROOT, Step, StopReason, Tree
from treerpo_ray.config import Config, load
from treerpo_ray.config.sections import EngineConfig
from treerpo_ray.engine._waits import Waits
from treerpo_ray.engine.autoscaler import Nodes
from treerpo_ray.engine.pool import TIMES, PoolTimes
from treerpo_ray.engine.replica import Replica
from treerpo_ray.engine.types import EngineActor, EngineSetup, EngineStats, Sampling
from treerpo_ray.errors import NodeDiffers
from treerpo_ray.metrics.events import Event
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.prompts.prompt_set import PromptSet
from treerpo_ray.records import TreeRecord
from treerpo_ray.search.gate import Gate
from treerpo_ray.search.tree_pool import TreePool
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import FilePlace, WeightsLost
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.source import Receiver

SHAPE = TreeShape(num_children=(2, 2, 2), step_tokens=(3, 3, 3))
PROMPTS = PromptSet(
    problems=tuple(Problem(id=f"p{i}", question=f"q{i}", answers=("1",)) for i in range(7)),
    token_ids=tuple([i, i + 1] for i in range(7)),
    num_too_long=0,
)
LOGPROB = -0.5
DIFFERS = "10.0.0.9 has torch 2.8.0, and the driver 2.9.1: install the same on all nodes"
ENDS = ["killed", "core dead", "out of memory"]
TREES = 4
STEPS = 4
SEED = 5
BUSY_S = 0.4


class Handle:
    """Stands in for a Ray actor's handle: its methods run as tasks of this event loop."""

    def __init__(self, target: object) -> None:
        self.target = target

    def __getattr__(self, name: str) -> "Method":
        return Method(getattr(self.target, name))


@dataclass
class Method:
    """A method of a handle."""

    call: object

    def options(self, *, num_returns: str) -> "Method":
        assert num_returns == "streaming"
        return self

    def remote(self, *arguments: object) -> object:
        result = self.call(*arguments)
        if inspect.isasyncgen(result):
            return Stream(result)
        return asyncio.ensure_future(result if inspect.isawaitable(result) else resolved(result))


@dataclass
class Stream:
    """What a streaming method returns: its values come as awaitables."""

    values: AsyncIterator[SiblingGroup]

    async def __anext__(self) -> object:
        return resolved(await anext(self.values))


async def resolved(value: object) -> object:
    return value


@dataclass(frozen=True)
class Fault:
    """One engine's failure: in which method, after how many step groups of a tree, and how."""

    method: str
    how: str
    """killed, core dead, out of memory, differs (its node), hung, lost (the weights); while it
    grows also stale, or busy: one tree after the other takes `BUSY_S` to go on."""
    after: int = 0


def sample(seed: int, max_tokens: int, version: int) -> Step:
    """A continuation that follows from its seed; one in four ends the answer."""
    rng = np.random.default_rng(seed)
    ends = rng.random() < 0.25
    length = int(rng.integers(1, max_tokens + 1)) if ends else max_tokens
    return Step(
        parent=ROOT,
        token_ids=rng.integers(0, 100, length).astype(np.int32),
        logprobs=np.full(length, LOGPROB, np.float32),
        versions=np.full(length, version, np.int32),
        stop=StopReason.END_OF_TEXT if ends else StopReason.BOUNDARY,
    )


@dataclass
class FakeEngine:
    """One start of an engine; `fault` is met once."""

    index: int
    fault: Fault | None
    place: str = "node"
    version: int = 0
    num_sampled: int = 0
    held: list[int] = field(default_factory=list)
    """Groups that were handed over with each tree."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    calls: list[str] = field(default_factory=list)

    async def meet(self, method: str, num_groups: int = 0) -> bool:
        """Fail if it is time to; whether it is time to be stale."""
        fault = self.fault
        if fault is None or fault.method != method or num_groups < fault.after:
            return False
        if fault.how == "hung":
            await asyncio.Event().wait()
        if fault.how == "busy":
            if num_groups == fault.after:
                async with self.turn:
                    await asyncio.sleep(BUSY_S)
            return False
        if fault.how == "killed":
            raise ActorDiedError()
        if fault.how == "lost":
            self.fault = None
            raise RayTaskError(method, "trace", WeightsLost("gone")).as_instanceof_cause()
        if fault.how == "out of memory":
            raise OutOfMemoryError("the node ran out of memory")
        if fault.how == "core dead":
            dead = RuntimeError("vLLM's core is dead")
            raise RayTaskError(method, "trace", dead).as_instanceof_cause()
        if fault.how == "differs":
            raise RayTaskError(method, "trace", NodeDiffers(DIFFERS)).as_instanceof_cause()
        return True

    async def node(self) -> str:
        await self.meet("node")
        return self.place

    async def start(self) -> tuple[int, int]:
        self.calls.append("start")
        await self.meet("start")
        return 1000 + self.index, 2000 + self.index

    async def load(self, manifest: Manifest, place: FilePlace) -> None:
        self.calls.append(f"load {manifest.version}")
        if await self.meet("load"):
            wrong = RuntimeError(f"engine serves version 0, not {manifest.version}")
            raise RayTaskError("load", "trace", wrong).as_instanceof_cause()
        self.version = manifest.version

    async def sleep(self) -> None:
        self.calls.append("sleep")
        await self.meet("sleep")

    async def probe(self, token_ids: list[int]) -> list[float]:
        self.calls.append("probe")
        off = await self.meet("probe")
        return [LOGPROB - off] * (len(token_ids) - 1)

    async def grow(
        self,
        prompt_ids: list[int],
        shape: TreeShape,
        sampling: Sampling,
        seed: int,
        held: list[SiblingGroup],
    ) -> AsyncIterator[SiblingGroup]:
        self.calls.append("grow")
        self.held.append(len(held))
        num_groups = len(held)
        sampler = Sampler(self)
        sampler.is_stale = await self.meet("grow", num_groups)
        async for group in grow(prompt_ids, shape, sampler, seed=seed, held=held):
            num_groups += 1
            yield group
            sampler.is_stale = await self.meet("grow", num_groups)

    async def stats(self) -> EngineStats:
        await self.meet("stats")
        return EngineStats(
            start=f"{id(self)}",
            num_requests=self.num_sampled,
            num_prompt_tokens=0,
            num_cached_tokens=0,
            num_sampled_tokens=0,
            cpu_s=0.0,
            busy_s=0.0,
            total_s=0.0,
            version=self.version,
        )

    async def stop(self) -> None:
        self.calls.append("stop")
        await self.meet("stop")


@dataclass
class Sampler:
    """What the search asks; see `FakeEngine`."""

    engine: FakeEngine
    is_stale: bool = False

    async def sample(
        self, prefix: list[int], *, max_tokens: int, delimiters: tuple[int, ...], seed: int
    ) -> Step:
        await asyncio.sleep(0)
        self.engine.num_sampled += 1
        return sample(seed, max_tokens, self.engine.version - self.is_stale)


def whole_tree(prompt: int, seed: int, version: int = 0) -> Tree:
    """The tree that undisturbed engines of one version grow."""

    async def groups() -> list[SiblingGroup]:
        engine = FakeEngine(0, None, version=version)
        ids = PROMPTS.token_ids[prompt]
        return [g async for g in grow(ids, SHAPE, Sampler(engine), seed=seed)]

    return assemble(PROMPTS.token_ids[prompt], asyncio.run(groups()))


@dataclass
class Fleet:
    """All engines that a pool started, by their index, and what it told the run's log."""

    faults: dict[int, list[Fault]] = field(default_factory=dict)
    """Faults of the starts of each engine, in their order; later starts have none."""
    started: dict[int, list[FakeEngine]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    killed: list[FakeEngine] = field(default_factory=list)
    nodes: dict[int, str] = field(default_factory=dict)
    """Node of each engine, if not the one that all share."""
    leaving: dict[str, float] = field(default_factory=dict)
    """Time of the event loop at which a node will be gone, by its name."""
    looks_to_fail: list[Exception] = field(default_factory=list)

    def make(self, setup: EngineSetup, index: int, log_folder: str | None) -> EngineActor:
        faults, before = self.faults.get(index, []), self.started.setdefault(index, [])
        fault = faults[len(before)] if len(before) < len(faults) else None
        engine = FakeEngine(index, fault, self.nodes.get(index, "node"))
        before.append(engine)
        return EngineActor(
            api=Handle(engine),
            kill=lambda: self.killed.append(engine),
            cancel=lambda stream: None,
        )

    def see_nodes(self) -> Nodes:
        if self.looks_to_fail:
            raise self.looks_to_fail.pop()
        ahead_s = time.time() - asyncio.get_running_loop().time()
        leaving = {node: ahead_s + ends_at for node, ends_at in self.leaving.items()}
        return Nodes(num_alive=2, leaving=leaving)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[dict[str, object]]:
        """Fields of the events of a kind."""
        return [dict(event.fields) for event in self.events if event.kind == kind]


async def make_replica(
    index: int,
    *,
    node: str = "a",
    is_serving: bool = True,
    num_trees: int = 0,
    max_trees: int | None = None,
) -> Replica:
    """A replica of a fake engine, serving or still starting, with or without a node."""
    fleet = Fleet(nodes={index: node})
    replica = Replica(
        index=index,
        actor=fleet.make(EngineSetup.of(load([])), index, None),
        limits=EngineConfig(max_trees=max_trees),
        waits=Waits(report=print, report_every_s=600.0),
    )
    if node:
        await replica.find_node("a node")
    if is_serving:
        await replica.start(lambda: None, None)
    for _ in range(num_trees):
        replica.take_place()
    return replica


def make_config(*overrides: str) -> Config:
    own = [f"gate.trees_per_step={TREES}", "gate.max_staleness=1", f"run.seed={SEED}"]
    return load([*own, *overrides])


def make_gate(config: Config, adapt_every: int = 0) -> Gate:
    return Gate(
        mixture=PROMPTS.sets,
        trees_per_step=TREES,
        max_staleness=config.gate.max_staleness,
        num_steps=STEPS,
        seed=SEED,
        num_children=SHAPE.num_children,
        adapt_every=adapt_every,
    )


async def make_pool(config: Config, fleet: Fleet, times: PoolTimes = TIMES) -> TreePool:
    pool = TreePool(
        setup=EngineSetup.of(config),
        log_folder=None,
        make_engine=fleet.make,
        see_nodes=fleet.see_nodes,
        times=times,
    )
    await pool.begin(
        gate=config.gate,
        prompts=PROMPTS,
        shape=SHAPE,
        sampling=Sampling(temperature=config.tree.temperature),
        seed=config.run.seed,
        run_log=Handle(fleet),
    )
    return pool


NOWHERE = FilePlace(path="nowhere", stamp=b"", parts=())


@dataclass(frozen=True)
class Source:
    """Weights of a version, which lie at the same place on every node."""

    at: FilePlace = NOWHERE

    def places(self, engines: Sequence[Receiver]) -> list[Awaitable[FilePlace]]:
        return [resolved(self.at) for _ in engines]


async def serve_from_start(pool: TreePool, version: int = 0) -> None:
    """Have the pool start and serve a version from then on."""
    await asyncio.gather(pool.start(), serve(pool, version, should_probe=True))


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    while not is_so():
        await asyncio.sleep(0.01)


async def serve(pool: TreePool, version: int, *, should_probe: bool = False) -> None:
    """Have the pool serve a version."""
    manifest = Manifest(version=version, tensors=(), digests=())
    probe = Probe(token_ids=[1, 2], logprobs=[LOGPROB])
    await pool.serve(manifest, Source(), probe, should_probe)


async def take(pool: TreePool, count: int, reader: str = "reader") -> list[TreeRecord]:
    """The next `count` trees of the pool."""
    trees: list[TreeRecord] = []
    while len(trees) < count:
        trees += await pool.take(reader, count - len(trees), 10.0) or []
    return trees
