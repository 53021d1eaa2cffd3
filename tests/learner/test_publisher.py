"""Publisher: what it is given is done in order, beside the caller and by one thread."""

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.support.project import PROJECT
from treerpo_ray.learner.publisher import Publisher
from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.files import FileMaps, FilePlace, HeldFile
from treerpo_ray.weights.manifest import Manifest
from treerpo_ray.weights.transport import FileTransport

LIMIT_S = 600.0


def publisher(send: Callable[..., None] = lambda *_: pytest.fail("nothing is sent")) -> Publisher:
    return Publisher(
        send=send,
        transport=FileTransport(),
        node="here",
        probe_ids=[1, 2],
        dtype=torch.float32,
        chunk_bytes=2**20,
        until_written=lambda what, write: write(),
    )


def test_all_is_done_in_order_by_one_thread_beside_the_caller() -> None:
    ours, hold, done = publisher(), threading.Event(), list[tuple[int, int]]()

    def work(number: int) -> int:
        assert hold.wait(LIMIT_S)
        done.append((number, threading.get_ident()))
        return number

    results = [ours.then(lambda number=number: work(number)) for number in range(5)]
    assert ours.is_under_way and not done
    hold.set()
    ours.wait()
    assert not ours.is_under_way
    assert [result.result() for result in results] == [number for number, _ in done] == [*range(5)]
    assert len({thread for _, thread in done} | {threading.get_ident()}) == 2
    ours.close()


def test_what_is_done_is_let_go_at_once() -> None:
    """It holds a version of the weights in Ray's store."""

    class Version:
        pass

    ours, gone, version = publisher(), threading.Event(), Version()
    weakref.finalize(version, gone.set)
    ours.then(lambda version=version: None).result()
    del version
    assert gone.wait(LIMIT_S)
    ours.close()


def test_what_comes_after_a_failure_is_left_out_and_raises_it() -> None:
    ours, done = publisher(), list[int]()
    before = ours.then(lambda: done.append(1))
    failed = ours.then(lambda: 1 // 0)
    after = ours.then(lambda: done.append(2))
    for late in (failed.result, after.result, ours.wait):
        with pytest.raises(ZeroDivisionError):
            late()
    with pytest.raises(ZeroDivisionError):
        ours.then(lambda: done.append(3)).result(LIMIT_S)
    assert before.result() is None and done == [1]
    ours.close()


def test_its_thread_ends_once_it_is_closed_and_has_done_what_it_was_given() -> None:
    ours, hold = publisher(), threading.Event()
    own = ours.then(threading.current_thread).result(LIMIT_S)
    last = ours.then(lambda: hold.wait(LIMIT_S))
    ours.close()
    assert own.is_alive()
    hold.set()
    assert last.result(LIMIT_S)
    own.join(LIMIT_S)
    assert not own.is_alive()


HANGS = """
import threading
from tests.learner.test_publisher import publisher
begun = threading.Event()
publisher().then(lambda: begun.set() or threading.Event().wait())
begun.wait()
raise RuntimeError("the worker has failed")
"""


def test_a_publication_that_hangs_does_not_keep_a_worker_alive_that_has_failed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS],
        cwd=PROJECT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 1 and "the worker has failed" in done.stderr


class Policy:
    """Its only weight is its version."""

    def __init__(self, version: int) -> None:
        self.version = version

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.full((5,), float(self.version))

    def sequence_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        return torch.zeros(len(token_ids) - 1)


def test_memory_is_used_again_once_a_version_was_sent_and_nobody_has_it_open() -> None:
    sent: list[tuple[float, int]] = []
    served: list[HeldFile] = []

    def send(manifest: Manifest, place: FilePlace, probe: Probe, node: str) -> None:
        """As a node's store: it has the file open until it has the next one."""
        held = HeldFile(place)
        [chunk] = [FileMaps().read(held.place.path, *part) for part in place.parts]
        sent.append((float(chunk.view(np.float32)[0]), os.stat(held.place.path).st_ino))
        for old in served:
            old.close()
        served[:] = [held]

    ours = publisher(send)
    for version in range(5):
        ours.publish(Policy(version), version)
        ours.wait()
    ours.close()
    versions, files = zip(*sent, strict=True)
    assert versions == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert files == (files[0], files[1]) * 2 + (files[0],) and files[0] != files[1]
