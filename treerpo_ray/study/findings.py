"""Findings: what the trees of a run and its evaluations tell, as tables; no Ray, torch or vLLM.

Tables of steps are those of `analysis.Run.tree_table`. On a path from the prompt to an answer the
values are means of what can follow, so that the changes between them are uncorrelated: the variance
of an answer's reward is the sum over all steps of `weight` times `change` squared. That says how
much of what becomes of an answer each step decides.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from treerpo_ray.metrics.fork_lines import ForkLine, fork_lines
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.analysis import NotThere, Run
from treerpo_ray.study.sightings import (
    MetProblem,
    answer_rows,
    change_between,
    evaluated_steps,
    evaluation_sightings,
    met_again,
    reward_of,
)

OUTCOMES = ("kept", "all right", "all wrong", "alike", "no verdict")
"""What becomes of a step group: it is kept, or is pruned because its values are all 1, all 0, or
others that differ too little, or has a step without a value."""


def steps_by_depth(run: Run) -> pd.DataFrame:
    """Means over the steps of the newest saved trees, by depth, and how many steps those are."""
    table = run.tree_table()
    shown = ["value", "value_se", "advantage_se", "length", "surprisal", "is_leaf", "is_kept"]
    groups = table.groupby("depth")
    return groups[shown].mean().assign(steps=groups.size())


def places_to_fork(run: Run) -> pd.DataFrame:
    """What each place to fork needs of the tokens that flat answers need, by depth, as the run
    measured it last, at learner step `step`; the columns are those of `ForkLine`.

    Raises:
        NotThere: it has not, as flat runs and those of a few trees never do.
    """
    lines: dict[int, tuple[int, ForkLine]] = {}
    for step, row in run.metrics().iterrows():
        known = {str(name): float(value) for name, value in row.dropna().items()}
        lines |= {line.depth: (int(str(step)), line) for line in fork_lines(known)}
    if not lines:
        raise NotThere(
            f"{run.folder} has no metrics fork/... yet: they are measured every "
            "`learner.fork_every` learner steps on trees that fork behind a first step"
        )
    rows = [asdict(line) | {"step": step} for _, (step, line) in sorted(lines.items())]
    return pd.DataFrame(rows).set_index("depth")


def decisive_steps(run: Run, count: int = 8, step: int | None = None) -> pd.DataFrame:
    """The steps that decide most of the trees of a learner step (the newest saved), first ones
    first: `decided` is the part of the reward's variance in their tree that is theirs."""
    table = run.tree_table(step)
    table["decided"] = table["weight"] * table["change"] ** 2
    found = table.nlargest(count, "decided")
    found = found[found["decided"] > 0]
    records = {record.ticket: record for record in run.trees(step)}
    texts = {ticket: run.step_texts(records[ticket]) for ticket in set(found["ticket"])}
    places = list(zip(found["ticket"], found["step"], strict=True))
    shown = ["ticket", "step", "depth", "before", "value", "change", "change_se", "decided"]
    return found[shown].assign(
        question=[records[ticket].question for ticket, _ in places],
        text=[texts[ticket][index] for ticket, index in places],
    )


def with_value(table: pd.DataFrame) -> pd.DataFrame:
    """The steps of those trees whose prompt has a value."""
    known = table.loc[(table["depth"] == 1) & table["before"].notna(), "ticket"]
    return table[table["ticket"].isin(known)]


def decided_by_depth(table: pd.DataFrame) -> pd.Series:
    """Share of the reward's variance, summed over trees, that is decided at each depth; NaN if
    nothing is, as every tree's answers are alike. Trees without a value are left out."""
    own = with_value(table)
    by_depth = (own["weight"] * own["change"] ** 2).groupby(own["depth"]).sum()
    return by_depth / (by_depth.sum() or np.nan)


def worst_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Where each answer that is mostly wrong (reward below 1/2) lost most value, a row an answer:
    its `ticket`, its leaf (`step`), the `depth` of the step on its path with the largest loss and
    the `loss`. Depth 0: no step lost anything, as its tree has no better answer. Trees without a
    value are left out."""
    rows = []
    for ticket, tree in with_value(table).groupby("ticket"):
        worst = {-1: (0.0, 0)}  # loss and depth, by step; parents come before their children
        columns = ("step", "parent", "depth", "change", "value", "is_leaf")
        for step, parent, depth, change, value, is_leaf in zip(
            *(tree[name].tolist() for name in columns), strict=True
        ):
            own = (-change, depth)
            worst[step] = own if own[0] > worst[parent][0] else worst[parent]
            if is_leaf and value < 0.5:
                rows.append((ticket, step, worst[step][1], worst[step][0]))
    return pd.DataFrame(rows, columns=["ticket", "step", "depth", "loss"])


def group_table(table: pd.DataFrame) -> pd.DataFrame:
    """The step groups, a row a group by `ticket` and `parent`: its `depth`, `value` (the mean),
    `range` and `outcome`, one of OUTCOMES."""
    groups = table.groupby(["ticket", "parent"])
    low, high = groups["value"].min(), groups["value"].max()
    has_gap = groups["value"].count() < groups.size()
    told = [groups["is_kept"].any(), has_gap, low == 1, high == 0]
    names = ["kept", "no verdict", "all right", "all wrong"]
    return pd.DataFrame(
        {
            "depth": groups["depth"].first(),
            "value": groups["value"].mean(),
            "range": high - low,
            "outcome": np.select(told, names, "alike"),
        }
    )


def mismatch_by_staleness(run: Run, step: int | None = None) -> pd.DataFrame:
    """How far the learner was from the engines, by how many versions older than the learner's the
    weights were that sampled a token: number of `tokens`, and `mean` and `max` of
    |log p(learner) - log p(engine)| (nats), before the update, over tokens that were trained on.

    Raises:
        NotThere: the trees were saved without the learner's log-probabilities.
    """
    step = run.tree_steps()[-1] if step is None and run.tree_steps() else step
    records = [record for record in run.trees(step) if record.training is not None]
    if not records:
        raise NotThere(f"{run.folder} has trees without what the learner made of their tokens")
    version = run.version_before(step or 0)
    tokens = pd.DataFrame(
        {
            "staleness": np.concatenate([version - record.tree.versions for record in records]),
            "apart": np.concatenate([np.abs(record.log_ratios) for record in records]),
        }
    ).dropna()
    of_age = tokens.groupby("staleness")["apart"]
    return of_age.agg(tokens="count", mean="mean", max="max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer in an evaluation."""

    text: str
    verdict: str
    reward: float
    """NaN without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """One held-out problem in two evaluations."""

    problem: str
    question: str
    steps: tuple[int, int]
    """Learner steps of the evaluations."""
    answers: tuple[tuple[Answer, ...], tuple[Answer, ...]]
    num_problems: int
    """That both evaluations have."""
    num_fixed: int
    """Of these, how many were mostly wrong and are mostly right."""
    num_broken: int
    """Of these, how many were mostly right and are mostly wrong."""


def before_after(run: Run, problem: str | None = None) -> BeforeAfter:
    """A problem in the run's first and last evaluation; without `problem` the one that gained most.

    Raises:
        NotThere: the run has no two evaluations whose answers are saved, or they do not share the
            problem.
    """
    folder = RunFolder(run.folder)
    steps = evaluated_steps(folder)
    if len(steps) < 2:
        raise NotThere(f"{run.folder} has no two evaluations with answers in eval/ yet")
    ends = steps[0], steps[-1]
    first, last = (evaluation_sightings(folder, step) for step in ends)
    change = change_between(first, last)
    shared = {found.problem: found for found in met_again([*first, *last])}
    if not shared or (problem is not None and problem not in shared):
        wanted = "problem" if problem is None else f"problem {problem}"
        raise NotThere(f"{run.folder} has no {wanted} in both evaluations, of steps {ends}")
    chosen = next(iter(shared)) if problem is None else problem
    before, after = (_answers(folder, step, shared[chosen]) for step in ends)
    return BeforeAfter(
        problem=chosen,
        question=shared[chosen].question,
        steps=ends,
        answers=(before, after),
        num_problems=change.num_problems,
        num_fixed=change.num_fixed,
        num_broken=change.num_broken,
    )


def _answers(folder: RunFolder, step: int, problem: MetProblem) -> tuple[Answer, ...]:
    return tuple(
        Answer(text=row["text"], verdict=row["verdict"], reward=reward_of(row))
        for row in answer_rows(folder, step, problem.problem)
    )
