"""Reader: what the viewer shows of a run, read when it is looked at and kept while it may be again.

A run may go on meanwhile, and a resume may replace the trees of a step: what was read of a file
counts as long as the file is the same.
"""

from collections.abc import Callable
from functools import lru_cache
from threading import RLock
from typing import TypeVar

from treerpo_ray.metrics.rows import METRICS_FILE, Row, latest, num_redone, written_rows
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder, run_at
from treerpo_ray.study.analysis import Run
from treerpo_ray.study.sightings import (
    Change,
    MetProblem,
    Sighting,
    change_between,
    evaluated_steps,
    evaluation_file,
    evaluation_sightings,
    met_again,
    tree_sightings,
)
from treerpo_ray.viewer.answers import Answers, read_answers
from treerpo_ray.viewer.search import Found, FoundAnswers, answers_with, trees_with
from treerpo_ray.viewer.status import Curves, Status, curves_of, read_status
from treerpo_ray.viewer.step_text import StepText, holding, step_text
from treerpo_ray.viewer.tree_list import TreeSummary, summaries
from treerpo_ray.viewer.tree_view import TreeView, trained_tree

T = TypeVar("T")

KEPT_TREES = 16
"""Trees that stay in memory with their tokens, 3 MB each if they are the paper's."""
KEPT_FILES = 4096
"""Files whose summaries stay in memory."""


class RunReader:
    """A run, read only; any number of threads may ask.

    Args:
        place: Folder or URI of a run, or its name where it lies in the folder of all runs.

    Raises:
        ValueError: there is no such run; methods raise it for what is not there or not readable.
    """

    def __init__(self, place: str) -> None:
        self._run = Run(run_at(place))
        self._folder = RunFolder(self._run.folder)
        # The folder may be another person's: Python that it names is not run.
        self._pruning = None if self._run.own_code else self._run.pruning
        self._lock = RLock()
        self._rows = lru_cache(1)(self._read_rows)
        self._tree = lru_cache(KEPT_TREES)(self._read_tree)
        self._answers = lru_cache(KEPT_TREES)(self._read_answers)
        self._summaries = lru_cache(KEPT_FILES)(self._read_summaries)
        self._sightings = lru_cache(KEPT_FILES)(self._read_sightings)

    def status(self) -> Status:
        """How far the run is."""
        return read_status(self._run, self._folder, *self._all_rows())

    def curves(self) -> Curves:
        """Its metrics."""
        return curves_of(self._all_rows()[0])

    def trees(self, step: int) -> list[TreeSummary]:
        """The trees that are saved of a learner step, by ticket; none if there are none."""
        newest: dict[int, tuple[float, TreeSummary]] = {}
        for file in saved_trees.saved_files(self._folder, step):
            for ticket, found in self._kept(self._summaries, file, step).items():
                if ticket not in newest or newest[ticket][0] <= found[0]:
                    newest[ticket] = found
        return [newest[ticket][1] for ticket in sorted(newest)]

    def tree(self, ref: str) -> TreeView:
        """A tree as it is drawn; `ref` as `TreeView.ref` says."""
        is_evaluation, step, name = parse_ref(ref)
        if is_evaluation:
            return self._answers_of(step, name).view
        return trained_tree(self._run, self._run.tokenizer, self._record(step, int(name)), step)

    def texts(self, ref: str, nodes: list[int]) -> list[StepText]:
        """Whole texts of some steps of a tree."""
        is_evaluation, step, name = parse_ref(ref)
        if is_evaluation:
            texts = self._answers_of(step, name).texts
            if any(not 0 <= node < len(texts) for node in nodes):
                raise ValueError(f"tree {ref} has {len(texts)} answers, not all of {nodes}")
            return [_whole(node, texts[node]) for node in nodes]
        record = self._record(step, int(name))
        return [step_text(self._run.tokenizer, record, node) for node in nodes]

    def holding(self, ref: str, text: str) -> list[int]:
        """Steps of a tree whose text holds `text`, in whatever case."""
        is_evaluation, step, name = parse_ref(ref)
        if is_evaluation:
            texts = self._answers_of(step, name).texts
            return [node for node, own in enumerate(texts) if text.casefold() in own.casefold()]
        return holding(self._run.tokenizer, self._record(step, int(name)), text)

    def search(self, step: int, text: str) -> list[Found]:
        """The trees that are saved of a learner step and have `text` in an answer, in whatever
        case, by ticket."""
        newest: dict[int, tuple[float, Found]] = {}
        for file in saved_trees.saved_files(self._folder, step):
            for ticket, found in trees_with(self._folder, file, text).items():
                if ticket not in newest or newest[ticket][0] <= found[0]:
                    newest[ticket] = found
        return [newest[ticket][1] for ticket in sorted(newest) if newest[ticket][1].num_answers]

    def search_answers(self, step: int, text: str) -> list[FoundAnswers]:
        """The problems of the evaluation at a learner step that have `text` in an answer, in
        whatever case, in its order; none if there is no such evaluation."""
        return answers_with(self._folder, step, text)

    def change(self) -> Change | None:
        """What the last evaluation answers otherwise than the first; None before there are two."""
        steps = evaluated_steps(self._folder)
        if len(steps) < 2:
            return None
        first, last = (
            self._kept(self._sightings, evaluation_file(step), step)
            for step in (steps[0], steps[-1])
        )
        return change_between(first, last)

    def problems(self) -> list[MetProblem]:
        """Problems that were met at several learner steps, those that gained most first."""
        sightings: list[Sighting] = []
        for step in evaluated_steps(self._folder):
            sightings += self._kept(self._sightings, evaluation_file(step), step)
        for step in saved_trees.saved_steps(self._folder):
            for file in saved_trees.saved_files(self._folder, step):
                sightings += self._kept(self._sightings, file, step)
        return met_again(sightings)

    # What is kept ----------------------------------------------------------------------------

    def _all_rows(self) -> tuple[list[Row], int]:
        """The rows, and how many learner steps were done once more."""
        with self._lock:
            return self._rows(self._folder.state(METRICS_FILE))

    def _read_rows(self, state: str) -> tuple[list[Row], int]:
        written = written_rows(self._folder)
        return latest(written), num_redone(written)

    def _kept(self, read: Callable[[str, int, str], T], file: str, step: int) -> T:
        """What `read` makes of a file of a learner step, once as long as the file is the same."""
        with self._lock:
            return read(file, step, self._folder.state(file))

    def _record(self, step: int, ticket: int) -> TreeRecord:
        files = saved_trees.saved_files(self._folder, step)
        with self._lock:
            return self._tree(step, ticket, tuple(map(self._folder.state, files)))

    def _answers_of(self, step: int, problem: str) -> Answers:
        with self._lock:
            return self._answers(step, problem, self._folder.state(evaluation_file(step)))

    def _read_tree(self, step: int, ticket: int, states: tuple[str, ...]) -> TreeRecord:
        return self._run.tree(step, ticket)

    def _read_answers(self, step: int, problem: str, state: str) -> Answers:
        return read_answers(self._folder, step, problem)

    def _read_summaries(
        self, file: str, step: int, state: str
    ) -> dict[int, tuple[float, TreeSummary]]:
        return summaries(self._folder, file, step, self._pruning)

    def _read_sightings(self, file: str, step: int, state: str) -> list[Sighting]:
        if file == evaluation_file(step):
            return evaluation_sightings(self._folder, step)
        return tree_sightings(self._folder, file, step)


def parse_ref(ref: str) -> tuple[bool, int, str]:
    """Whether a tree is the answers of an evaluation, its learner step, and its ticket or problem.

    Raises:
        ValueError: it is none.
    """
    head, colon, name = ref.partition(":")
    is_evaluation, step = head.startswith("e"), head.removeprefix("e")
    if not (colon and _is_number(step) and (is_evaluation or _is_number(name))):
        raise ValueError(f"{ref!r} is no tree: it must be STEP:TICKET or eSTEP:PROBLEM")
    return is_evaluation, int(step), name


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


def _whole(index: int, text: str) -> StepText:
    return StepText(
        index=index,
        text=(),
        num_tokens=(),
        logprob=(),
        learner_logprob=(),
        version=(),
        answer=text,
    )
