"""Sightings: problems as trees and evaluations met them, and those that were met again.

Training rarely meets a problem a second time; an evaluation asks the same held-out problems before
and after. So what a run has changed is seen in both.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from treerpo_ray.evaluate.evaluation import step_name
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict

SAMPLE_COLUMNS = ("problem", "question", "verdict", "reward")
"""Of an evaluation; one of an earlier version has no rewards."""
SIGHTING_COLUMNS = ("ticket", "finished_at_s", "prompt_id", "question", "root_value")
MAX_QUESTION = 300
"""Characters of a question that a list shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A problem as one learner step or evaluation met it."""

    ref: str
    """STEP:TICKET of a tree, eSTEP:PROBLEM of the answers in an evaluation."""
    step: int
    is_evaluation: bool
    problem: str
    question: str
    value: float
    """Of the root: the mean reward of the answers in an evaluation."""
    num_answers: int | None
    """In an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetProblem:
    """A problem that was met at several learner steps."""

    problem: str
    question: str
    is_evaluation: bool
    refs: tuple[str, ...]
    """The trees, by learner step."""
    values: tuple[float, ...]
    gain: float
    """Value of the last less that of the first; NaN where one has none."""


def evaluation_file(step: int) -> str:
    """File with the answers of the evaluation at a learner step."""
    return f"eval/{step_name(step)}.parquet"


def evaluated_steps(folder: RunFolder) -> list[int]:
    """Learner steps whose evaluation has its answers saved, ascending."""
    files = folder.glob("eval/step=*.parquet")
    return sorted(int(file.rpartition("=")[2].removesuffix(".parquet")) for file in files)


def evaluation_sightings(folder: RunFolder, step: int) -> list[Sighting]:
    """The problems of an evaluation; the texts of its answers are not read."""
    with folder.parquet(evaluation_file(step)) as samples:
        columns = [name for name in SAMPLE_COLUMNS if name in samples.schema_arrow.names]
        table = samples.read(columns)
    rewards: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in table.to_pylist():
        rewards[row["problem"], row["question"]].append(reward_of(row))
    return [
        Sighting(
            ref=f"e{step}:{problem}",
            step=step,
            is_evaluation=True,
            problem=problem,
            question=question,
            value=float(np.mean(own)),
            num_answers=len(own),
        )
        for (problem, question), own in rewards.items()
    ]


def tree_sightings(folder: RunFolder, file: str, step: int) -> list[Sighting]:
    """The problems of a file of trees; of their steps nothing is read."""
    table = saved_trees.read_columns(folder, file, SIGHTING_COLUMNS)
    rows = {}
    for row in sorted(table.to_pylist(), key=lambda row: row["finished_at_s"]):
        rows[row["ticket"]] = row
    return [
        Sighting(
            ref=f"{step}:{ticket}",
            step=step,
            is_evaluation=False,
            problem=row["prompt_id"],
            question=row["question"],
            value=float("nan") if row["root_value"] is None else row["root_value"],
            num_answers=None,
        )
        for ticket, row in rows.items()
    ]


def met_again(sightings: Iterable[Sighting]) -> list[MetProblem]:
    """Problems that were met at several learner steps, those that gained most first."""
    found: dict[tuple[bool, str, str], dict[int, Sighting]] = defaultdict(dict)
    for sighting in sightings:
        key = sighting.is_evaluation, sighting.problem, sighting.question
        found[key][sighting.step] = sighting
    problems = [
        _problem([by_step[step] for step in sorted(by_step)])
        for by_step in found.values()
        if len(by_step) > 1
    ]
    return sorted(problems, key=lambda problem: np.nan_to_num(-problem.gain, nan=np.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a later evaluation answers otherwise than an earlier one."""

    steps: tuple[int, int]
    """Learner steps of the two."""
    num_answers: tuple[int, int]
    """To each problem, at most."""
    num_problems: int
    """That both have."""
    fixed: tuple[MetProblem, ...]
    """Those that were mostly wrong and are mostly right, the largest gain first."""
    num_fixed: int
    num_broken: int
    """Those of which the opposite is so."""


def change_between(first: Sequence[Sighting], last: Sequence[Sighting]) -> Change:
    """The change from one evaluation to another."""
    problems = met_again([*first, *last])
    fixed = tuple(own for own in problems if own.values[0] < 0.5 <= own.values[-1])
    return Change(
        steps=(first[0].step, last[0].step),
        num_answers=(_most_answers(first), _most_answers(last)),
        num_problems=len(problems),
        fixed=fixed,
        num_fixed=len(fixed),
        num_broken=sum(own.values[-1] < 0.5 <= own.values[0] for own in problems),
    )


def _most_answers(sightings: Sequence[Sighting]) -> int:
    return max(sighting.num_answers or 0 for sighting in sightings)


def _problem(met: list[Sighting]) -> MetProblem:
    return MetProblem(
        problem=met[0].problem,
        question=met[0].question[:MAX_QUESTION],
        is_evaluation=met[0].is_evaluation,
        refs=tuple(sighting.ref for sighting in met),
        values=tuple(sighting.value for sighting in met),
        gain=met[-1].value - met[0].value,
    )


def answer_rows(folder: RunFolder, step: int, problem: str) -> list[dict]:
    """The answers to one problem in an evaluation, as `evaluation.SAMPLES` says.

    Raises:
        ValueError: there is no such evaluation or problem.
    """
    if not folder.exists(evaluation_file(step)):
        raise ValueError(f"{folder} has no evaluation with answers at step {step}")
    rows: list[dict] = []
    with folder.parquet(evaluation_file(step)) as samples:
        for group in range(samples.num_row_groups):
            problems = samples.read_row_group(group, ["problem"])["problem"].to_pylist()
            places = [place for place, own in enumerate(problems) if own == problem]
            if places:
                rows += samples.read_row_group(group).take(places).to_pylist()
    if not rows:
        raise ValueError(f"{folder} has no problem {problem} in its evaluation at step {step}")
    return rows


def reward_of(row: dict) -> float:
    """Reward of an answer, NaN without; where it is not recorded, that of the verdict."""
    verdict, reward = Verdict(row["verdict"]), row.get("reward")
    if not verdict.is_reward:
        return float("nan")
    return verdict.reward if reward is None else reward
