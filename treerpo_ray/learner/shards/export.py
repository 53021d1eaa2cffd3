"""Export: weights as the files that transformers and vLLM read, written as they come."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

FILE_BYTES = 4 * 2**30
"""Of a file, unless one weight is larger; so much is held in main memory at a time."""


def write_weights(
    folder: Path, weights: Iterator[tuple[str, Tensor]], file_bytes: int = FILE_BYTES
) -> None:
    """Write weights as one file or several, with the list of what lies in which.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    names: list[list[str]] = []
    total = 0
    for held in _files(weights, file_bytes):
        save_file(held, folder / f"part-{len(names)}", metadata={"format": "pt"})
        names.append(list(held))
        total += sum(weight.nbytes for weight in held.values())
    stem, _, suffix = SAFE_WEIGHTS_NAME.rpartition(".")
    places: dict[str, str] = {}
    for number, own in enumerate(names):
        file = f"{stem}-{number + 1:05}-of-{len(names):05}.{suffix}"
        file = file if len(names) > 1 else SAFE_WEIGHTS_NAME
        (folder / f"part-{number}").rename(folder / file)
        places |= dict.fromkeys(own, file)
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))


def _files(weights: Iterator[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """What goes into each file, in main memory."""
    held: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if held and size + weight.nbytes > file_bytes:
            yield held
            held, size = {}, 0
        held[name] = weight.to("cpu").contiguous()
        size += weight.nbytes
    yield held
