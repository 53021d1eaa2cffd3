"""Tree list: what a list of trees says of each, read without their tokens and texts."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int32

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.groups import GroupState, Pruning
from treerpo_ray.algo.tree import Tree
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.sightings import MAX_QUESTION
from treerpo_ray.viewer.credit import group_states

COLUMNS = (
    *("ticket", "finished_at_s", "prompt_id", "question", "answers", "parent", "length", "verdict"),
    *("root_value", "root_se", "value", "value_se", "advantage"),
)
"""All that is read; a tree of the paper's takes 20 kB of them, of 3 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSummary:
    """One line of the list."""

    step: int
    ticket: int
    prompt_id: str
    question: str
    """Its beginning, if it is long."""
    answer: str
    """The first reference."""
    value: float
    """Of the root; NaN where a leaf has no verdict that counts."""
    se: float
    """Standard error of it."""
    num_steps: int
    depth: int
    num_tokens: int
    groups: dict[str, int]
    """Number of step groups by `GroupState`."""
    verdicts: dict[str, int]
    """Number of leaves by `Verdict`."""


def summaries(
    folder: RunFolder, file: str, step: int, pruning: Pruning | None
) -> dict[int, tuple[float, TreeSummary]]:
    """By ticket the summaries of the trees in a file, with the time at which each was finished;
    of several of a ticket the last.

    Raises:
        ValueError: the trees were written with another schema version.
    """
    table = saved_trees.read_columns(folder, file, COLUMNS)
    found: dict[int, tuple[float, TreeSummary]] = {}
    for batch in table.to_batches():
        for finished_at_s, summary in _from_batch(batch, step, pruning):
            if summary.ticket not in found or found[summary.ticket][0] <= finished_at_s:
                found[summary.ticket] = finished_at_s, summary
    return found


def _from_batch(
    batch: pa.RecordBatch, step: int, pruning: Pruning | None
) -> Iterator[tuple[float, TreeSummary]]:
    def lists(name: str) -> Iterator[pa.Array]:
        column = batch.column(name)
        return (column.values[a:b] for a, b in pairwise(column.offsets.to_pylist()))

    scalars = ("ticket", "finished_at_s", "prompt_id", "question", "root_value", "root_se")
    rows = zip(*(batch.column(name).to_pylist() for name in scalars), strict=True)
    arrays = map(lists, ("answers", "parent", "length", "verdict", "value", "value_se"))
    saved = _advantages(batch)
    for row, own, advantages in zip(rows, zip(*arrays, strict=True), saved, strict=True):
        ticket, finished_at_s, prompt_id, question, root_value, root_se = row
        answers, parents, lengths, verdicts, value, value_se = own
        tree = shape(parents.to_numpy(), lengths.to_numpy())
        values = Values(
            steps=value.to_numpy(),
            root=root_value,
            step_errors=value_se.to_numpy(),
            root_error=root_se,
        )
        yield (
            finished_at_s,
            TreeSummary(
                step=step,
                ticket=ticket,
                prompt_id=prompt_id,
                question=question[:MAX_QUESTION],
                answer=answers[0].as_py() if len(answers) else "",
                value=root_value,
                se=root_se,
                num_steps=len(tree),
                depth=max(tree.depths, default=0),
                num_tokens=int(tree.lengths.sum()),
                groups=group_counts(tree, values, advantages, pruning),
                verdicts=dict(Counter(verdicts.to_pylist())),
            ),
        )


def _advantages(batch: pa.RecordBatch) -> list[Float64[np.ndarray, " steps"] | None]:
    """As `Training.advantages` of each row; files of earlier versions have none."""
    if "advantage" not in batch.schema.names:
        return [None] * len(batch)
    return [
        own.values.to_numpy(zero_copy_only=False) if own.is_valid else None
        for own in batch.column("advantage")
    ]


def group_counts(
    tree: Tree,
    values: Values,
    advantages: Float64[np.ndarray, " steps"] | None,
    pruning: Pruning | None,
) -> dict[str, int]:
    """Number of step groups by `GroupState`; arguments as of `group_states`."""
    counts = Counter(state for _, state in group_states(tree, values, advantages, pruning))
    return {state.value: counts[state] for state in GroupState}


def shape(parents: Int32[np.ndarray, " steps"], lengths: Int32[np.ndarray, " steps"]) -> Tree:
    """A tree without its tokens."""
    return Tree(
        prompt_ids=np.empty(0, np.int32),
        parents=parents,
        lengths=lengths,
        stops=(),
        num_discarded=np.empty(0, np.int32),
        token_ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        versions=np.empty(0, np.int32),
    )
