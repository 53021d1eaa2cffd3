"""One suite for all transports: what the learner packs is what the workers of all engines load.

The weight sync is a real one, in an event loop of this process, and so are the learner's transport
and what vLLM's workers receive with; gloo stands in for NCCL, shared memory for a GPU's.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from treerpo_ray.weight_sync import Probe, WeightSync
from treerpo_ray.weights.broadcast import Broadcaster, join
from treerpo_ray.weights.files import WeightsLost
from treerpo_ray.weights.manifest import LoadProof, Manifest, pack_weights
from treerpo_ray.weights.rounds import Poll, Round, Rounds
from treerpo_ray.weights.source import (
    FromGroup,
    Group,
    GroupPlace,
    Place,
    Receiver,
    SenderPlace,
    WeightSource,
)
from treerpo_ray.weights.store import WeightStore
from treerpo_ray.weights.transport import Transport, make_transport

pytestmark = pytest.mark.engine

KINDS = ["file", "ipc", "nccl"]
CPU = torch.device("cpu")
LIMIT_S = 60.0
NODE = "learner's"
PROBE = Probe(token_ids=[], logprobs=[])


def weights_of(version: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(version)
    return {
        "a": torch.randn(37, 5, generator=made),
        "big": torch.randn(40, 20, generator=made),
        "count": torch.tensor(version),
    }


class Worker:
    """One of an engine's workers, as vLLM makes it."""

    def __init__(self, rank: int) -> None:
        from treerpo_ray.engine.vllm_worker import StoreInit, StoreTransfer

        self.transfer = StoreTransfer.__new__(StoreTransfer)  # there is no engine to make it for
        self.transfer.model, self.transfer.device = self, CPU
        self.transfer.parallel_config = SimpleNamespace(rank=rank)
        self.transfer.init_transfer_engine(StoreInit())
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded |= {name: weight.clone() for name, weight in weights}

    def receive(self, manifest: Manifest, chunks: list[dict]) -> tuple[str, ...]:
        from treerpo_ray.engine.vllm_worker import StoreUpdate

        self.transfer.digests, self.loaded = (), {}
        for number, chunk in enumerate(chunks):
            update = StoreUpdate(**chunk, **manifest.update_info(number))
            self.transfer.receive_weights(update)
        return self.transfer.digests


class FakeLlm:
    """Workers of an engine, which do at once what vLLM's would be asked for."""

    def __init__(self, num_workers: int) -> None:
        self.workers = [Worker(rank) for rank in range(num_workers)]
        self.is_dead = False

    async def on_all(self, work: Callable[[Worker], object]) -> list:
        return await asyncio.gather(*(asyncio.to_thread(work, worker) for worker in self.workers))

    async def collective_rpc(self, method: str, args: tuple) -> None:
        assert method == "treerpo_join"
        group, first_rank, limit_s = args
        await self.check_health()
        await self.on_all(lambda each: each.transfer.join(Group(**group), first_rank, limit_s))

    async def check_health(self) -> None:
        if self.is_dead:
            raise RuntimeError("its core is dead")


class Engine:
    """An engine with the chunks of its actor and real workers, without a model."""

    def __init__(
        self, start: str, num_workers: int = 1, node: str = NODE, limit_s: float = LIMIT_S
    ) -> None:
        from treerpo_ray.engine.engine import Engine as Real

        self.is_alive = True
        self.receiver = Receiver(start=start, node=node, num_workers=num_workers)
        self.llm, self.real = FakeLlm(num_workers), Real.__new__(Real)
        self.real._llm, self.real._group = self.llm, ""
        self.real.setup = SimpleNamespace(engine=SimpleNamespace(join_timeout_s=limit_s))

    async def load(self, manifest: Manifest, place: Place) -> None:
        if not self.is_alive:
            raise RuntimeError("its node is gone")
        with ExitStack() as held:
            chunks = await self.real._chunks(place, held)
            digests = await self.llm.on_all(lambda worker: worker.receive(manifest, chunks))
        LoadProof(version=manifest.version, digests=tuple(digests)).check(manifest)

    def has(self, version: int) -> bool:
        expected = weights_of(version)
        return all(
            worker.loaded.keys() == expected.keys()
            and all(torch.equal(worker.loaded[name], expected[name]) for name in expected)
            for worker in self.llm.workers
        )


class Handle:
    """Stands in for an actor's handle within its event loop."""

    def __init__(self, target: object) -> None:
        self.target = target

    def __getattr__(self, name: str) -> SimpleNamespace:
        method = getattr(self.target, name)

        async def call(*arguments: object) -> object:
            found = method(*arguments)
            return await found if asyncio.iscoroutine(found) else found

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


class Run:
    """A learner's transport, the weight sync, and the engines that it has."""

    def __init__(self, kind: str, engines: list[Engine], limit_s: float = LIMIT_S) -> None:
        self.kind, self.engines, self.limit_s = kind, engines, limit_s
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.failed: list[BaseException] = []
        self.sync = WeightSync(
            pool=Handle(self),
            gate=Handle(self),
            run_log=Handle(self),
            folder="/run",
            probe_every=1,
            fetch_limit_s=LIMIT_S,
            make_store=lambda node: Handle(WeightStore()),
            handle=lambda: Handle(self.sync),
        )
        self.transport = self.new_transport()

    def new_transport(self) -> Transport:
        return make_transport(
            self.kind,
            device=CPU,
            address="127.0.0.1",
            next_round=lambda poll: self.wait(self.sync.next_round(poll)),
            limit_s=self.limit_s,
        )

    def wait(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(3 * LIMIT_S)

    async def serve(
        self, manifest: Manifest, source: WeightSource, probe: Probe, should_probe: bool
    ) -> None:
        self.served = manifest, source
        engines = self.engines
        self.engines = [engine for engine in engines if engine.is_alive]
        await self.bring(engines)

    async def bring(self, engines: list[Engine]) -> None:
        """Have engines load what is served, together."""
        manifest, source = self.served
        places = source.places([engine.receiver for engine in engines])

        async def load(engine: Engine, place) -> None:
            await engine.load(manifest, await place)

        loads = [load(engine, place) for engine, place in zip(engines, places, strict=True)]
        results = await asyncio.gather(*loads, return_exceptions=True)
        self.failed = [result for result in results if result is not None]
        for result in self.failed:
            if isinstance(result, WeightsLost):
                raise result

    def publish(self, version: int) -> None:
        memory = self.transport.begin()
        manifest, _ = pack_weights(
            weights_of(version).items(),
            version=version,
            dtype=torch.float32,
            chunk_bytes=1000,
            allocate=memory.part,
            new_digest=self.transport.new_digest,
        )
        assert len(manifest.digests) == 3
        self.wait(self.sync.publish(manifest, memory.seal(), PROBE, NODE))
        memory.release()

    def close(self) -> None:
        self.transport.close()
        for thread in threading.enumerate():
            while thread.name == "broadcaster" and thread.is_alive():
                self.wait(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _end(self) -> None:
        """Answer whoever waits for a round, however long it would be."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def a_run(kind: str, *engines: Engine, limit_s: float = LIMIT_S) -> Iterator[Run]:
    run = Run(kind, list(engines), limit_s)
    yield run
    run.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_worker_of_every_engine_loads_and_proves_each_version(kind: str) -> None:
    engines = [Engine("one", num_workers=2), Engine("two")]
    with a_run(kind, *engines) as run:
        for version in range(4):
            run.publish(version)
            assert run.failed == []
            assert all(engine.has(version) for engine in engines)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_comes_later_loads_the_newest_and_takes_part_from_then_on(kind: str) -> None:
    first, late = Engine("one"), Engine("late", num_workers=2)
    with a_run(kind, first) as run:
        run.publish(1)
        run.wait(run.bring([late]))
        assert run.failed == [] and late.has(1)
        run.engines = [late, first]
        run.publish(2)
        assert run.failed == [] and late.has(2) and first.has(2)


@pytest.mark.parametrize("kind", KINDS)
def test_when_an_engine_leaves_the_others_go_on(kind: str) -> None:
    engines = [Engine("one"), Engine("two"), Engine("three")]
    with a_run(kind, *engines) as run:
        run.publish(1)
        run.engines = [engines[0], engines[2]]
        run.publish(2)
        assert run.failed == [] and engines[0].has(2) and engines[2].has(2) and engines[1].has(1)


@pytest.mark.parametrize("kind", KINDS)
def test_other_bytes_than_the_manifest_says_are_not_proved(kind: str) -> None:
    engine = Engine("one")
    with a_run(kind, engine) as run:
        run.publish(1)
        manifest, source = run.served
        run.served = replace(manifest, digests=(*manifest.digests[:-1], "other")), source
        run.wait(run.bring([engine]))
        assert [str(error) for error in run.failed] == [
            "worker 0 received other bytes for version 1"
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_version_before_the_newest_is_lost_or_not_proved(kind: str) -> None:
    engine = Engine("one")
    with a_run(kind, engine) as run:
        run.publish(1)
        before = run.served
        run.publish(2)
        run.served = before
        if kind == "ipc":  # the place is known, and the bytes are others
            run.wait(run.bring([engine]))
            assert "received other bytes for version 1" in str(run.failed[0])
        else:
            with pytest.raises(WeightsLost, match="other weights were published meanwhile"):
                run.wait(run.bring([engine]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_that_starts_anew_is_heard_and_the_one_before_is_not(kind: str) -> None:
    engine = Engine("one")
    with a_run(kind, engine) as run:
        run.publish(1)
        gone, run.transport = run.transport, run.new_transport()
        run.publish(2)
        assert run.failed == [] and engine.has(2)
        gone.close()


def test_the_memory_of_a_learner_that_has_ended_is_let_go_with_the_first_version_of_the_next() -> (
    None
):
    engine = Engine("one")
    [worker] = engine.llm.workers
    worker.transfer._put_back = lambda: None  # there is no model
    with a_run("ipc", engine) as run:
        counts = []
        for version in range(4):
            if version == 2:
                run.transport = run.new_transport()
            run.publish(version)
            worker.transfer.finish_weight_update()
            counts.append(len(worker.transfer._shared._maps))
        assert counts == [3, 3, 3, 3] and run.failed == []


def test_weights_on_a_gpu_are_lost_for_an_engine_of_another_node() -> None:
    with a_run("ipc", Engine("one")) as run:
        run.publish(1)
        with pytest.raises(WeightsLost, match=r"sync\.transport=ipc .* the learner's node alone"):
            run.wait(run.bring([Engine("far", node="another")]))


def test_a_learner_gives_up_engines_that_do_not_receive_and_says_so_of_their_group() -> None:
    polls: list[Poll] = []
    joined: list[threading.Thread] = []
    sealed: SimpleQueue[SenderPlace] = SimpleQueue()

    def next_round(poll: Poll) -> Round | None:
        polls.append(poll)
        if len(polls) > 1:
            raise RuntimeError("the run ends")
        group = Group(name="g", address=poll.address, port=poll.port, world_size=2)
        silent = partial(join, group, rank=1, device=CPU, limit_s=LIMIT_S)
        joined.append(threading.Thread(target=silent, daemon=True))
        joined[0].start()
        return Round(group=group, stamp=sealed.get().stamp)

    learner = Broadcaster(device=CPU, address="127.0.0.1", next_round=next_round, limit_s=3.0)
    learner.begin()
    learner.part(2**26)  # more than waits on its way
    sealed.put(learner.seal())
    learner._thread.join(LIMIT_S)
    assert [poll.failed for poll in polls] == ["", "g"]
    joined[0].join(LIMIT_S)


def test_an_engine_that_died_before_its_group_met_costs_the_others_nothing() -> None:
    alive, dead = Engine("one", num_workers=2, limit_s=5.0), Engine("two")
    dead.is_alive = False
    with a_run("nccl", alive, dead, limit_s=5.0) as run:
        run.publish(1)
        assert run.failed == [] and alive.has(1)


def test_an_engine_whose_core_is_dead_does_not_say_that_weights_are_lost() -> None:
    engine, place = Engine("one"), Group(name="g", address="here", port=7, world_size=2)
    engine.llm.is_dead = True
    with ExitStack() as held, pytest.raises(RuntimeError, match="its core is dead") as caught:
        asyncio.run(engine.real._chunks(GroupPlace(group=place, first_rank=1, sizes=(64,)), held))
    assert not isinstance(caught.value, WeightsLost)


def test_a_group_that_never_forms_does_not_keep_a_learner() -> None:
    polls: list[Poll] = []
    sealed: SimpleQueue[SenderPlace] = SimpleQueue()
    never = threading.Event()

    def next_round(poll: Poll) -> Round | None:
        polls.append(poll)
        if len(polls) > 1:
            raise RuntimeError("the run ends")
        group = Group(name="g", address=poll.address, port=poll.port, world_size=2)
        return Round(group=group, stamp=sealed.get().stamp)

    learner = Broadcaster(
        device=CPU,
        address="127.0.0.1",
        next_round=next_round,
        limit_s=0.1,
        join=lambda *_, **__: never.wait(),
    )
    learner.begin()
    learner.part(64)
    sealed.put(learner.seal())
    learner._thread.join(LIMIT_S)
    assert [poll.failed for poll in polls] == ["", "g"]
    learner.begin()
    never.set()


def test_engines_that_asked_for_the_version_before_are_not_sent_another() -> None:
    failed: list[str] = []

    def next_round(poll: Poll) -> Round | None:
        failed.append(poll.failed)
        if len(failed) > 1:
            raise RuntimeError("the run ends")
        # It would be waited for: nobody joins.
        group = Group(name="g", address=poll.address, port=poll.port, world_size=2)
        return Round(group=group, stamp=b"before")

    learner = Broadcaster(device=CPU, address="127.0.0.1", next_round=next_round, limit_s=3600.0)
    learner.begin()
    learner.part(64)
    learner.seal()
    learner._thread.join(LIMIT_S)
    assert failed == ["", "g"]


def poll(sender: str, **fields: str) -> Poll:
    return Poll(sender=sender, address="here", port=7, **fields)


def test_engines_of_one_call_get_numbers_behind_each_other_in_one_group() -> None:
    async def scenario() -> None:
        rounds = Rounds()
        engines = (Engine("one", num_workers=2).receiver, Engine("two").receiver)
        opened = asyncio.ensure_future(rounds.open("me", b"1", engines, LIMIT_S))
        found = await rounds.next(poll("me"))
        assert found.group == await opened and found.stamp == b"1"
        assert found.group.world_size == 4
        again = asyncio.ensure_future(rounds.open("me", b"2", engines, LIMIT_S))
        assert (await rounds.next(poll("me"))).group == found.group == await again
        failed = asyncio.ensure_future(rounds.open("me", b"3", engines, LIMIT_S))
        other = await rounds.next(poll("me", failed=found.group.name))
        assert other.group == await failed and other.group.name != found.group.name

    asyncio.run(scenario())


def test_who_waits_for_a_learner_that_does_not_come_is_told_that_weights_are_lost() -> None:
    async def scenario() -> None:
        rounds = Rounds()
        with pytest.raises(WeightsLost, match="the learner did not send them within 0 s"):
            await rounds.open("gone", b"1", [Engine("one").receiver], 0.01)
        assert asdict(poll("me")) and rounds._asked == []

    asyncio.run(scenario())


def test_a_learner_that_comes_as_the_time_is_over_waits_for_the_next_round() -> None:
    async def scenario() -> None:
        rounds, engines = Rounds(), [Engine("one").receiver]
        late = asyncio.ensure_future(rounds.open("me", b"1", engines, LIMIT_S))
        await asyncio.sleep(0)
        found = asyncio.ensure_future(rounds.next(poll("me")))  # its turn comes first
        late.cancel()  # as its limit does: what it waits for is done, and it is still in the list
        again = asyncio.ensure_future(rounds.open("me", b"2", engines, LIMIT_S))
        assert (await found).stamp == b"2"
        await again

    asyncio.run(scenario())


def test_without_engines_no_group_is_asked_for() -> None:
    assert FromGroup(sync=Handle(None), stamp=b"1", sizes=(64,)).places([]) == []
