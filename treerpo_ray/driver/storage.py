"""Storage: what a run writes, part by part, and whether the disk of its folder has room for it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from treerpo_ray.config import Config
from treerpo_ray.learner.learner import CHECKPOINT_BYTES
from treerpo_ray.run_folder.checkpoints import FOLDER as CHECKPOINTS
from treerpo_ray.run_folder.disk import disk_of, free_bytes, size
from treerpo_ray.run_folder.files import MODEL_FOLDER, RunFolder

MODEL_BYTES = 4
"""Of each parameter in an exported model."""
TREE_BYTES = 16
"""Of each sampled token in a saved tree, about: its id, its log-probabilities under engine and
learner, and its text, packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePlan:
    """Bytes of each part, and the disk that it goes to.

    Args:
        checkpoint: One of them.
        num_checkpoints: Those that are kept, and the one that is being written.
        model: The exported model.
        trees: Of one learner step, at most; 0 if none are saved.
        num_steps: Learner steps whose trees are saved.
        written: Bytes of checkpoints and model that are there from an earlier start.
        place: The run folder or, for a store, where a checkpoint lies until it is uploaded.
        is_local: Whether the run folder is on a disk.
    """

    checkpoint: int
    num_checkpoints: int
    model: int
    trees: int
    num_steps: int
    written: int
    place: Path
    is_local: bool

    @classmethod
    def of(cls, config: Config, num_parameters: float) -> Self:
        """The plan of a run of a model with so many parameters."""
        folder, every = RunFolder(config.folder), config.metrics.save_trees_every
        place = Path(folder.root if folder.is_local else tempfile.gettempdir())
        there = [place / CHECKPOINTS, place / MODEL_FOLDER] if folder.is_local else []
        return cls(
            checkpoint=int(CHECKPOINT_BYTES * num_parameters),
            num_checkpoints=config.checkpoint.keep + 1,
            model=int(MODEL_BYTES * num_parameters),
            trees=TREE_BYTES * config.gate.trees_per_step * config.shape.max_sampled_tokens
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
        return self.num_checkpoints * self.checkpoint + self.model + self.trees * self.num_steps

    def line(self) -> str:
        """The plan in one line.

        Raises:
            OSError: the disk does not say how much room it has.
        """
        free, disk = free_bytes(self.place), disk_of(self.place)
        parts = (
            f"{self.num_checkpoints} checkpoints of {size(self.checkpoint)}, model "
            f"{size(self.model)}, trees up to {size(self.trees)} a step"
        )
        short = self.total - self.written - free if self.is_local else 0
        lacking = f", {size(short)} too little: it would wait for room" if short > 0 else ""
        if free < self.checkpoint:
            lacking = ", too little for one checkpoint"
        use = "" if self.is_local else " for one checkpoint at a time"
        return f"{parts}: {size(self.total)}; {size(free)} free on {disk}{use}{lacking}"

    def misfit(self) -> str | None:
        """Why the disk has no room for one checkpoint, in one line; None if it has.

        Raises:
            OSError: it does not say.
        """
        free = free_bytes(self.place)
        if free >= self.checkpoint:
            return None
        use = "" if self.is_local else ", where a checkpoint lies until it is uploaded,"
        return (
            f"run.root: the disk {disk_of(self.place)} of {self.place}{use} has {size(free)} free, "
            f"and one checkpoint takes {size(self.checkpoint)}: make room or choose another "
            "run.root"
        )
