"""Manifest: what a version of the weights consists of, how it is packed, and how it is proved.

A manifest carries a digest of each chunk of bytes; an engine proves a version by echoing it with
the digests of the bytes that its workers received.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import xxhash

if TYPE_CHECKING:  # manifests go through actors that have no use for it
    import torch

ALIGNMENT = 64
"""Offsets are multiples of this, so that every dtype can be viewed in place."""
BLOCK = 2**19
"""Elements that are cast and digested at a time: they stay in the cache in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """One tensor in a chunk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a version of the weights consists of."""

    version: int
    tensors: tuple[TensorPlace, ...]
    digests: tuple[str, ...]
    """Of each chunk, of the kind of its transport: a fault is found, not a forger."""

    def update_info(self, chunk: int) -> dict[str, list]:
        """The fields of `vllm_worker.StoreUpdate` for one chunk, but for where it comes from."""
        tensors = [tensor for tensor in self.tensors if tensor.chunk == chunk]
        return {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "offsets": [tensor.offset for tensor in tensors],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProof:
    """An engine's word that it serves a version."""

    version: int
    digests: tuple[tuple[str, ...], ...]
    """Digests of the received chunks, from each worker of the engine."""

    def check(self, manifest: Manifest) -> None:
        """Raise a RuntimeError unless this proves `manifest`."""
        if self.version != manifest.version:
            raise RuntimeError(f"engine serves version {self.version}, not {manifest.version}")
        if not self.digests:
            raise RuntimeError(f"no worker of the engine received version {manifest.version}")
        for worker, digests in enumerate(self.digests):
            if digests != manifest.digests:
                raise RuntimeError(
                    f"worker {worker} received other bytes for version {manifest.version}"
                )


class Digest(Protocol):
    """Digest of bytes, which come piece by piece."""

    def update(self, piece: "torch.Tensor") -> None:
        """Take the next piece (uint8); all pieces are multiples of `ALIGNMENT` bytes."""

    def hexdigest(self) -> str:
        """Of all that came."""


class HostDigest:
    """xxh3 (128 bits) of bytes in main memory."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, piece: "torch.Tensor") -> None:
        """See `Digest`."""
        self._hash.update(piece.numpy().data)

    def hexdigest(self) -> str:
        """See `Digest`."""
        return self._hash.hexdigest()


class DeviceDigest:
    """Digest that a GPU computes of its own memory: the sum, modulo 2⁶⁴, of mix(wᵢ ⊕ mix(i + 1))
    over the words wᵢ of 8 bytes (i = 0, 1, …), and of mix(number of words).

    `mix` is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64 bits: a
    word that changes, or stands elsewhere, changes the sum but for a chance of 2⁻⁶⁴.
    """

    def __init__(self) -> None:
        self._num_words = 0
        self._sums: list[torch.Tensor] = []

    def update(self, piece: "torch.Tensor") -> None:
        """See `Digest`."""
        import torch

        for words in piece.view(torch.int64).split(BLOCK):
            start = self._num_words + 1
            index = torch.arange(start, start + len(words), device=words.device)
            self._sums.append(_mixed(words ^ _mixed(index)).sum())
            self._num_words += len(words)

    def hexdigest(self) -> str:
        """See `Digest`; waits for the device."""
        import torch

        total = sum(int(part) for part in self._sums) + int(_mixed(torch.tensor(self._num_words)))
        return f"{total % 2**64:016x}"


MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
"""Shifts and factors of SplitMix64, as signed numbers of 64 bits."""
LAST_SHIFT = 31


def _mixed(words: "torch.Tensor") -> "torch.Tensor":
    for shift, factor in MIX:
        words = (words ^ _shifted(words, shift)) * factor
    return words ^ _shifted(words, LAST_SHIFT)


def _shifted(words: "torch.Tensor", shift: int) -> "torch.Tensor":
    """Words to the right, with zeros from the left."""
    return (words >> shift) & (2 ** (64 - shift) - 1)


Chunk: TypeAlias = "np.ndarray | torch.Tensor"
"""Memory of a chunk: bytes, on any device."""


def _own_memory(num_bytes: int) -> Chunk:
    return np.empty(num_bytes, np.uint8)


def pack_weights(
    weights: Iterable[tuple[str, "torch.Tensor"]],
    *,
    version: int,
    dtype: "torch.dtype",
    chunk_bytes: int,
    allocate: Callable[[int], Chunk] = _own_memory,
    new_digest: Callable[[], Digest] = HostDigest,
) -> tuple[Manifest, list[Chunk]]:
    """Lay tensors out in chunks of about `chunk_bytes`; floating ones are sent as `dtype`.

    A tensor lies in one chunk whole; one that is larger than `chunk_bytes` gets its own.

    Args:
        weights: Names and tensors on any device; those of a chunk are held at a time.
        version: Number of the version.
        dtype: What floating tensors are sent as.
        chunk_bytes: Size of a chunk.
        allocate: Gives the memory of a chunk by its size in bytes, in their order.
        new_digest: Begins the digest of a chunk, where its memory is.
    """
    places: list[TensorPlace] = []
    chunks: list[Chunk] = []
    digests: list[str] = []
    parts: list[tuple[int, torch.Tensor, torch.dtype]] = []
    size = 0

    def close_chunk() -> None:
        nonlocal size
        if parts:
            chunks.append(allocate(size))
            digests.append(_fill(chunks[-1], parts, new_digest()))
        parts.clear()
        size = 0

    for name, weight in weights:
        sent_as = dtype if weight.is_floating_point() else weight.dtype
        num_bytes = weight.numel() * sent_as.itemsize
        if size and size + num_bytes > chunk_bytes:
            close_chunk()
        kind = str(sent_as).removeprefix("torch.")
        places.append(
            TensorPlace(
                name=name, dtype=kind, shape=tuple(weight.shape), chunk=len(chunks), offset=size
            )
        )
        parts.append((size, weight, sent_as))
        size += num_bytes + -num_bytes % ALIGNMENT
    close_chunk()
    return Manifest(version=version, tensors=tuple(places), digests=tuple(digests)), chunks


def _fill(
    chunk: Chunk, parts: "list[tuple[int, torch.Tensor, torch.dtype]]", digest: Digest
) -> str:
    """Write tensors to their offsets as their types, with zeros between; returns the digest."""
    import torch

    flat = torch.as_tensor(chunk)
    for offset, weight, sent_as in parts:
        end = offset + weight.numel() * sent_as.itemsize
        aligned = end + -end % ALIGNMENT
        flat[end:aligned].zero_()
        target, source = flat[offset:end].view(sent_as), weight.detach().reshape(-1)
        start = offset
        for to, given in zip(target.split(BLOCK), source.split(BLOCK), strict=True):
            # Cast where it is, so that no more is moved than is sent.
            to.copy_(given if given.device == to.device else given.to(sent_as))
            stop = start + to.nbytes
            digest.update(flat[start : aligned if stop == end else stop])
            start = stop
    return digest.hexdigest()
