"""Transport: how versions of the weights leave the learner's first worker.

Each version is packed chunk by chunk into memory that the transport gives, and sealed; what that
returns tells the weight sync, and by it the engines, where it lies.
"""

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import torch

from treerpo_ray.weights.broadcast import Broadcaster
from treerpo_ray.weights.device import DeviceMemory
from treerpo_ray.weights.files import WeightFile, WeightFiles
from treerpo_ray.weights.manifest import Chunk, DeviceDigest, Digest, HostDigest
from treerpo_ray.weights.rounds import Poll, Round
from treerpo_ray.weights.source import OutgoingPlace

TransportKind: TypeAlias = Literal["file", "ipc", "nccl"]


class Outgoing(Protocol):
    """Memory of one version."""

    def part(self, num_bytes: int) -> Chunk:
        """The next chunk, to be written; what is in it is undefined.

        Raises:
            OSError, torch.OutOfMemoryError: there is no memory for it.
        """

    def seal(self) -> OutgoingPlace:
        """All is written, and stays as it is until `release`."""

    def release(self) -> None:
        """All engines that were there have it."""


class Transport(Protocol):
    """Gives versions their memory, one after the other."""

    def new_digest(self) -> Digest:
        """Begin the digest of a chunk, where its memory is."""

    def begin(self) -> Outgoing:
        """Memory for the next version; waits for who still reads it."""

    def close(self) -> None:
        """No version follows; does not wait."""


class FileTransport:
    """Through main memory, in a file for each node; see `files`."""

    def __init__(self) -> None:
        self._files = WeightFiles()

    def new_digest(self) -> Digest:
        """See `Transport`, as for all that follow."""
        return HostDigest()

    def begin(self) -> WeightFile:
        """A file that nobody reads."""
        return self._files.begin()

    def close(self) -> None:
        """Files go with who has them."""


class DeviceTransport:
    """On the GPU that learner and engines share; see `device`."""

    def __init__(self, device: torch.device) -> None:
        self._memory = DeviceMemory(device)

    def new_digest(self) -> Digest:
        """See `Transport`, as for all that follow."""
        return DeviceDigest()

    def begin(self) -> DeviceMemory:
        """The one memory; engines that load late may find what is written in it."""
        return self._memory.begin()

    def close(self) -> None:
        """Memory goes with the process."""


def make_transport(
    kind: TransportKind,
    *,
    device: torch.device,
    address: str,
    next_round: Callable[[Poll], Round | None],
    limit_s: float,
) -> Transport:
    """A learner's transport.

    Args:
        kind: `sync.transport`.
        device: Of the learner's first worker.
        address: Of its machine, for others.
        next_round: Asks for the next round of a broadcast; see `Rounds.next`.
        limit_s: Time that engines get to join a group, and to receive.
    """
    if kind == "nccl":
        return Broadcaster(device=device, address=address, next_round=next_round, limit_s=limit_s)
    if kind == "ipc":
        return DeviceTransport(device)
    return FileTransport()
