"""Publisher: sends the learner's weights, version after version, beside its training."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import ray
import torch

from treerpo_ray.actor import Get, Put
from treerpo_ray.weight_sync import Manifest, Probe, pack_weights

T = TypeVar("T")


class PublishedPolicy(Protocol):
    """What is published of a policy."""

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under their names in a checkpoint, floating ones in this type."""

    def sequence_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probability (nats, temperature 1) of each token after the first."""


class Publisher:
    """Publishes versions of the weights, and does what is to be done once they are served.

    All of it is done in order and beside the caller, who may go on and change the weights: by one
    thread, until it is closed.

    Args:
        send: Has the engines serve what lies on a node; see `WeightSync.publish`.
        node: Ray's id of this process's node.
        probe_ids: Tokens of the probe.
        dtype: Floating type of the weights that are sent.
        chunk_bytes: Size of a chunk.
        until_written: As of `Patience`: puts a chunk in Ray's store, whose memory and disk may be
            full.
        get: Waits until the engines serve it.
        put: Puts a chunk in Ray's store.
    """

    def __init__(
        self,
        *,
        send: Callable[[Manifest, list[ray.ObjectRef], Probe, str], ray.ObjectRef[None]],
        node: str,
        probe_ids: list[int],
        dtype: torch.dtype,
        chunk_bytes: int,
        until_written: Callable[[str, Callable[[], ray.ObjectRef]], ray.ObjectRef],
        get: Get = ray.get,
        put: Put = ray.put,
    ) -> None:
        self._until_written, self._get, self._put = until_written, get, put
        self.send, self.node, self.probe_ids = send, node, probe_ids
        self.dtype, self.chunk_bytes = dtype, chunk_bytes
        self._last: Future[Any] = Future()
        self._last.set_result(None)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon, which no thread of an executor is: a publication that hangs must not keep a
        # worker alive that has failed.
        threading.Thread(target=_serve, args=(self._queue,), name="publisher", daemon=True).start()

    def publish(self, policy: PublishedPolicy, version: int) -> str:
        """Begin to publish `policy` as `version`; returns the digest of its first chunk.

        A copy of the weights is made before this returns.
        """
        manifest, chunks = pack_weights(
            policy.named_weights(self.dtype),
            version=version,
            dtype=self.dtype,
            chunk_bytes=self.chunk_bytes,
        )
        logprobs = policy.sequence_logprobs(self.probe_ids).tolist()
        probe = Probe(token_ids=self.probe_ids, logprobs=logprobs)
        what = f"weights of version {version}"
        refs = [self._until_written(what, partial(self._put, chunk)) for chunk in chunks]
        self.then(lambda: self._get(self.send(manifest, refs, probe, self.node)))
        return manifest.digests[0]

    def then(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done once all before it is; it is left out if any of that failed.

        Returns:
            What it gives, which is there when all is done until then; raises what failed first.
        """
        done: Future[T] = Future()
        before, self._last = self._last, done
        self._queue.put(partial(_work, before, work, done))
        return done

    @property
    def is_under_way(self) -> bool:
        """Whether there is something to `wait` for."""
        return not self._last.done()

    def wait(self) -> None:
        """Wait until all is done; raises what failed first."""
        self._last.result()

    def close(self) -> None:
        """End its thread, once all is done that it was given; does not wait for that."""
        self._queue.put(None)


def _serve(queue: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (work := queue.get()) is not None:
        work()
        # It holds weights in Ray's store, which else stay there until there is more to do.
        del work


def _work(before: Future[Any], work: Callable[[], T], done: Future[T]) -> None:
    try:
        before.result()
        done.set_result(work())
    except BaseException as error:  # raised again in `wait`
        done.set_exception(error)
