"""Embedded tasks: endless problems whose worked solutions an error-prone solver can write.

`quickstart:train` is a split of `chains4`; `quickstart:TASK/train` names another task, and
`quickstart:test/1` another seed, for problems that no choice has been made by. A problem
belongs to the test split iff the checksum of its question says so, whatever the seed: the splits
cannot overlap. A new task is an `Exercise` and its name in `TASKS`; a model for it is a recipe in
`make_model`.
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from treerpo_ray.quickstart.chains import CheckedChain, RestatedChain, WordyChain, draw_chain
from treerpo_ray.quickstart.countdown import draw_countdown
from treerpo_ray.quickstart.items import draw_items
from treerpo_ray.quickstart.plans import draw_plan

MODELS_FOLDER = "~/treerpo_models"
"""Folder in which `make_model` writes, by name."""
MODELS = (
    *("chains4", "chains10", "chains10_hard", "wordy4", "countdown"),
    *("restated4", "items6", "plan_first", "checked4"),
)
"""Models that it makes."""
SPLITS = ("train", "test")
TEST_SHARE = 8  # one question in this many belongs to the test split


class Exercise(Protocol):
    """A question with what it takes to answer it."""

    @property
    def question(self) -> str:
        """What is asked, without the chat template."""

    @property
    def answer(self) -> str:
        """The reference that the verifier gets."""

    def write_solution(self, *, slip_rate: float, rng: random.Random) -> str:
        """Write a worked solution, one line a step, as the task's check reads it.

        With probability `slip_rate` a line is a slip, and the solver goes on from there; a slip
        rate of 0 gives a correct solution.
        """


TASKS: dict[str, Callable[[random.Random], Exercise]] = {
    "chains4": partial(draw_chain, 4),
    "chains10": partial(draw_chain, 10),
    "wordy4": partial(draw_chain, 4, kind=WordyChain),
    "countdown": draw_countdown,
    "restated4": partial(draw_chain, 4, kind=RestatedChain),
    "items6": draw_items,
    "plan_first": draw_plan,
    "checked4": partial(draw_chain, 4, kind=CheckedChain),
}
"""Draws an exercise, by name of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkedProblem:
    """One problem: `id` names split and seed, `answer` is the verifier's reference."""

    id: str
    question: str
    answer: str
    solution: str


def split_of(question: str) -> str:
    """The split that a question belongs to."""
    return "test" if zlib.crc32(question.encode()) % TEST_SHARE == 0 else "train"


def draw_exercises(task: str, split: str, rng: random.Random) -> Iterator[Exercise]:
    """Draw exercises of one split without end; raises ValueError for an unknown task or split."""
    for kind, name, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if name not in known:
            raise ValueError(f"{kind}: {name!r} is not one of {', '.join(known)}")
    while True:
        exercise = TASKS[task](rng)
        if split_of(exercise.question) == split:
            yield exercise


def problems(task: str, split: str, num: int, seed: int) -> list[WorkedProblem]:
    """Return `num` different problems of a split; the same arguments give the same problems.

    Raises ValueError for an unknown task or split.
    """
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, WorkedProblem] = {}
    for exercise in draw_exercises(task, split, rng):
        if len(found) == num:
            break
        if exercise.question not in found:
            found[exercise.question] = WorkedProblem(
                id=f"{split}-{seed}-{len(found)}",
                question=exercise.question,
                answer=exercise.answer,
                solution=exercise.write_solution(slip_rate=0.0, rng=rng),
            )
    return list(found.values())


def write_problems(path: Path, rows: list[WorkedProblem]) -> None:
    """Write problems as JSONL rows {id, question, answer, solution}."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write problems of an embedded task as JSONL.")
    parser.add_argument("--task", choices=TASKS, default="chains4")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--num", type=int, required=True, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(arguments)
    write_problems(args.out, problems(args.task, args.split, args.num, args.seed))


if __name__ == "__main__":
    main(sys.argv[1:])
