"""Storage: what a run writes, part by part, and whether its folder can be written and has room."""

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from treerpo_ray.config import Config
from treerpo_ray.errors import one_line
from treerpo_ray.preflight.model_sizes import DTYPE_BYTES
from treerpo_ray.run_folder.checkpoints import BYTES_A_PARAMETER
from treerpo_ray.run_folder.checkpoints import FOLDER as CHECKPOINTS
from treerpo_ray.run_folder.disk import disk_of, free_bytes, size
from treerpo_ray.run_folder.files import CONFIG_FILE, MODEL_FOLDER, RunFolder

BUCKETS = ("s3", "s3a", "gs", "gcs")
"""Stores that have what is written in buckets, which must be there before."""
STORE_S = 30.0
"""Time for a store to answer."""
MODEL_BYTES = 4
"""Of each parameter in an exported model."""
TREE_BYTES = 16
"""Of each sampled token in a saved tree, about: its id, its log-probabilities under engine and
learner, and its text, packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePlan:
    """Bytes of each part, and the disk that it goes to.

    Args:
        checkpoint: One of them; None where it is not known, as no model is at hand.
        num_checkpoints: Those that are kept, and the one that is being written.
        model: The exported model.
        trees: Of one learner step, at most; 0 if none are saved.
        num_steps: Learner steps whose trees are saved.
        written: Bytes of checkpoints and model that are there from an earlier start.
        place: The run folder or, for a store, where a checkpoint lies until it is uploaded.
        is_local: Whether the run folder is on a disk.
    """

    checkpoint: int | None
    num_checkpoints: int
    model: int
    trees: int
    num_steps: int
    written: int
    place: Path
    is_local: bool

    @classmethod
    def of(cls, config: Config, num_parameters: float, num_adapted: float | None) -> Self:
        """The plan of a run of a model with so many parameters and, where `lora.rank` is above 0,
        so many numbers in the adapters that are trained; None: that is not known."""
        has_adapters = config.lora.rank > 0
        trained = num_adapted if has_adapters else num_parameters
        model_bytes = DTYPE_BYTES[config.model.dtype] if has_adapters else MODEL_BYTES
        folder, every = RunFolder(config.folder), config.metrics.save_trees_every
        place = Path(folder.root if folder.is_local else tempfile.gettempdir())
        there = [place / CHECKPOINTS, place / MODEL_FOLDER] if folder.is_local else []
        return cls(
            checkpoint=None if trained is None else int(BYTES_A_PARAMETER * trained),
            num_checkpoints=config.checkpoint.keep + 1,
            model=int(model_bytes * num_parameters),
            trees=TREE_BYTES * config.gate.trees_per_step * config.largest_shape.max_sampled_tokens
            if every
            else 0,
            num_steps=config.run.num_steps // every if every else 0,
            written=sum(
                file.stat().st_size for part in there for file in part.rglob("*") if file.is_file()
            ),
            place=place,
            is_local=folder.is_local,
        )

    @property
    def total(self) -> int:
        """Bytes that the run will have written at most, but for lines and logs."""
        return (
            self.num_checkpoints * (self.checkpoint or 0) + self.model + self.trees * self.num_steps
        )

    def line(self) -> str:
        """The plan in one line.

        Raises:
            OSError: the disk does not say how much room it has.
        """
        free, disk = free_bytes(self.place), disk_of(self.place)
        checkpoint = "adapters alone" if self.checkpoint is None else size(self.checkpoint)
        parts = (
            f"{self.num_checkpoints} checkpoints of {checkpoint}, model "
            f"{size(self.model)}, trees up to {size(self.trees)} a step"
        )
        short = self.total - self.written - free if self.is_local else 0
        lacking = f", {size(short)} too little: it would wait for room" if short > 0 else ""
        if self.checkpoint is not None and free < self.checkpoint:
            lacking = ", too little for one checkpoint"
        use = "" if self.is_local else " for one checkpoint at a time"
        return f"{parts}: {size(self.total)}; {size(free)} free on {disk}{use}{lacking}"

    def misfit(self) -> str | None:
        """Why the disk has no room for one checkpoint, in one line; None if it has.

        Raises:
            OSError: it does not say.
        """
        free = free_bytes(self.place)
        if self.checkpoint is None or free >= self.checkpoint:
            return None
        use = "" if self.is_local else ", where a checkpoint lies until it is uploaded,"
        return (
            f"run.root: the disk {disk_of(self.place)} of {self.place}{use} has {size(free)} free, "
            f"and one checkpoint takes {size(self.checkpoint)}: make room or choose another "
            "run.root"
        )


def check_folder(config: Config, answer_s: float = STORE_S) -> None:
    """Refuse a run folder that cannot be written, as far as that can be told without writing.

    Whatever else reads or writes it comes after this: a store that does not answer would have it
    wait for minutes. It is given `answer_s` seconds to answer.

    Raises:
        ValueError: it cannot.
    """
    try:
        folder = RunFolder(config.folder)
    except (ImportError, ValueError) as error:  # of the store that the URI names
        raise ValueError(f"run.root={config.run.root}: {one_line(error)}") from error
    if not folder.is_local:
        _check_store(config, folder, answer_s)
        return
    place = Path(folder.root)
    root = Path(RunFolder(config.run.root).root)
    for above in place.parents[: len(place.relative_to(root).parts) - 1]:
        if (above / CONFIG_FILE).exists():
            raise ValueError(f"run.name={config.run.name} is in the folder of another run: {above}")
    nearest = next(each for each in (place, *place.parents) if each.exists())
    if not nearest.is_dir():
        raise ValueError(f"run.root={config.run.root}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"run.root={config.run.root}: {nearest} cannot be written")


def _check_store(config: Config, folder: RunFolder, answer_s: float) -> None:
    """Refuse a store that does not answer, or a bucket that is not there or not ours.

    Raises:
        ValueError: it is such.
    """
    place = urlsplit(config.run.root)
    store, bucket = place.scheme, place.netloc
    faults: list[str] = []

    def look() -> None:
        try:
            if store in BUCKETS and not folder.fs.exists(bucket):
                faults.append(f"there is no bucket {bucket}; make it, or name another")
            folder.exists()
        except Exception as error:  # every store has its own
            faults.append(f"the store refuses: {type(error).__name__}: {one_line(error)}")

    thread = threading.Thread(target=look, name="store", daemon=True)  # some try again for minutes
    thread.start()
    thread.join(answer_s)
    if thread.is_alive():
        faults.append(f"the store has not answered for {answer_s:g} s")
    if faults:
        raise ValueError(f"run.root={config.run.root}: {faults[0]}")
