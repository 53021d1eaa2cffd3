"""Weights are packed and read back bit for bit, and a proof of other bytes is refused."""

import asyncio
import hashlib
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OwnerDiedError, RayTaskError

from treerpo_ray.metrics.events import Event
from treerpo_ray.run_folder.patience import DiskRefused, PatienceTimes
from treerpo_ray.weight_sync import (
    ALIGNMENT,
    ChunkFiles,
    LoadProof,
    Manifest,
    ObjectStores,
    Probe,
    WeightsLost,
    WeightSync,
    pack_weights,
)

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


def test_a_manifest_has_a_digest_of_each_chunk_and_says_the_version() -> None:
    weights = [(str(i), random_tensor((50,), torch.float32, seed=i)) for i in range(3)]
    manifest, chunks = pack_weights(weights, version=7, dtype=torch.bfloat16, chunk_bytes=100)
    assert (manifest.version, len(chunks)) == (7, 3)
    digests = [hashlib.blake2b(chunk.tobytes(), digest_size=16).hexdigest() for chunk in chunks]
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


def test_chunk_files_hold_the_chunks_and_are_gone_afterwards() -> None:
    chunks = [np.arange(10, dtype=np.uint8), np.zeros(3, np.uint8)]
    with ChunkFiles() as files:
        paths = [Path(files.write(chunk)) for chunk in chunks]
        assert [path.read_bytes() for path in paths] == [chunk.tobytes() for chunk in chunks]
    assert not any(path.exists() for path in paths)


def test_chunk_files_are_gone_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), ChunkFiles() as files:
        path = Path(files.write(np.zeros(3, np.uint8)))
        raise ZeroDivisionError
    assert not path.exists()


def test_chunks_that_are_lost_on_their_way_are_told_as_such() -> None:
    async def chunk() -> np.ndarray:
        return np.zeros(3, np.uint8)

    async def lost() -> np.ndarray:
        raise OwnerDiedError("00", None, "")

    async def fetch(*chunks: Awaitable[np.ndarray]) -> list[str]:
        with ChunkFiles() as files:
            return await files.fetch(MANIFEST, list(chunks))

    assert len(asyncio.run(fetch(chunk(), chunk()))) == 2
    with pytest.raises(WeightsLost, match=r"^version 4 is lost: OwnerDiedError$"):
        asyncio.run(fetch(chunk(), lost()))


class Crowded:
    """A weight sync, and the other actors of a run; no store of Ray has room `num_full` times."""

    def __init__(self, error: Exception, *, node: str, num_full: float) -> None:
        self.error, self.num_full, self.is_told_to_stop = error, num_full, False
        self.events: list[Event] = []
        self.doing: list[str] = []
        self.served: list[list[object]] = []
        store = SimpleNamespace(keep=SimpleNamespace(remote=self.keep))
        stop = SimpleNamespace(remote=lambda: self.answer(lambda: self.is_told_to_stop))
        self.sync = WeightSync(
            pool=SimpleNamespace(serve=SimpleNamespace(remote=self.serve)),
            gate=SimpleNamespace(is_told_to_stop=stop),
            run_log=SimpleNamespace(event=SimpleNamespace(remote=self.events.append)),
            folder="/run",
            probe_every=1,
            times=PatienceTimes(retry=0.01, look=0.005),
            object_stores=ObjectStores(here="here", put=self.put, on={"there": store}.__getitem__),
        )
        self.node = node

    def put(self, value: object) -> object:
        status = asyncio.run(self.sync.status())
        self.doing.append(status.doing)
        if self.num_full > 0:
            self.num_full -= 1
            raise self.error
        return value

    def keep(self, chunk: list[object]) -> SimpleNamespace:
        """What an actor gives on another node; its errors come with their stack."""

        def work() -> object:
            try:
                return self.put(chunk)
            except Exception as error:
                place = {"proctitle": "store", "pid": 1, "ip": "there"}
                raise RayTaskError(
                    "keep", "a\nstack", error, **place
                ).as_instanceof_cause() from None

        return self.answer(work)

    def answer(self, work: object) -> SimpleNamespace:
        def future() -> Future[object]:
            done: Future[object] = Future()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            return done

        return SimpleNamespace(future=future)

    async def serve(self, manifest: Manifest, chunks: list[object], *_: object) -> None:
        self.served.append(chunks)

    def publish(self) -> None:
        async def chunk() -> np.ndarray:
            return np.zeros(3, np.uint8)

        async def work() -> None:
            chunks = [chunk(), chunk()]
            probe = Probe(token_ids=[], logprobs=[])
            try:
                await self.sync.publish(MANIFEST, chunks, probe, self.node)
            finally:
                for each in chunks:
                    each.close()

        asyncio.run(work())


@pytest.mark.parametrize("node", ["here", "there"])
@pytest.mark.parametrize("error", [OutOfDiskError("full"), ObjectStoreFullError("full")])
def test_room_for_weights_is_waited_for_with_an_event_and_a_status_that_moves(error, node) -> None:
    run = Crowded(error, node=node, num_full=3)
    run.publish()
    assert len(run.served[0]) == 2
    assert [event.kind for event in run.events] == ["write_waits", "write_done"]
    told = run.events[0].fields
    assert told["what"] == "weights of version 4"
    assert str(told["reason"]).startswith("Ray's object store and the disk that it spills to are")
    assert "stack" not in str(told["reason"])
    waits = [doing.startswith("waiting since ") for doing in run.doing]
    assert waits[:4] == [False, True, True, True], "as the watchdog sees it at each attempt"


@pytest.mark.parametrize("node", ["here", "there"])
def test_a_stop_ends_the_wait_for_room_for_weights(node) -> None:
    run = Crowded(OutOfDiskError("full"), node=node, num_full=float("inf"))
    run.is_told_to_stop = True
    with pytest.raises(DiskRefused, match=r"^the weights of version 4 is not written, since"):
        run.publish()
    assert run.served == [] and [event.kind for event in run.events] == ["write_waits"]
