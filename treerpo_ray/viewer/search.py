"""Search: which trees, and which problems of an evaluation, have a text in one of their answers;
nothing else of them is read."""

import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from treerpo_ray.records import check_readable
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.study.sightings import MAX_QUESTION, evaluation_file

COLUMNS = ("ticket", "finished_at_s", "leaf", "leaf_text")
BEFORE, AFTER = 50, 110
"""Characters that are shown around what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A text that was looked for, where it stands in an answer."""

    before: str
    text: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A tree with the text that was looked for."""

    ticket: int
    num_answers: int
    """Answers that have it."""
    leaf: int
    """The first of them."""
    passage: Passage


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundAnswers:
    """A problem of an evaluation with the text that was looked for."""

    step: int
    """Learner step of the evaluation."""
    problem: str
    question: str
    """Its beginning, if it is long."""
    reference: str
    """The first."""
    total: int
    """Answers to the problem."""
    num_answers: int
    """Answers that have the text."""
    leaf: int
    """The first of them."""
    verdict: str
    """`Verdict` of that one."""
    passage: Passage


def trees_with(folder: RunFolder, file: str, text: str) -> dict[int, tuple[float, Found]]:
    """By ticket the trees of a file with what was found in them, be it nothing, and the time at
    which each was finished; of several of a ticket the last.

    Raises:
        ValueError: the trees were written with another schema version.
    """
    newest: dict[int, tuple[float, Found]] = {}
    with folder.parquet(file) as trees:
        check_readable(trees.schema_arrow)
        for batch in trees.iter_batches(columns=list(COLUMNS)):
            for finished_at_s, found in _in_batch(batch, text):
                if found.ticket not in newest or newest[found.ticket][0] <= finished_at_s:
                    newest[found.ticket] = finished_at_s, found
    return newest


def _in_batch(batch: pa.RecordBatch, text: str) -> list[tuple[float, Found]]:
    answers = batch.column("leaf_text")
    has_text = pc.match_substring(answers.flatten(), text, ignore_case=True).to_numpy(False)
    trees = answers.value_parent_indices().to_numpy()[has_text]
    places = has_text.nonzero()[0]
    found = []
    for row, (ticket, finished_at_s) in enumerate(
        zip(*(batch.column(name).to_pylist() for name in COLUMNS[:2]), strict=True)
    ):
        own = places[trees == row]
        first = own[0] if len(own) else None
        found.append((finished_at_s, _found(batch, ticket, text, len(own), first)))
    return found


def answers_with(folder: RunFolder, step: int, text: str) -> list[FoundAnswers]:
    """The problems of the evaluation at a learner step that have a text in an answer, in the order
    of the file; none if there is no such evaluation."""
    file = evaluation_file(step)
    if not folder.exists(file):
        return []
    with folder.parquet(file) as samples:
        table = samples.read(["problem", "question", "references", "text", "verdict"])
    by_problem: dict[str, list[int]] = {}
    for row, problem in enumerate(table["problem"].to_pylist()):
        by_problem.setdefault(problem, []).append(row)
    answers = table["text"]
    has_text = pc.match_substring(answers, text, ignore_case=True).to_pylist()
    found = []
    for problem, rows in by_problem.items():
        own = [place for place, row in enumerate(rows) if has_text[row]]
        if own:
            references = table["references"][rows[0]].as_py()
            found.append(
                FoundAnswers(
                    step=step,
                    problem=problem,
                    question=table["question"][rows[0]].as_py()[:MAX_QUESTION],
                    reference=references[0] if references else "",
                    total=len(rows),
                    num_answers=len(own),
                    leaf=own[0],
                    verdict=table["verdict"][rows[own[0]]].as_py(),
                    passage=_passage(answers[rows[own[0]]].as_py(), text),
                )
            )
    return found


def _found(batch: pa.RecordBatch, ticket: int, text: str, count: int, first: int | None) -> Found:
    """`first` is the place of the first answer that has the text among all of the batch."""
    if first is None:
        nowhere = Passage(before="", text="", after="")
        return Found(ticket=ticket, num_answers=0, leaf=0, passage=nowhere)
    return Found(
        ticket=ticket,
        num_answers=count,
        leaf=batch.column("leaf").flatten()[first].as_py(),
        passage=_passage(batch.column("leaf_text").flatten()[first].as_py(), text),
    )


def _passage(answer: str, text: str) -> Passage:
    match = re.search(re.escape(text), answer, re.IGNORECASE)
    start, end = match.span() if match else (0, 0)  # where the two differ in what a case is
    return Passage(
        before=answer[max(0, start - BEFORE) : start],
        text=answer[start:end],
        after=answer[end : end + AFTER],
    )
