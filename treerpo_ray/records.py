"""Records: scored trees as Arrow rows, one row a tree, flat lists inside.

The same schema travels through Ray Data to the learner and lies in the run folder, so a saved
tree is exactly what was trained on. A row is made when its tree is scored and holds what the
tree alone tells: values, differences and their standard errors. An advantage is a difference in
the scale of the learner's form and pruning, and so is its error: `analysis.Run.tree_table` derives
both from the run's configuration, `learner.stats.count` for the metrics. When the row is saved, it
gets what the learner made of it: the advantages, and what the tokens had before the update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64

from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.algo.groups import step_groups
from treerpo_ray.algo.tree import StopReason, Tree
from treerpo_ray.verifier.verdict import Grade, Verdict

MemberT = TypeVar("MemberT", bound=StrEnum)
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
        # Null until it is trained on, and for each step and token that is not; files of earlier
        # versions lack them.
        ("advantage", pa.list_(pa.float64())),
        ("learner_logprobs", pa.list_(pa.float32())),
    ],
    metadata={"treerpo_schema": str(SCHEMA_VERSION)},
)
_REWARDS = {v: v.reward if v.is_reward else np.nan for v in Verdict}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """What a learner step made of a tree."""

    advantages: Float64[np.ndarray, " steps"]
    """NaN where a step is not trained on."""
    logprobs: Float32[np.ndarray, " tokens"]
    """Log-probability (nats) of each token under the learner before its update, by which and
    `Tree.logprobs` the ratio of learner to engine is told; NaN where it is not trained on."""


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
    leaf_rewards: tuple[float, ...] = ()
    """Reward of each leaf where one has partial credit, NaN without a reward; empty: all are 0 or
    1, as the verdicts say. In a table they are the values of the leaves."""
    row: str = "{}"
    """The prompt's row of the data set as JSON, for the verifier: not kept in a table."""
    scored_at_s: float = 0.0
    """Unix time of the verdicts; 0 until there are any."""
    num_redraws: int = 0
    """Trees of the same ticket that were put aside before, for they had no kept group."""
    redrawn_tokens: int = 0
    """Sampled tokens of those."""
    training: Training | None = None
    """None: the tree was not trained on yet, or was saved by an earlier version."""

    @property
    def log_ratios(self) -> Float32[np.ndarray, " tokens"]:
        """Log-probability of each token under the learner before its update less that of the
        engine; NaN where the token was not trained on, or it is not stored."""
        if self.training is None:
            return np.full(len(self.tree.token_ids), np.nan, np.float32)
        return self.training.logprobs - self.tree.logprobs

    @property
    def rewards(self) -> np.ndarray:
        """Reward of each leaf at its step's place, NaN elsewhere and where there is none."""
        if len(self.verdicts) != len(self.tree.leaves):
            raise ValueError(f"{len(self.verdicts)} verdicts for {len(self.tree.leaves)} leaves")
        rewards = np.full(len(self.tree), np.nan)
        found = self.leaf_rewards or [_REWARDS[verdict] for verdict in self.verdicts]
        rewards[list(self.tree.leaves)] = found
        return rewards

    def graded(self, grades: Sequence[Grade]) -> "TreeRecord":
        """The tree with a grade for each leaf, in the order of `tree.leaves`."""
        verdicts = tuple(grade.verdict for grade in grades)
        has_partial = Verdict.PARTIAL in verdicts
        rewards = tuple(grade.reward for grade in grades) if has_partial else ()
        return replace(self, verdicts=verdicts, leaf_rewards=rewards)


def to_table(records: Sequence[TreeRecord]) -> pa.Table:
    """Arrow table with one row a tree."""
    return pa.Table.from_pylist([_to_row(record) for record in records], schema=SCHEMA)


def with_training(table: pa.Table, training: Sequence[Training]) -> pa.Table:
    """The table of trees with `TreeRecord.training`, one a row."""
    columns = {
        "advantage": [own.advantages for own in training],
        "learner_logprobs": [own.logprobs for own in training],
    }
    for name, arrays in columns.items():
        field = SCHEMA.field(name)
        column = pa.array(arrays, field.type, from_pandas=True)  # NaN is null, which takes no room
        table = table.set_column(table.schema.get_field_index(name), field, column)
    return table


def is_readable(schema: pa.Schema) -> bool:
    """Whether a table of this schema was written with the present version."""
    return _schema_version(schema) == str(SCHEMA_VERSION)


def check_readable(schema: pa.Schema) -> None:
    """Check that a table of this schema can be read.

    Raises:
        ValueError: it was written with another schema version.
    """
    if not is_readable(schema):
        found = _schema_version(schema)
        raise ValueError(f"trees were written with schema {found}, this reads {SCHEMA_VERSION}")


def from_table(table: pa.Table) -> list[TreeRecord]:
    """Trees of a table.

    Raises:
        ValueError: the table was written with another schema version.
    """
    check_readable(table.schema)
    return [record for batch in table.to_batches() for record in _from_batch(batch)]


def _schema_version(schema: pa.Schema) -> str:
    return (schema.metadata or {}).get(b"treerpo_schema", b"?").decode()


def _to_row(record: TreeRecord) -> dict[str, object]:
    tree, training = record.tree, record.training
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
        "prompt_ids": tree.prompt_ids,
        "parent": tree.parents,
        "stop": list(tree.stops),
        "length": tree.lengths,
        "num_discarded": tree.num_discarded,
        "token_ids": tree.token_ids,
        "logprobs": tree.logprobs,
        "versions": tree.versions,
        "leaf": list(tree.leaves),
        "leaf_text": list(record.leaf_texts),
        "verdict": list(record.verdicts),
        "advantage": None if training is None else training.advantages,
        "learner_logprobs": None if training is None else training.logprobs,
        **_estimates(record),
    }


def _estimates(record: TreeRecord) -> dict[str, float | np.ndarray]:
    """Value of the prompt and of each step with their standard errors, and the standard error of
    each step's difference to its parent's value; nothing before the tree is scored."""
    if len(record.verdicts) != len(record.tree.leaves):
        return {}
    values = mean_backup(record.tree, record.rewards)
    differences = np.full(len(record.tree), np.nan)
    for group in step_groups(record.tree, values):
        differences[group.children] = group.difference_errors
    return {
        "root_value": values.root,
        "root_se": values.root_error,
        "value": values.steps,
        "value_se": values.step_errors,
        "difference_se": differences,
    }


_SCALARS = (
    *("ticket", "attempt", "num_redraws", "redrawn_tokens", "prompt_id", "question", "seed"),
    *("engine", "grow_s", "finished_at_s", "scored_at_s"),
)
"""Columns that are a field of the record as they are."""


def _from_batch(batch: pa.RecordBatch) -> Iterator[TreeRecord]:
    """Trees of one batch; their arrays are views of its memory, and so cannot be written to."""

    def scalars(name: str) -> list:
        return batch.column(name).to_pylist()

    def lists(name: str) -> Iterator[pa.Array]:
        column = batch.column(name)
        return (column.values[a:b] for a, b in pairwise(column.offsets.to_pylist()))

    def arrays(name: str) -> Iterator[np.ndarray]:
        return (values.to_numpy() for values in lists(name))

    def texts(name: str) -> Iterator[tuple[str, ...]]:
        return (tuple(values.to_numpy(zero_copy_only=False)) for values in lists(name))

    trees = map(
        _tree,
        arrays("prompt_ids"),
        arrays("parent"),
        arrays("length"),
        lists("stop"),
        arrays("num_discarded"),
        arrays("token_ids"),
        arrays("logprobs"),
        arrays("versions"),
    )
    rows = zip(*map(scalars, _SCALARS), strict=True)
    for row, answers, tree, leaf_texts, own, values, training in zip(
        rows,
        texts("answers"),
        trees,
        texts("leaf_text"),
        lists("verdict"),
        lists("value"),
        _training(batch),
        strict=True,
    ):
        verdicts = _members(Verdict, own)
        has_partial = Verdict.PARTIAL in verdicts
        yield TreeRecord(
            **dict(zip(_SCALARS, row, strict=True)),
            answers=answers,
            tree=tree,
            leaf_texts=leaf_texts,
            verdicts=verdicts,
            leaf_rewards=_leaf_rewards(tree, values) if has_partial else (),
            training=training,
        )


def _training(batch: pa.RecordBatch) -> list[Training | None]:
    """`TreeRecord.training` of each row."""
    if "advantage" not in batch.schema.names:
        return [None] * len(batch)
    columns = (batch.column(name) for name in ("advantage", "learner_logprobs"))
    return [
        Training(
            advantages=advantages.values.to_numpy(zero_copy_only=False),
            logprobs=logprobs.values.to_numpy(zero_copy_only=False),
        )
        if advantages.is_valid
        else None
        for advantages, logprobs in zip(*columns, strict=True)
    ]


def _leaf_rewards(tree: Tree, values: pa.Array) -> tuple[float, ...]:
    """The value of a leaf is its reward."""
    return tuple(values.to_numpy()[list(tree.leaves)].tolist())


def _tree(
    prompt_ids: np.ndarray,
    parents: np.ndarray,
    lengths: np.ndarray,
    stops: pa.Array,
    num_discarded: np.ndarray,
    token_ids: np.ndarray,
    logprobs: np.ndarray,
    versions: np.ndarray,
) -> Tree:
    return Tree(
        prompt_ids=prompt_ids,
        parents=parents,
        lengths=lengths,
        stops=_members(StopReason, stops),
        num_discarded=num_discarded,
        token_ids=token_ids,
        logprobs=logprobs,
        versions=versions,
    )


def _members(kind: type[MemberT], values: pa.Array) -> tuple[MemberT, ...]:
    """Strings as members of an enumeration, each different one looked up once."""
    encoded = values.dictionary_encode()
    members = np.array([kind(value) for value in encoded.dictionary.to_pylist()], object)
    return tuple(members[encoded.indices.to_numpy()].tolist())
