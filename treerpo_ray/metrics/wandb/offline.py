"""Offline W&B: what is in the files that it keeps of a run, to send later.

A file is a log of LevelDB: after a header of seven bytes there are blocks of 32 KiB, in which a
record is one part or several, each behind its checksum, its length and which part it is. What a
process had not written when it was killed is not there, whatever W&B had been handed.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from treerpo_ray.run_folder.files import RunFolder

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]


HEADER, BLOCK, PART = 7, 32 * 1024, 7
"""Bytes."""
FULL, FIRST, LAST = 1, 2, 4
"""Kinds of parts that begin or end a record."""


def offline_records(data: bytes) -> Iterator["Record"]:
    """The records of a file in order; one that is not whole is the end."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    at, record = HEADER, b""
    while at + PART <= len(data):
        if BLOCK - at % BLOCK < PART:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + PART : at + PART + size]
        if len(part) < size or not FULL <= kind <= LAST:
            return
        record = part if kind in (FULL, FIRST) else record + part
        at += PART + size
        if kind in (FULL, LAST):
            try:
                yield Record.FromString(record)
            except DecodeError:
                return


def offline_rows(folder: RunFolder, run_id: str) -> list[dict[str, Any]]:
    """Rows of metrics in the offline files of a run, `_step` the number that each was logged by."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found}
        for path in folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb")
        for record in offline_records(folder.read_bytes(path))
        if (found := record.history.item)
    ]
