"""Items answer: the share of a question's items whose line is right, each at its own place.

A reference is the right lines, separated by spaces: `38+47=85 52-27=25`. Lines that are no item's
count for nothing, and a line more or less moves all after it from their places.
"""

import re

REFERENCE = re.compile(r"\S+=\S+( \S+=\S+)*")

SELF_TEST: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("38+47=85\n52-27=25", ("38+47=85 52-27=25",), 1.0),
    ("38+47=75\n52-27=25", ("38+47=85 52-27=25",), 0.5),
    ("52-27=25\n38+47=85", ("38+47=85 52-27=25",), 0.0),
    ("38+47=85", ("38+47=85 52-27=25",), 0.5),
    ("85 25", ("38+47=85 52-27=25",), 0.0),
    (" \n", ("38+47=85 52-27=25",), None),
)


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool = False) -> float | None:
    """The largest share of right lines by any reference; None without a finished line.

    Raises:
        ValueError: a reference is no list of lines.
    """
    lines = finished_lines(text, is_cut_off)
    return max(share_right(lines, reference) for reference in references) if lines else None


def find_answer(text: str, is_cut_off: bool = False) -> str | None:
    """The finished lines; None without one."""
    return "\n".join(finished_lines(text, is_cut_off)) or None


def is_answer(reference: str) -> bool:
    """Whether the reference is a list of lines."""
    return REFERENCE.fullmatch(reference) is not None


def finished_lines(text: str, is_cut_off: bool) -> list[str]:
    """Lines without spaces around them, up to the last that is not empty.

    Where the length limit cut the text, its last line may be half a number and doesn't count.
    """
    lines = [line.strip() for line in text.split("\n")[: -1 if is_cut_off else None]]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def share_right(lines: list[str], reference: str) -> float:
    """Share of the reference's lines that stand at their places."""
    if not is_answer(reference):
        raise ValueError(f"reference {reference!r} is not of the form '38+47=85 52-27=25'")
    right = reference.split(" ")
    return sum(a == b for a, b in zip(lines, right, strict=False)) / len(right)
