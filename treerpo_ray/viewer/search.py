"""Search: which trees have a text in one of their answers; nothing else of them is read."""

import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from treerpo_ray.records import check_readable
from treerpo_ray.run_folder.files import RunFolder

COLUMNS = ("ticket", "finished_at_s", "leaf", "leaf_text")
BEFORE, AFTER = 50, 110
"""Characters that are shown around what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A tree with the text that was looked for."""

    ticket: int
    num_answers: int
    """Answers that have it."""
    leaf: int
    """The first of them."""
    before: str
    """Of that answer what stands before, ..."""
    text: str
    after: str


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


def _found(batch: pa.RecordBatch, ticket: int, text: str, count: int, first: int | None) -> Found:
    """`first` is the place of the first answer that has the text among all of the batch."""
    if first is None:
        return Found(ticket=ticket, num_answers=0, leaf=0, before="", text="", after="")
    answer = batch.column("leaf_text").flatten()[first].as_py()
    match = re.search(re.escape(text), answer, re.IGNORECASE)
    start, end = match.span() if match else (0, 0)  # where the two differ in what a case is
    return Found(
        ticket=ticket,
        num_answers=count,
        leaf=batch.column("leaf").flatten()[first].as_py(),
        before=answer[max(0, start - BEFORE) : start],
        text=answer[start:end],
        after=answer[end : end + AFTER],
    )
