"""Columns: what a row has under a name, where a point reaches into it, and texts made of columns.

    question                      a column
    reward_model.ground_truth     a field of a column
    messages.0.content            the same of the first item of a list; -1 is the last

A column whose own name has points comes before what the points would reach.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from treerpo_ray.prompts.chats import has_answer, is_chat

Row = Mapping[str, object]
QUESTION = "question"
"""Name of the question in a template, whatever its column is called."""
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
MOST_SHOWN = 12
"""Names in a message."""
NEAR = 0.7
"""Likeness of names, from 0 to 1, from which on one is taken for a slip of the other."""
USUAL = {
    "question_column": ("problem", "prompt", "query", "input", "instruction"),
    "answer_column": ("solution", "target", "output", "response", "final_answer"),
}
"""What data sets call a column, by the key that names it, the most usual first."""


def top_level(column: str, names: Collection[str]) -> str | None:
    """The one of `names` that a column is or reaches into."""
    parts = column.split(".")
    begins = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((begin for begin in begins if begin in names), None)


def reach(cell: object, column: str) -> object:
    """What a row, or a cell of one, has there.

    Raises:
        LookupError: there is no such place.
    """
    if isinstance(cell, list):
        first, point, rest = column.partition(".")
        if not re.fullmatch(r"-?\d{1,9}", first):
            raise LookupError(column)
        found = cell[int(first)]
    elif isinstance(cell, Mapping) and (name := top_level(column, cell)) is not None:
        found, point, rest = cell[name], column[len(name) : len(name) + 1], column[len(name) + 1 :]
    else:
        raise LookupError(column)
    return reach(found, rest) if point else found


def cell_of(row: Row, column: str) -> object:
    """What a row has there; None where it has no such place."""
    try:
        return reach(row, column)
    except LookupError:
        return None


def has_column(column: str, names: Collection[str], rows: Collection[Row]) -> bool:
    """Whether there is such a column, or a place in one of the rows."""
    if column in names or not rows:
        return top_level(column, names) is not None
    return any(_has_place(row, column) for row in rows)


def unknown_column(
    column: str,
    key: str,
    section: str,
    names: Collection[str],
    sample: Sequence[Row],
    *,
    taken: Collection[str] = (),
) -> str:
    """What is wrong with a column that is not there, and what the data set has instead.

    Args:
        column: As it is given.
        key: The key that gives it.
        section: Where the key stands in the configuration.
        names: Columns of the data set.
        sample: Some rows with all their columns.
        taken: Columns that other keys name, of which none is meant.
    """
    inner = list(dict.fromkeys(path for row in sample for path in _places(row) if "." in path))
    free = [name for name in (*names, *inner) if name not in taken]
    cells = {path: cell_of(row, path) for row in sample for path in _places(row)}
    chats = [path for path, cell in cells.items() if is_chat(cell)]
    near = difflib.get_close_matches(column, free, n=1, cutoff=NEAR)
    if not near and not chats:
        near = [name for name in USUAL.get(key, ()) if name in free]
    hint = f"did you mean {section}.{key}={near[0]}? " if near else ""
    told = f"no column '{column}' ({key}); {hint}columns: {_listed(names)}"
    if key == "question_column" and chats:
        told += f"; {section}.{key}={chats[0]} reads the chats that are there"
    elif inner:
        told += f"; in them: {_listed(inner)}"
    if key == "answer_column" and any(map(has_answer, cells.values())):
        told += f"; {section}.{key}=null takes the assistant's message that ends a chat"
    if section != "prompts":
        told += f" (where {section}.{key} is not given, prompts.{key} holds)"
    return told


def _has_place(row: Row, column: str) -> bool:
    try:
        reach(row, column)
    except LookupError:
        return False
    return True


def _places(cell: object, prefix: str = "") -> Iterator[str]:
    """Columns of a row and all that can be reached in them by names."""
    for name, part in cell.items() if isinstance(cell, Mapping) else ():
        yield f"{prefix}{name}"
        yield from _places(part, f"{prefix}{name}.")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:MOST_SHOWN])
    return shown + (f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else "")


@dataclass(frozen=True, slots=True)
class Template:
    """A text with columns in braces; a brace that is text is doubled, and {} stays as it is."""

    text: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, but for the question."""
        found = (match[1] for match in PLACEHOLDER.finditer(self.text))
        return tuple(dict.fromkeys(name for name in found if name and name != QUESTION))

    def check(self, question_column: str) -> None:
        """Check that it asks the question.

        Raises:
            ValueError: all prompts would be the same but for columns of another kind.
        """
        names = {match[1] for match in PLACEHOLDER.finditer(self.text)}
        if not names & {QUESTION, question_column}:
            raise ValueError(f"has no {{{QUESTION}}}, where the question goes; put it there")

    def fill(self, question: str, row: Row) -> str:
        """The text for one row.

        Raises:
            ValueError: the row has neither text nor a number in a column that is named.
        """

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name is None:
                return match[0][0]
            cell = question if name == QUESTION else cell_of(row, name)
            if isinstance(cell, bool) or not isinstance(cell, str | int | float):
                raise ValueError(f"has neither text nor a number in '{name}' of prompt_template")
            return str(cell)

        return PLACEHOLDER.sub(value, self.text)
