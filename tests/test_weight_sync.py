"""Weights are packed and read back bit for bit, and a proof of other bytes is refused."""

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ObjectStoreFullError, OutOfDiskError, RayTaskError

from treerpo_ray.metrics.events import Event
from treerpo_ray.run_folder.patience import DiskRefused, PatienceTimes
from treerpo_ray.weight_sync import Probe, WeightSync
from treerpo_ray.weights.files import FilePlace, WeightsLost
from treerpo_ray.weights.manifest import ALIGNMENT, BLOCK, LoadProof, Manifest, pack_weights
from treerpo_ray.weights.source import FilesOnNodes, Receiver

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEPT = [torch.int64, torch.uint8, torch.bool]
"""Sent as they are, whatever dtype is asked for."""


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    return noise.to(dtype)


def unpack(manifest: Manifest, chunks: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Read a version as the engine's worker does: by views of the chunks."""
    weights = {}
    for number, chunk in enumerate(chunks):
        info = manifest.update_info(number)
        flat = torch.from_numpy(chunk)
        for name, dtype, shape, offset in zip(*info.values(), strict=True):
            kind = getattr(torch, dtype)
            size = int(np.prod(shape)) * kind.itemsize
            weights[name] = flat[offset : offset + size].view(kind).view(shape)
    return weights


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


SHAPE = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES + KEPT), min_size=6, max_size=6),
    sent=st.sampled_from(DTYPES),
    chunk_bytes=st.integers(1, 400),
)
def test_tensors_come_back_as_they_were_and_lie_aligned_and_whole_in_chunks_of_the_size_asked_for(
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    sent: torch.dtype,
    chunk_bytes: int,
) -> None:
    weights = {
        f"layer.{i}": random_tensor(shape, dtype, seed=i)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    manifest, chunks = pack_weights(weights.items(), version=3, dtype=sent, chunk_bytes=chunk_bytes)
    back = unpack(manifest, chunks)
    assert list(back) == list(weights)
    for name, weight in weights.items():
        assert same(back[name], weight.to(sent) if weight.is_floating_point() else weight)
    assert all(place.offset % ALIGNMENT == 0 for place in manifest.tensors)
    for number, chunk in enumerate(chunks):
        num_tensors = len(manifest.update_info(number)["names"])
        assert len(chunk) < chunk_bytes + ALIGNMENT or num_tensors == 1


def test_small_tensors_share_a_chunk_and_a_big_one_gets_its_own() -> None:
    sizes = {"a": 10, "b": 20, "big": 1000, "c": 16, "d": 16, "e": 1}
    weights = [(name, torch.zeros(size)) for name, size in sizes.items()]
    manifest, chunks = pack_weights(weights, version=1, dtype=torch.float32, chunk_bytes=192)
    assert [(p.name, p.chunk, p.offset) for p in manifest.tensors] == [
        ("a", 0, 0),
        ("b", 0, 64),
        ("big", 1, 0),
        ("c", 2, 0),
        ("d", 2, 64),
        ("e", 2, 128),
    ]
    assert [len(chunk) for chunk in chunks] == [192, 4032, 192]


def test_what_is_packed_is_a_copy_and_may_be_a_parameter_or_a_strided_view() -> None:
    weight = torch.nn.Parameter(random_tensor((4, 6), torch.float32))
    strided = weight.detach().T[::2]
    expected = weight.detach().clone(), strided.clone()
    manifest, chunks = pack_weights(
        [("whole", weight), ("strided", strided)],
        version=0,
        dtype=torch.float32,
        chunk_bytes=1 << 20,
    )
    with torch.no_grad():
        weight.zero_()
    back = unpack(manifest, chunks)
    assert same(back["whole"], expected[0])
    assert same(back["strided"], expected[1])


def test_a_tensor_of_several_blocks_is_cast_and_digested_whole() -> None:
    weight = random_tensor((2, BLOCK // 2 + 3), torch.float32)
    manifest, chunks = pack_weights(
        [("w", weight)], version=0, dtype=torch.bfloat16, chunk_bytes=1 << 30
    )
    assert same(unpack(manifest, chunks)["w"], weight.to(torch.bfloat16))
    assert manifest.digests == (xxhash.xxh3_128_hexdigest(chunks[0].data),)


def test_what_lay_in_the_memory_of_a_chunk_is_not_sent() -> None:
    """Between tensors neither: the same weights have the same digest."""
    packed = [
        pack_weights(
            [("a", torch.ones(3)), ("b", torch.ones(5))],
            version=0,
            dtype=torch.float32,
            chunk_bytes=1 << 20,
            allocate=lambda num_bytes, old=old: np.full(num_bytes, old, np.uint8),
        )
        for old in (0, 255)
    ]
    assert packed[0][0] == packed[1][0]
    assert packed[0][1][0].tobytes() == packed[1][1][0].tobytes()


def test_a_manifest_has_a_digest_of_each_chunk_and_says_the_version() -> None:
    weights = [(str(i), random_tensor((50,), torch.float32, seed=i)) for i in range(3)]
    manifest, chunks = pack_weights(weights, version=7, dtype=torch.bfloat16, chunk_bytes=100)
    assert (manifest.version, len(chunks)) == (7, 3)
    digests = [xxhash.xxh3_128_hexdigest(chunk.tobytes()) for chunk in chunks]
    assert list(manifest.digests) == digests
    assert len(set(digests)) == 3
    changed = [("0", weights[0][1] + 1), *weights[1:]]
    other, _ = pack_weights(changed, version=7, dtype=torch.bfloat16, chunk_bytes=100)
    assert other.digests[0] != manifest.digests[0]
    assert other.digests[1:] == manifest.digests[1:]


def test_the_update_of_a_chunk_names_its_own_tensors_only() -> None:
    weights = [("a", torch.zeros(2, 3)), ("b", torch.zeros(()))]
    manifest, _ = pack_weights(weights, version=0, dtype=torch.float16, chunk_bytes=1)
    assert manifest.update_info(1) == {
        "names": ["b"],
        "dtypes": ["float16"],
        "shapes": [[]],
        "offsets": [0],
    }


MANIFEST = Manifest(version=4, tensors=(), digests=("aa", "bb"))
PROOF = LoadProof(version=4, digests=(("aa", "bb"), ("aa", "bb")))


def test_a_proof_with_the_version_and_the_bytes_of_every_worker_is_accepted() -> None:
    PROOF.check(MANIFEST)


@pytest.mark.parametrize(
    ("proof", "told"),
    [
        (replace(PROOF, version=3), "^engine serves version 3, not 4$"),
        (replace(PROOF, version=5), "^engine serves version 5, not 4$"),
        (replace(PROOF, digests=(("aa", "bb"), ("aa", "bc"))), "^worker 1 received other bytes"),
        (replace(PROOF, digests=(("bb", "aa"),)), "^worker 0 received other bytes"),
        (replace(PROOF, digests=(("aa",),)), "^worker 0 received other bytes"),
        (replace(PROOF, digests=((),)), "^worker 0 received other bytes"),
        (replace(PROOF, digests=()), "^no worker of the engine received version 4$"),
    ],
)
def test_a_proof_of_another_version_or_other_bytes_is_refused(proof: LoadProof, told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        proof.check(MANIFEST)


PLACE = FilePlace(path="/proc/1/fd/3", stamp=b"4", parts=((4096, 3), (8192, 3)))
"""Of the learner."""


class Store:
    """A node's store of weights; Ray's store there has no room as long as the run says so."""

    def __init__(self, run: "Crowded", node: str) -> None:
        self.run, self.node, self.held = run, node, b""

    def hold(self, place: FilePlace) -> FilePlace:
        assert place == PLACE
        self.held = place.stamp
        return place

    def put(self, stamp: bytes, part: int) -> str:
        assert self.held == stamp
        return self.run.put(f"part {part}")

    def place(self, stamp: bytes, chunks: list[object]) -> FilePlace:
        self.run.asked.append((self.node, chunks))
        if self.held != stamp and not chunks:
            raise WeightsLost("gone")
        self.held = stamp
        return replace(PLACE, path=self.node)


class Crowded:
    """A weight sync, and the other actors of a run, with engines on some nodes.

    Args:
        at: Nodes of the engines.
        error: What a store of Ray raises that has no room.
        num_full: So many times, of all that is put.
        num_dead: So many stores are dead when they are first called.
    """

    def __init__(
        self,
        *,
        at: tuple[str, ...],
        error: Exception | None = None,
        num_full: float = 0,
        num_dead: int = 0,
    ) -> None:
        self.at, self.error, self.num_full, self.num_dead = at, error, num_full, num_dead
        self.is_told_to_stop = False
        self.events: list[Event] = []
        self.doing: list[str] = []
        self.asked: list[tuple[str, list[object]]] = []
        self.made: list[str] = []
        self.served: list[FilePlace] = []
        stop = SimpleNamespace(remote=lambda: self.answer(lambda: self.is_told_to_stop))
        self.sync = WeightSync(
            pool=SimpleNamespace(serve=SimpleNamespace(remote=self.serve)),
            gate=SimpleNamespace(is_told_to_stop=stop),
            run_log=SimpleNamespace(event=SimpleNamespace(remote=self.events.append)),
            folder="/run",
            probe_every=1,
            fetch_limit_s=60.0,
            times=PatienceTimes(retry=0.01, look=0.005),
            make_store=self.make_store,
            handle=lambda: SimpleNamespace(place=SimpleNamespace(remote=self.sync.place)),
        )

    def make_store(self, node: str) -> SimpleNamespace:
        self.made.append(node)
        store = Store(self, node)
        is_dead = len(self.made) <= self.num_dead

        def method(name: str) -> SimpleNamespace:
            def remote(*arguments: object) -> Future[object]:
                def work() -> object:
                    if is_dead:
                        raise ActorDiedError
                    return getattr(store, name)(*arguments)

                return self.answer(work)

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(**{name: method(name) for name in ("hold", "put", "place")})

    def put(self, value: str) -> str:
        """Its errors come with the stack of the actor."""
        self.doing.append(asyncio.run(self.sync.status()).doing)
        if self.num_full > 0:
            self.num_full -= 1
            place = {"proctitle": "store", "pid": 1, "ip": "there"}
            raise RayTaskError("put", "a\nstack", self.error, **place).as_instanceof_cause()
        return value

    def answer(self, work: object) -> "Answer":
        done = Answer()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    async def serve(self, manifest: Manifest, source: FilesOnNodes, *_: object) -> None:
        for node in self.at:
            [place] = source.places([Receiver(start=node, node=node, num_workers=1)])
            self.served.append(await place)

    def publish(self, times: int = 1) -> None:
        async def work() -> None:
            for _ in range(times):
                await self.sync.publish(
                    MANIFEST, PLACE, Probe(token_ids=[], logprobs=[]), "learner's"
                )

        asyncio.run(work())


class Answer(Future[object]):
    """Awaited by an actor, or by a thread of it."""

    def __await__(self):
        return asyncio.wrap_future(self).__await__()

    def future(self) -> Future[object]:
        return self


def test_engines_on_the_learners_node_read_its_file_and_nothing_is_put_for_them() -> None:
    run = Crowded(at=("learner's", "learner's"))
    run.publish()
    assert run.made == ["learner's"]
    assert run.asked == [("learner's", [])] * 2
    assert run.events == run.doing == []


def test_weights_are_put_once_for_all_other_nodes_and_brought_to_each() -> None:
    run = Crowded(at=("a", "learner's", "b", "a"))
    run.publish()
    chunks = ["part 0", "part 1"]
    assert run.asked == [("a", chunks), ("learner's", []), ("b", chunks), ("a", chunks)]
    assert [place.path for place in run.served] == ["a", "learner's", "b", "a"]
    assert len(run.doing) == 2
    assert run.made == ["learner's", "a", "b"], "one a node"


def test_a_node_whose_engines_have_left_keeps_no_store() -> None:
    run = Crowded(at=("a", "b"))
    run.publish()
    run.at = ("b",)
    run.publish()
    assert set(run.sync._stores) == {"learner's", "b"}


def test_an_older_version_is_lost_for_who_asks_late() -> None:
    run = Crowded(at=())
    with pytest.raises(WeightsLost):
        asyncio.run(run.sync.place(PLACE.stamp, "a"))
    run.publish()
    with pytest.raises(WeightsLost, match=r"^other weights were published meanwhile$"):
        asyncio.run(run.sync.place(b"3", "a"))


@pytest.mark.parametrize(("at", "made"), [(("learner's",), 2), (("a",), 3)])
def test_a_store_that_was_killed_is_made_anew_from_what_the_learner_still_has(at, made) -> None:
    run = Crowded(at=at, num_dead=1)
    run.publish()
    assert [place.path for place in run.served] == list(at)
    assert len(run.made) == made


def test_stores_that_do_not_stay_alive_are_told_of() -> None:
    run = Crowded(at=("a",))
    run.publish()
    run.num_dead = 9
    with pytest.raises(WeightsLost, match=r"^no store stays alive on node b$"):
        asyncio.run(run.sync.place(PLACE.stamp, "b"))


def test_who_waits_for_room_for_an_engine_that_came_later_is_idle_afterwards() -> None:
    run = Crowded(at=(), error=OutOfDiskError("full"), num_full=1)
    run.publish()
    asyncio.run(run.sync.place(PLACE.stamp, "a"))
    assert run.doing[1].startswith("waiting since ")
    status = asyncio.run(run.sync.status())
    assert (status.doing, status.is_busy) == ("waiting for a version", False)


@pytest.mark.parametrize("error", [OutOfDiskError("full"), ObjectStoreFullError("full")])
def test_room_for_weights_is_waited_for_with_an_event_and_a_status_that_moves(error) -> None:
    run = Crowded(at=("a",), error=error, num_full=3)
    run.publish()
    assert [place.path for place in run.served] == ["a"]
    assert [event.kind for event in run.events] == ["write_waits", "write_done"]
    told = run.events[0].fields
    assert told["what"] == "weights of version 4"
    assert str(told["reason"]).startswith("Ray's object store and the disk that it spills to are")
    assert "stack" not in str(told["reason"])
    waits = [doing.startswith("waiting since ") for doing in run.doing]
    assert waits[:4] == [False, True, True, True], "as the watchdog sees it at each attempt"


def test_a_stop_ends_the_wait_for_room_for_weights() -> None:
    run = Crowded(at=("a",), error=OutOfDiskError("full"), num_full=float("inf"))
    run.is_told_to_stop = True
    with pytest.raises(DiskRefused, match=r"^the weights of version 4 is not written, since"):
        run.publish()
    assert run.served == [] and [event.kind for event in run.events] == ["write_waits"]
