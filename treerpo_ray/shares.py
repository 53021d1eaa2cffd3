"""Shares: the trees that one worker consumes in one learner step, as one row of the tree stream."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from treerpo_ray.batch_stats import assess
from treerpo_ray.config import Config
from treerpo_ray.records import SCHEMA, TreeRecord, to_table

TREES = "trees"
"""Column of a share."""


class Shares:
    """Puts trees together to shares, in the order of the learner steps.

    Batches leave the pool one after the other, but a redrawn tree may come after trees of the
    next batch: those are held until its own is complete.

    Args:
        config: The run's configuration.
        size: Trees of a share.
        first: A ticket of the learner step that is due first.
    """

    def __init__(self, config: Config, *, size: int, first: int) -> None:
        self.trees_per_step, self.size = config.gate.trees_per_step, size
        self.due = first // self.trees_per_step
        self.num_given = 0
        """Trees of the step that is due that have been given out."""
        self.held: dict[int, list[TreeRecord]] = {}

    def add(self, tree: TreeRecord) -> None:
        """Hold a tree for its learner step."""
        self.held.setdefault(tree.ticket // self.trees_per_step, []).append(tree)

    def complete(self) -> Iterator[list[TreeRecord]]:
        """Give out the shares that are due and complete."""
        while len(trees := self.held.get(self.due, [])) >= self.size:
            yield trees[: self.size]
            del trees[: self.size]
            self.num_given += self.size
            if self.num_given == self.trees_per_step:
                del self.held[self.due]
                self.due, self.num_given = self.due + 1, 0


def has_signal(tree: TreeRecord, config: Config) -> bool:
    """Whether the learner would train on any step of a scored tree."""
    learner = config.learner
    (advantages,), _ = assess([tree], form=learner.advantage, pruning=learner.pruning)
    return not np.isnan(advantages).all()


def to_share(trees: Sequence[TreeRecord]) -> pa.Table:
    """Table of one row that holds all `trees`."""
    rows = to_table(trees).to_struct_array().combine_chunks()
    return pa.table({TREES: pa.ListArray.from_arrays([0, len(rows)], rows)})


def from_share(share: pa.Table) -> pa.Table:
    """Table with one row a tree, as `to_table` makes it."""
    rows = share.column(TREES).combine_chunks().flatten()
    return pa.Table.from_struct_array(rows).replace_schema_metadata(SCHEMA.metadata)
