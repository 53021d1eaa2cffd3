"""Records: scored trees as Arrow rows, one row a tree, flat lists inside.

The same schema travels through Ray Data to the learner and lies in the run folder, so a saved
tree is exactly what was trained on. A row is written when its tree is scored and holds what the
tree alone tells: values, differences and their standard errors. An advantage is a difference in
the scale of the learner's form and pruning, and so is its error: `analysis.Run.tree_table` derives
both from the run's configuration, `batch_stats.assess` for the metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import step_groups
from treerpo_ray.algo.tree import Step, StopReason, Tree
from treerpo_ray.verifier.verdict import Verdict

SCHEMA_VERSION = 4


SCHEMA = pa.schema(
    [
        ("ticket", pa.int64()),
        ("attempt", pa.int32()),
        ("num_redraws", pa.int32()),
        ("redrawn_tokens", pa.int64()),
        ("prompt_id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("seed", pa.int64()),
        ("engine", pa.int32()),
        ("grow_s", pa.float64()),
        ("finished_at_s", pa.float64()),
        ("scored_at_s", pa.float64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("parent", pa.list_(pa.int32())),
        ("stop", pa.list_(pa.string())),
        ("length", pa.list_(pa.int32())),
        ("num_discarded", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("leaf", pa.list_(pa.int32())),
        ("leaf_text", pa.list_(pa.string())),
        ("verdict", pa.list_(pa.string())),
        # What follows from the columns above, for readers of the files; null until it is scored.
        ("root_value", pa.float64()),
        ("root_se", pa.float64()),
        ("value", pa.list_(pa.float64())),
        ("value_se", pa.list_(pa.float64())),
        ("difference_se", pa.list_(pa.float64())),
    ],
    metadata={"treerpo_schema": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRecord:
    """A tree with what is known of it; `verdicts` is empty until it is scored."""

    ticket: int
    attempt: int
    """Times the tree had to move to another engine."""
    prompt_id: str
    question: str
    answers: tuple[str, ...]
    seed: int
    engine: int
    grow_s: float
    """Seconds from the ticket to the last step."""
    finished_at_s: float
    """Unix time of the last step; 0 while the tree is partly grown."""
    tree: Tree
    leaf_texts: tuple[str, ...]
    """Decoded answer of each leaf, in the order of `tree.leaves`; for verifier and viewer only."""
    verdicts: tuple[Verdict, ...]
    """Verdict of each leaf, in the order of `tree.leaves`."""
    scored_at_s: float = 0.0
    """Unix time of the verdicts; 0 until there are any."""
    num_redraws: int = 0
    """Trees of the same ticket that were put aside before, for they had no kept group."""
    redrawn_tokens: int = 0
    """Sampled tokens of those."""

    @property
    def rewards(self) -> np.ndarray:
        """Reward of each leaf at its step's place, NaN elsewhere and where there is none."""
        rewards = np.full(len(self.tree.steps), np.nan)
        for leaf, verdict in zip(self.tree.leaves, self.verdicts, strict=True):
            if verdict.is_reward:
                rewards[leaf] = verdict.reward
        return rewards


def to_table(records: Sequence[TreeRecord]) -> pa.Table:
    """Arrow table with one row a tree."""
    return pa.Table.from_pylist([_to_row(record) for record in records], schema=SCHEMA)


def is_readable(table: pa.Table) -> bool:
    """Whether the table was written with this schema's version."""
    return _schema_version(table) == str(SCHEMA_VERSION)


def from_table(table: pa.Table) -> list[TreeRecord]:
    """Trees of a table.

    Raises:
        ValueError: the table was written with another schema version.
    """
    if not is_readable(table):
        found = _schema_version(table)
        raise ValueError(f"trees were written with schema {found}, this reads {SCHEMA_VERSION}")
    return [_from_row(row) for row in table.to_pylist()]


def _schema_version(table: pa.Table) -> str:
    return (table.schema.metadata or {}).get(b"treerpo_schema", b"?").decode()


def _to_row(record: TreeRecord) -> dict[str, object]:
    steps = record.tree.steps

    def joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(arrays) if arrays else np.empty(0, dtype)

    return {
        "ticket": record.ticket,
        "attempt": record.attempt,
        "num_redraws": record.num_redraws,
        "redrawn_tokens": record.redrawn_tokens,
        "prompt_id": record.prompt_id,
        "question": record.question,
        "answers": list(record.answers),
        "seed": record.seed,
        "engine": record.engine,
        "grow_s": record.grow_s,
        "finished_at_s": record.finished_at_s,
        "scored_at_s": record.scored_at_s,
        "prompt_ids": record.tree.prompt_ids,
        "parent": [step.parent for step in steps],
        "stop": [step.stop.value for step in steps],
        "length": [len(step.token_ids) for step in steps],
        "num_discarded": [step.num_discarded for step in steps],
        "token_ids": joined([step.token_ids for step in steps], np.int32),
        "logprobs": joined([step.logprobs for step in steps], np.float32),
        "versions": joined([step.versions for step in steps], np.int32),
        "leaf": list(record.tree.leaves),
        "leaf_text": list(record.leaf_texts),
        "verdict": [verdict.value for verdict in record.verdicts],
        **_estimates(record),
    }


def _estimates(record: TreeRecord) -> dict[str, float | np.ndarray]:
    """Value of the prompt and of each step with their standard errors, and the standard error of
    each step's difference to its parent's value; nothing before the tree is scored."""
    if len(record.verdicts) != len(record.tree.leaves):
        return {}
    values = mean_backup(record.tree, record.rewards)
    differences = np.full(len(record.tree.steps), np.nan)
    for group in step_groups(record.tree, values):
        differences[list(group.children)] = group.difference_errors
    return {
        "root_value": values.root,
        "root_se": values.root_error,
        "value": values.steps,
        "value_se": values.step_errors,
        "difference_se": differences,
    }


class _Row(TypedDict):
    """A row of SCHEMA as Arrow gives it back."""

    ticket: int
    attempt: int
    num_redraws: int
    redrawn_tokens: int
    prompt_id: str
    question: str
    answers: list[str]
    seed: int
    engine: int
    grow_s: float
    finished_at_s: float
    scored_at_s: float
    prompt_ids: list[int]
    parent: list[int]
    stop: list[str]
    length: list[int]
    num_discarded: list[int]
    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    leaf_text: list[str]
    verdict: list[str]


def _from_row(row: _Row) -> TreeRecord:
    ends = np.cumsum(row["length"], dtype=np.int64)

    def by_step(flat: list[int] | list[float], dtype: type) -> list[np.ndarray]:
        return np.split(np.asarray(flat, dtype), ends)[:-1]  # behind the last end is nothing

    steps = tuple(
        Step(
            parent=parent,
            token_ids=ids,
            logprobs=logprobs,
            versions=versions,
            stop=StopReason(stop),
            num_discarded=num_discarded,
        )
        for parent, stop, num_discarded, ids, logprobs, versions in zip(
            row["parent"],
            row["stop"],
            row["num_discarded"],
            by_step(row["token_ids"], np.int32),
            by_step(row["logprobs"], np.float32),
            by_step(row["versions"], np.int32),
            strict=True,
        )
    )
    return TreeRecord(
        ticket=row["ticket"],
        attempt=row["attempt"],
        num_redraws=row["num_redraws"],
        redrawn_tokens=row["redrawn_tokens"],
        prompt_id=row["prompt_id"],
        question=row["question"],
        answers=tuple(row["answers"]),
        seed=row["seed"],
        engine=row["engine"],
        grow_s=row["grow_s"],
        finished_at_s=row["finished_at_s"],
        scored_at_s=row["scored_at_s"],
        tree=Tree(prompt_ids=np.asarray(row["prompt_ids"], np.int32), steps=steps),
        leaf_texts=tuple(row["leaf_text"]),
        verdicts=tuple(Verdict(v) for v in row["verdict"]),
    )


class RootValue(NamedTuple):
    """Value of a tree's root, and what tells the tree's prompt."""

    ticket: int
    num_redraws: int
    value: float
