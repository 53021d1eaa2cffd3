"""Device memory: a version of the weights as it lies on the learner's GPU, in flat chunks.

Processes that share the GPU map them by CUDA's handles; others get them by a group's broadcasts.
"""

import base64
import pickle
import uuid

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from treerpo_ray.weights.source import DevicePlace


class DeviceMemory:
    """Chunks on a device, written anew for each version.

    They are kept: a handle stays good, and so do the maps of those who read it. Who reads while the
    next version is written finds other digests.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: list[UInt8[Tensor, " bytes"]] = []
        """Of the version that is written or was last sealed."""
        self._kept: list[UInt8[Tensor, " bytes"]] = []
        self._handles: dict[int, str] = {}
        """By the number of the chunk."""

    def begin(self) -> "DeviceMemory":
        """Begin to write the next version."""
        self.parts = []
        return self

    def part(self, num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
        """The next chunk, to be written; what is in it is undefined."""
        number = len(self.parts)
        if number == len(self._kept) or len(self._kept[number]) < num_bytes:
            self._kept[number:] = [torch.empty(num_bytes, dtype=torch.uint8, device=self.device)]
            for gone in [each for each in self._handles if each >= number]:
                del self._handles[gone]
        self.parts.append(self._kept[number][:num_bytes])
        return self.parts[-1]

    def finish(self) -> None:
        """Wait until all that was asked for is written."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seal(self) -> DevicePlace:
        """All is written."""
        self.finish()
        for number in range(len(self.parts)):
            if number not in self._handles:
                self._handles[number] = shared(self._kept[number])
        return DevicePlace(
            stamp=uuid.uuid4().bytes,
            handles=tuple(self._handles[number] for number in range(len(self.parts))),
            sizes=tuple(len(part) for part in self.parts),
        )

    def release(self) -> None:
        """Nobody is waited for."""


def shared(memory: UInt8[Tensor, " bytes"]) -> str:
    """Handle of a device's memory for other processes, which `DeviceMaps` takes.

    torch counts who has a GPU's memory by handle, so that each is made and mapped once. Memory of a
    CPU moves to where processes share it.
    """
    if memory.device.type == "cpu":
        return _text(memory.untyped_storage()._share_filename_cpu_())
    _, arguments = reduce_tensor(memory)
    return _text(arguments)


def _text(handle: object) -> str:
    return base64.b64encode(pickle.dumps(handle)).decode()


class DeviceMaps:
    """Maps of another process's memory on this one's device, by their handles."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._maps: dict[str, Tensor] = {}
        self._were_read: set[str] = set()
        """Handles, since `forget_others`."""

    def read(self, handle: str, num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
        """What lies there now, without a copy."""
        if handle not in self._maps:
            self._maps[handle] = self._mapped(pickle.loads(base64.b64decode(handle)))
        self._were_read.add(handle)
        return self._maps[handle][:num_bytes]

    def forget_others(self) -> None:
        """Keep only what was read since the last call: the memory of a process that has ended stays
        taken for as long as it is mapped."""
        self._maps = {handle: self._maps[handle] for handle in self._were_read}
        self._were_read = set()

    def _mapped(self, handle: tuple) -> Tensor:
        if self._device.type == "cpu":
            storage = torch.UntypedStorage._new_shared_filename_cpu(*handle)
            return torch.empty(0, dtype=torch.uint8).set_(storage)
        arguments = list(handle)
        arguments[DEVICE_ARGUMENT] = self._device.index  # processes number GPUs for themselves
        return rebuild_cuda_tensor(*arguments)


DEVICE_ARGUMENT = 6
"""Position of the device's number in what `rebuild_cuda_tensor` takes."""
