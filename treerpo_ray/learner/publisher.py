"""Publisher: sends the learner's weights, version after version, beside its training."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch

from treerpo_ray.weight_sync import Probe
from treerpo_ray.weights.manifest import Chunk, Manifest, pack_weights
from treerpo_ray.weights.source import OutgoingPlace
from treerpo_ray.weights.transport import Outgoing, Transport

T = TypeVar("T")


class PublishedPolicy(Protocol):
    """What is published of a policy."""

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under their names in a checkpoint; this is the type that they are sent in."""

    def sequence_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probability (nats, temperature 1) of each token after the first."""


class Publisher:
    """Publishes versions of the weights, and does what is to be done once they are served.

    All of it is done in order and beside the caller, who may go on and change the weights: by one
    thread, until it is closed.

    Args:
        send: Has the engines serve what lies on a node, and waits for that; see
            `WeightSync.publish`.
        transport: Gives versions their memory.
        node: Ray's id of this process's node.
        probe_ids: Tokens of the probe.
        dtype: Floating type of the weights that are sent.
        chunk_bytes: Size of a chunk.
        until_written: As of `Patience`: gets memory for a chunk, which there may be none of.
    """

    def __init__(
        self,
        *,
        send: Callable[[Manifest, OutgoingPlace, Probe, str], None],
        transport: Transport,
        node: str,
        probe_ids: list[int],
        dtype: torch.dtype,
        chunk_bytes: int,
        until_written: Callable[[str, Callable[[], Chunk]], Chunk],
    ) -> None:
        self._until_written = until_written
        self.send, self.node, self.probe_ids = send, node, probe_ids
        self.dtype, self.chunk_bytes = dtype, chunk_bytes
        self._transport = transport
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
        memory, what = self._transport.begin(), f"weights of version {version}"
        manifest, _ = pack_weights(
            policy.named_weights(self.dtype),
            version=version,
            dtype=self.dtype,
            chunk_bytes=self.chunk_bytes,
            allocate=lambda num_bytes: self._until_written(what, partial(memory.part, num_bytes)),
            new_digest=self._transport.new_digest,
        )
        logprobs = policy.sequence_logprobs(self.probe_ids).tolist()
        probe = Probe(token_ids=self.probe_ids, logprobs=logprobs)
        self.then(partial(self._send, manifest, memory, memory.seal(), probe))
        return manifest.digests[0]

    def _send(
        self, manifest: Manifest, memory: Outgoing, place: OutgoingPlace, probe: Probe
    ) -> None:
        self.send(manifest, place, probe, self.node)
        memory.release()  # not if that failed: who knows who is still to read it

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
        self._transport.close()


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
