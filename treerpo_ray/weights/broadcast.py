"""Broadcast: the learner's process sends a version from its device to all engines' workers at once.

The group is NCCL's where the weights are on GPUs, made and numbered as vLLM does it, and gloo's on
CPUs. A process that dies in the middle leaves the others of its group waiting; the learner gives
them up after a while, engines are replaced by their pool.
"""

import logging
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import closing, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from treerpo_ray.weights.device import DeviceMemory
from treerpo_ray.weights.files import WeightsLost
from treerpo_ray.weights.manifest import DeviceDigest, Digest
from treerpo_ray.weights.rounds import Poll, Round
from treerpo_ray.weights.source import Group, SenderPlace

if TYPE_CHECKING:
    from torch.cuda import Stream

log = logging.getLogger(__name__)


class Communicator(Protocol):
    """What sends within a group; that of vLLM's for NCCL is one."""

    def broadcast(self, tensor: Tensor, src: int, stream: "Stream | None" = None) -> None:
        """Send a tensor from number `src` to all others, into theirs."""

    def destroy(self) -> None:
        """Leave the group; a broadcast under way ends."""


class GlooCommunicator:
    """A group of processes whose tensors are in main memory.

    Args:
        listener: Socket of number 0, which the others connect to.
        limit_s: Time that others get to join, and for each broadcast.
    """

    def __init__(
        self, *, group: Group, rank: int, listener: socket.socket | None, limit_s: float
    ) -> None:
        import torch.distributed as dist

        limit = timedelta(seconds=limit_s)
        store = dist.TCPStore(
            group.address,
            group.port,
            group.world_size,
            is_master=listener is not None,
            timeout=limit,
            master_listen_fd=None if listener is None else listener.detach(),
            use_libuv=False,
        )
        self._group = dist.ProcessGroupGloo(
            dist.PrefixStore(group.name, store), rank, group.world_size, limit
        )

    def broadcast(self, tensor: Tensor, src: int, stream: "Stream | None" = None) -> None:
        """See `Communicator`."""
        self._group.broadcast(tensor, src).wait()  # type: ignore[attr-defined]  # by torch's stubs

    def destroy(self) -> None:
        """See `Communicator`."""
        self._group.abort()


def join(
    group: Group,
    *,
    rank: int,
    device: torch.device,
    limit_s: float,
    listener: socket.socket | None = None,
) -> Communicator:
    """Join a group; returns once all have.

    Args:
        rank: Number of this process in it.
        device: Where its tensors are.
        limit_s: Time that the others get.
        listener: Socket of number 0, bound to the group's port.
    """
    if device.type == "cpu":
        return GlooCommunicator(group=group, rank=rank, listener=listener, limit_s=limit_s)
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer.nccl_common import unpinned_nccl_env

    meeting = StatelessProcessGroup.create(
        host=group.address,
        port=group.port,
        rank=rank,
        world_size=group.world_size,
        store_timeout=round(limit_s),
        listen_socket=listener,
    )
    with unpinned_nccl_env(), torch.cuda.device(device):
        return PyNcclCommunicator(meeting, device=device)


class Join(Protocol):
    """As `join`."""

    def __call__(
        self,
        group: Group,
        *,
        rank: int,
        device: torch.device,
        limit_s: float,
        listener: socket.socket | None = None,
    ) -> Communicator: ...


class Broadcaster:
    """The learner's side: keeps the newest version on its device and sends it when engines ask.

    Args:
        device: Of the learner's first worker.
        address: Of its machine, for others.
        next_round: Asks for the next round; see `Rounds.next`.
        limit_s: Time that engines get to join a group and to receive.
        join: Joins a group.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        address: str,
        next_round: Callable[[Poll], Round | None],
        limit_s: float,
        join: Join = join,
    ) -> None:
        self._join = join
        self._device, self._address, self._limit_s = device, address, limit_s
        self._next_round = next_round
        self._memory = DeviceMemory(device)
        self._writing = threading.Lock()
        """Held while a version is written, and while it is sent."""
        self._sender = uuid.uuid4().hex
        self._stamp = b""
        """Of the publication that its memory holds."""
        self._communicator: Communicator | None = None
        self._name = ""
        """Of the group that it is of."""
        self._failed = ""
        self._is_closed = False
        # A daemon: a group that hangs must not keep a worker alive that has failed.
        self._thread = threading.Thread(target=self._serve, name="broadcaster", daemon=True)

    def new_digest(self) -> Digest:
        """Of a chunk on its device."""
        return DeviceDigest()

    def begin(self) -> "Broadcaster":
        """Begin to write the next version, once the one before is not being sent."""
        if self._device.type == "cuda":
            # By this thread, before the first update: it sets how torch compiles.
            import vllm.distributed.device_communicators.pynccl  # noqa: F401
        self._writing.acquire()
        self._memory.begin()
        return self

    def part(self, num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
        """The next chunk, to be written; what is in it is undefined."""
        return self._memory.part(num_bytes)

    def seal(self) -> SenderPlace:
        """All is written; it is sent from here on."""
        self._memory.finish()
        self._stamp = uuid.uuid4().bytes
        sizes = tuple(len(part) for part in self._memory.parts)
        place = SenderPlace(stamp=self._stamp, sender=self._sender, sizes=sizes)
        self._writing.release()
        if self._thread.ident is None:
            self._thread.start()
        return place

    def release(self) -> None:
        """Engines that ask later are sent it, too."""

    def close(self) -> None:
        """Send nothing more; does not wait for what is being sent."""
        self._is_closed = True

    def _serve(self) -> None:
        try:
            while not self._is_closed and self._serve_once():
                pass
        finally:
            self._leave()

    def _serve_once(self) -> bool:
        """Ask, and send what is asked for; whether to go on."""
        with closing(socket.create_server((self._address, 0))) as listener:
            poll = Poll(
                sender=self._sender,
                address=self._address,
                port=listener.getsockname()[1],
                failed=self._failed,
            )
            try:
                asked = self._next_round(poll)
            except Exception as error:  # the run ends, and tells why
                log.warning("nobody is left to send weights to: %s", error)
                return False
            if asked is None:
                return True
            self._failed = ""
            try:
                self._send(asked, listener)
            except Exception as error:  # the engines have theirs, and their pool replaces them
                log.warning("weights were not sent: %s", error)
                self._failed = asked.group.name
                self._leave()
            return True

    def _send(self, asked: Round, listener: socket.socket) -> None:
        group, watch = asked.group, threading.Timer(self._limit_s, self._leave)
        watch.daemon = True
        with self._writing:
            if asked.stamp != self._stamp:  # it was written while an engine asked
                raise WeightsLost("other weights were written meanwhile")
            if group.name != self._name:
                self._leave()
                self._communicator = self._joined(group, listener)
                self._name = group.name
            communicator = self._communicator
            assert communicator is not None  # of this group
            watch.start()
            try:
                is_gpu = self._device.type == "cuda"
                stream = torch.cuda.Stream(self._device) if is_gpu else None
                for part in self._memory.parts:
                    communicator.broadcast(part, src=0, stream=stream)
                if stream is not None:
                    stream.synchronize()
            finally:
                watch.cancel()
            if self._communicator is None:
                raise TimeoutError(f"waited {self._limit_s:.0f} s for engines to receive weights")

    def _joined(self, group: Group, listener: socket.socket) -> Communicator:
        """Join a group, in a thread of its own: for one that dies once all have met NCCL waits
        without limit, and with it whoever is to write the next version."""
        joined: Future[Communicator] = Future()

        def work() -> None:
            with suppress(InvalidStateError):  # it was given up meanwhile
                try:
                    made = self._join(
                        group, rank=0, device=self._device, limit_s=self._limit_s, listener=listener
                    )
                except Exception as error:
                    joined.set_exception(error)
                else:
                    joined.set_result(made)

        threading.Thread(target=work, name="joiner", daemon=True).start()
        done, _ = wait([joined], self._limit_s)
        if not done and joined.cancel():
            raise TimeoutError(f"waited {self._limit_s:.0f} s for engines to join a group")
        return joined.result()

    def _leave(self) -> None:
        """Leave the group, if there is one; may be called while something is sent in it."""
        communicator, self._communicator, self._name = self._communicator, None, ""
        if communicator is not None:
            communicator.destroy()
