"""Tree view: what the drawing shows of one tree, a column a quantity."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from tokenizers import Tokenizer

from treerpo_ray.algo.tree import Tree
from treerpo_ray.records import TreeRecord
from treerpo_ray.study.analysis import Run, step_means
from treerpo_ray.viewer.credit import credit_of
from treerpo_ray.viewer.step_text import beginnings


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeView:
    """A tree with what is known of it; arrays and tuples have an entry a step."""

    ref: str
    """What tells the tree: STEP:TICKET, or eSTEP:PROBLEM for the answers of an evaluation."""
    step: int
    """Learner step that it was trained on, or that was evaluated."""
    ticket: int | None
    prompt_id: str
    question: str
    answers: tuple[str, ...]
    num_redraws: int
    seed: int | None
    engine: int | None
    grow_s: float | None
    root_value: float
    root_se: float
    groups: dict[str, int]
    """Number of step groups by `GroupState`; none where nothing is trained on."""
    parent: Int32[np.ndarray, " steps"]
    depth: Int64[np.ndarray, " steps"]
    length: Int32[np.ndarray, " steps"]
    """Tokens."""
    stop: tuple[str, ...]
    value: Float64[np.ndarray, " steps"]
    value_se: Float64[np.ndarray, " steps"]
    advantage: Float64[np.ndarray, " steps"]
    """NaN where the step is not trained on."""
    advantage_se: Float64[np.ndarray, " steps"]
    state: tuple[str | None, ...]
    """`GroupState` of the group that the step is in."""
    verdict: tuple[str | None, ...]
    """Of leaves."""
    oldest_version: tuple[int | None, ...]
    newest_version: tuple[int | None, ...]
    mean_logprob: Float64[np.ndarray, " steps"]
    """Nats a token."""
    mean_log_ratio: Float64[np.ndarray, " steps"]
    """Of learner to engine, nats a token; NaN where the step is not trained on, or it is not
    stored."""
    largest_log_ratio: float
    """Of a token, by its amount; infinite if there is none."""
    text: tuple[str, ...]
    """How the step's text begins."""
    has_texts: bool
    """Whether there are tokens and a tokenizer to show them with."""


def trained_tree(run: Run, tokenizer: Tokenizer | None, record: TreeRecord, step: int) -> TreeView:
    """A tree that a learner step was trained on."""
    tree, values = record.tree, run.values(record)
    credit = credit_of(run, record, values)
    has_tokens = tree.lengths > 0
    log_ratios = record.log_ratios
    return TreeView(
        ref=f"{step}:{record.ticket}",
        step=step,
        ticket=record.ticket,
        prompt_id=record.prompt_id,
        question=record.question,
        answers=record.answers,
        num_redraws=record.num_redraws,
        seed=record.seed,
        engine=record.engine,
        grow_s=record.grow_s,
        root_value=values.root,
        root_se=values.root_error,
        groups=credit.groups,
        parent=tree.parents,
        depth=tree.depth_array,
        length=tree.lengths,
        stop=tuple(stop.value for stop in tree.stops),
        value=values.steps,
        value_se=values.step_errors,
        advantage=credit.advantage,
        advantage_se=credit.advantage_se,
        state=credit.state,
        verdict=leaf_verdicts(record),
        oldest_version=_versions(tree, np.minimum, has_tokens),
        newest_version=_versions(tree, np.maximum, has_tokens),
        mean_logprob=step_means(tree, tree.logprobs),
        mean_log_ratio=step_means(tree, log_ratios),
        largest_log_ratio=float(np.nanmax(np.abs(log_ratios), initial=-np.inf)),
        text=tuple(beginnings(tokenizer, record)),
        has_texts=tokenizer is not None,
    )


def leaf_verdicts(record: TreeRecord) -> tuple[str | None, ...]:
    """Verdict of each leaf, at its step's place."""
    verdicts: list[str | None] = [None] * len(record.tree)
    for leaf, verdict in zip(record.tree.leaves, record.verdicts, strict=True):
        verdicts[leaf] = verdict.value
    return tuple(verdicts)


def _versions(
    tree: Tree, least_or_most: np.ufunc, has_tokens: Bool[np.ndarray, " steps"]
) -> tuple[int | None, ...]:
    """Oldest or newest version of each step's tokens."""
    found: list[int | None] = [None] * len(tree)
    if has_tokens.any():
        of_steps = least_or_most.reduceat(tree.versions, tree.starts[has_tokens])
        for index, version in zip(np.flatnonzero(has_tokens), of_steps.tolist(), strict=True):
            found[index] = version
    return tuple(found)
