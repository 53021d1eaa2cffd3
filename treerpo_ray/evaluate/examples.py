"""Examples: a right and a wrong answer of an evaluation, for a person to look at."""

import logging
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size

from treerpo_ray.errors import one_line
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict

log = logging.getLogger(__name__)

LABEL = 12
"""Columns before each text."""
CUT = " ... "


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sampled answer with its question, its references and its verdict."""

    question: str
    text: str
    references: tuple[str, ...]
    verdict: Verdict

    def lines(self, width: int) -> list[str]:
        """Question, answer, reference and verdict, each on one line of at most `width` columns.

        Of an answer that is too long its end is kept, too, where its result stands.
        """
        room = max(width - LABEL, len(CUT) + 2)
        texts = {
            self.verdict.value.replace("_", " "): _cut(self.question, room, tail=0.0),
            "  answer": _cut(self.text, room, tail=0.6),
            "  reference": _cut(" or ".join(self.references), room, tail=0.0),
        }
        return [f"{label:{LABEL}}{text}" for label, text in texts.items()]


def examples(folder: RunFolder, name: str) -> list[Example]:
    """The first right answer of the evaluation of that name in the run folder and the first wrong
    one, of another question if there is one; what there is none of is left out."""
    try:
        rows = folder.read_table(f"eval/{name}.parquet").to_pylist()
    except Exception as error:  # of the disk, a store or Parquet; examples stop no run
        log.info("no examples of %s: %s", name, one_line(error))
        return []
    found = [_example(row) for row in rows]
    right = [each for each in found if each.verdict is Verdict.CORRECT][:1]
    wrong = [each for each in found if each.verdict.is_reward and each.verdict.reward < 1]
    asked = [each.question for each in right]
    return right + sorted(wrong, key=lambda each: each.question in asked)[:1]


def _example(row: dict[str, Any]) -> Example:
    return Example(
        question=row["question"],
        text=row["text"],
        references=tuple(row["references"]),
        verdict=Verdict(row["verdict"]),
    )


def _cut(text: str, room: int, *, tail: float) -> str:
    """Text on one line that fits `room` columns, with that share of it kept at its end.

    A model may write anything: what could move the cursor of a terminal is left out.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    plain = "".join(c if c.isprintable() else " " for c in " / ".join(filter(None, lines)))
    if cell_len(plain) <= room:
        return plain
    num_tail = int(tail * (room - len(CUT)))
    num_head = room - len(CUT) - num_tail
    end = set_cell_size(plain[::-1], num_tail)[::-1] if num_tail else ""
    return f"{set_cell_size(plain, num_head)}{CUT}{end}".rstrip()
