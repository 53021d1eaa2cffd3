"""Moments: AdamW's state in a checkpoint, written by all workers and read by any number of them.

The files are safetensors, written and read by torch.distributed.checkpoint; a learner that is not
sharded writes the same as one part.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2 * 2**30
"""Of a file, about; so much is held in main memory at a time."""
PIECE_BYTES = 2**26
"""Of a file, that is sent at a time."""


def write_moments(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_sharded: bool
) -> None:
    """Write the moments; those of a sharded model all workers write together.

    Each worker writes its part where the first one does. One that does not have this folder, on
    another machine, sends its part to the first.

    Raises:
        OSError: a disk refuses, on any worker.
    """
    state = {
        f"{name}.{moment}": optimizer.state[weight][moment]
        for name, weight in model.named_parameters()
        for moment in MOMENTS
        if weight in optimizer.state
    }
    if not state:
        return  # before the first step
    with ExitStack() as stack:
        apart = None
        if not folder.parent.is_dir():
            place = tempfile.TemporaryDirectory(prefix="treerpo-moments-")
            apart = Path(stack.enter_context(place))
        writer = dcp.HuggingFaceStorageWriter(
            str(apart or folder),
            fqn_to_index_mapping=_files(state, dist.get_world_size() if is_sharded else 1),
            save_distributed=True,
        )
        with _plain_errors():
            dcp.save(state, storage_writer=writer, no_dist=not is_sharded)
        if is_sharded:
            _collect(folder, apart)


def read_moments(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
) -> None:
    """Take the moments over, as `write_moments` left them after so many optimizer steps.

    Raises:
        ValueError: there are none.
    """
    if not num_steps:
        return
    if not folder.is_dir():
        raise ValueError(
            f"{folder.parent} has no {folder.name}: it is of another version of treerpo_ray; "
            "choose another run.name to start anew"
        )
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    state = {
        f"{name}.{moment}": torch.zeros_like(weight, requires_grad=False)
        for name, weight in named.items()
        for moment in MOMENTS
    }
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with _plain_errors():
        dcp.load(state, storage_reader=reader, no_dist=True)  # each reads what it needs
    for name, weight in named.items():
        own = {moment: state[f"{name}.{moment}"] for moment in MOMENTS}
        step = torch.tensor(float(num_steps), device=weight.device)
        optimizer.state[weight] = {"step": step, **own}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a worker failed of, in place of a list of all workers with their stacks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _files(state: dict[str, Tensor], num_workers: int) -> dict[str, int]:
    """The number of the file that each tensor is in; each worker has files of these numbers."""
    files: dict[str, int] = {}
    number, size = 1, 0
    for name, tensor in state.items():
        if size > FILE_BYTES * num_workers:
            number, size = number + 1, 0
        files[name] = number
        size += tensor.nbytes
    return files


def _collect(folder: Path, apart: Path | None) -> None:
    """Have the first worker write what others could not write into its folder.

    Raises:
        OSError: its disk refuses.
    """
    own = [] if apart is None else sorted(apart.iterdir())
    sizes: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(sizes, {path.name: path.stat().st_size for path in own})
    if dist.get_rank():
        for path in own:
            with path.open("rb") as file:
                while content := file.read(PIECE_BYTES):
                    dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0)
        return
    refused: OSError | None = None
    for rank, names in enumerate(sizes):
        for name, size in names.items():
            with suppress(OSError):
                (folder / name).unlink()
            for start in range(0, size, PIECE_BYTES):
                piece = torch.empty(min(PIECE_BYTES, size - start), dtype=torch.uint8)
                dist.recv(piece, rank)
                try:
                    with (folder / name).open("ab") as file:
                        file.write(piece.numpy().data)
                except OSError as error:  # what is sent is taken in any case
                    refused = error
    if refused is not None:
        raise refused
