"""Advantages of every method, worked out again from its definition: answer by answer, no arrays."""

from collections.abc import Callable
from statistics import fmean, stdev

from tests.support.learning.step_rows import REWARDS
from treerpo_ray.records import TreeRecord

Row = tuple[int, float]
"""A step and the advantage that its tokens have in one training row."""


def siblings(form: Callable[[list[float], int], float]) -> Callable[[TreeRecord], list[Row]]:
    """One row a step: `form` of the values of its siblings and its place among them."""

    def rows(record: TreeRecord) -> list[Row]:
        found = []
        for step in range(len(record.tree.steps)):
            group = [i for i, s in enumerate(record.tree.steps) if s.parent == parent(record, step)]
            found.append((step, form([value(record, i) for i in group], group.index(step))))
        return found

    return rows


def parent(record: TreeRecord, step: int) -> int:
    return record.tree.steps[step].parent


def value(record: TreeRecord, step: int) -> float:
    """Mean over children, of children's values."""
    below = [i for i in range(len(record.tree.steps)) if parent(record, i) == step]
    return fmean(value(record, i) for i in below) if below else reward(record, step)


def reward(record: TreeRecord, leaf: int) -> float:
    return REWARDS[record.verdicts[record.tree.leaves.index(leaf)]]


def leaves(record: TreeRecord, step: int) -> list[int]:
    """Leaves below a step, itself included; those of the prompt are all."""
    return [leaf for leaf in record.tree.leaves if step == -1 or step in record.tree.path(leaf)]


def treerl(record: TreeRecord) -> list[Row]:
    """A row for each step of each answer, as TreeRL trains."""

    def mean(step: int) -> float:
        return fmean(reward(record, leaf) for leaf in leaves(record, step))

    return [
        (
            step,
            ((mean(step) - mean(-1)) + (mean(step) - mean(parent(record, step))))
            / len(leaves(record, step)) ** 0.5,
        )
        for leaf in record.tree.leaves
        for step in record.tree.path(leaf)
    ]


def treepo(record: TreeRecord) -> list[Row]:
    """A row for each step of each answer, all with the answer's advantage, as TreePO trains."""
    rows = []
    for leaf in record.tree.leaves:
        subgroups = [leaves(record, step) for step in (-1, *record.tree.path(leaf)[:-1])]
        subgroups = [s for number, s in enumerate(subgroups) if number == 0 or len(s) > 1]
        gaps = [reward(record, leaf) - fmean(reward(record, i) for i in s) for s in subgroups]
        rows += [(step, fmean(gaps)) for step in record.tree.path(leaf)]
    return rows


def bernoulli(values: list[float], own: int) -> float:
    mean = fmean(values)
    return (values[own] - mean) / (mean * (1 - mean)) if max(values) > min(values) else 0.0


def standard(values: list[float], own: int) -> float:
    return (values[own] - fmean(values)) / (stdev(values) + 1e-6)


def leave_one_out(values: list[float], own: int) -> float:
    return values[own] - fmean(values[:own] + values[own + 1 :])


ROWS: dict[str, Callable[[TreeRecord], list[Row]]] = {
    "grpo": siblings(standard),
    "dr_grpo": siblings(lambda values, own: values[own] - fmean(values)),
    "dapo": siblings(standard),
    "gspo": siblings(standard),
    "rloo": siblings(leave_one_out),
    "spo_tree": siblings(lambda values, own: values[own] - fmean(values)),
    "treerpo": siblings(bernoulli),
    "raft": siblings(lambda values, own: values[own]),
    "reinforce": siblings(lambda values, own: values[own]),  # in the first step, without a past
    "shrunk_baseline": siblings(leave_one_out),  # and without a past they alone are looked at
    "adaptive": siblings(leave_one_out),  # the same form, whatever the shape
    "treerl": treerl,
    "treepo": treepo,
}
"""Training rows of each method in `conf/methods`, pruning aside."""
