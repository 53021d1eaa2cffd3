"""Saved trees: in a run's folder those that it was trained on, in a checkpoint those to come.

A resumed run goes on from the trees of its checkpoint, a learner that was lost also from those that
the tree pool holds, whole or partly grown, where they are what it would have sampled itself:
trees of the same tickets, of versions that the learner knows, and no staler than it allows.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from treerpo_ray.config.sections import GateConfig, TreeConfig
from treerpo_ray.records import (
    TreeRecord,
    check_readable,
    from_table,
    is_readable,
    to_table,
)
from treerpo_ray.run_folder.files import RunFolder

FILE = "trees.parquet"
CONFIG_KEY = b"treerpo_tree"
"""Of the table's metadata: the section `tree` that the trees were grown with."""


def write(folder: Path, trees: Sequence[TreeRecord], settings: TreeConfig) -> None:
    """Write `trees`, grown with `settings`, into the folder of a checkpoint."""
    table = to_table(trees)
    metadata = (table.schema.metadata or {}) | {CONFIG_KEY: _tree_section(settings)}
    pq.write_table(table.replace_schema_metadata(metadata), folder / FILE)


def read(folder: Path | None, settings: TreeConfig) -> list[TreeRecord]:
    """Trees of a checkpoint, if there is one that has any, grown with these settings and of this
    schema."""
    if folder is None or not (folder / FILE).exists():
        return []
    table = pq.read_table(folder / FILE)
    if (table.schema.metadata or {}).get(CONFIG_KEY) != _tree_section(settings):
        return []
    return from_table(table) if is_readable(table.schema) else []


def _tree_section(settings: TreeConfig) -> bytes:
    return json.dumps(asdict(settings), sort_keys=True).encode()


def usable(
    trees: Sequence[TreeRecord], *, step: int, version: int, gate: GateConfig
) -> list[TreeRecord]:
    """Those of `trees` that a learner of `version` may use from learner step `step` on; of several
    of a ticket the last one.

    Learner step k is made at version + (k - step) at most, so this bounds the staleness of each
    tree by `gate.max_staleness`. Under an unchanged configuration admission has done that before.
    """
    size, limit = gate.trees_per_step, gate.max_staleness
    found = {
        tree.ticket: tree
        for tree in trees
        if tree.ticket >= step * size
        and tree.tree.max_version <= version  # a newer one is of a timeline that was rolled back
        and version + tree.ticket // size - step - tree.tree.min_version <= limit
    }
    return list(found.values())


def name(step: int, rank: int) -> str:
    """File in a run folder for the trees of a share; `step` counts the steps, theirs included."""
    return f"trees/step={step:06d}/rank-{rank}.parquet"


def are_kept(folder: RunFolder, step: int, num_workers: int) -> bool:
    """Whether the trees of all workers in a learner step are there."""
    return all(folder.exists(name(step, rank)) for rank in range(num_workers))


def saved_steps(folder: RunFolder) -> list[int]:
    """Learner steps whose trees are saved, ascending; `step` counts as in `name`."""
    return sorted(int(path.rpartition("=")[2]) for path in folder.glob("trees/step=*"))


def saved(folder: RunFolder, step: int) -> list[TreeRecord]:
    """The trees that are saved of a learner step, doubled ones too."""
    files = saved_files(folder, step)
    return [tree for file in files for tree in from_table(folder.read_table(file))]


def saved_files(folder: RunFolder, step: int) -> list[str]:
    """Files with the trees that are saved of a learner step."""
    return folder.glob(f"trees/step={step:06d}/*.parquet")


def read_columns(folder: RunFolder, file: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a file of trees, as far as it has them; the others are not read.

    Raises:
        ValueError: the trees were written with another schema version.
    """
    with folder.parquet(file) as trees:
        check_readable(trees.schema_arrow)
        return trees.read(list(columns))


def saved_tree(folder: RunFolder, step: int, ticket: int) -> TreeRecord | None:
    """The tree of a ticket that is saved of a learner step, of several the last one; of the others
    no more is read than lies in the same row group.

    Raises:
        ValueError: the trees were written with another schema version.
    """
    found: list[TreeRecord] = []
    for file in saved_files(folder, step):
        with folder.parquet(file) as trees:
            check_readable(trees.schema_arrow)
            for group in range(trees.num_row_groups):
                tickets = trees.read_row_group(group, ["ticket"])["ticket"].to_pylist()
                places = [place for place, own in enumerate(tickets) if own == ticket]
                if places:
                    found += from_table(trees.read_row_group(group).take(places))
    return max(found, key=lambda tree: tree.finished_at_s, default=None)


def take_back(folder: RunFolder, step: int) -> None:
    """Remove the trees of the steps after `step`: they were rolled back, and other trees come."""
    for later in saved_steps(folder):
        if later > step:
            folder.remove(f"trees/step={later:06d}")
