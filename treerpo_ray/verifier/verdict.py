"""Verdict: what became of an answer."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What became of a leaf's answer."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNANSWERED = "unanswered"
    """The text is finished and holds no answer."""
    CUT_OFF = "cut_off"
    """The length limit cut the text before it held an answer."""
    TIMED_OUT = "timed_out"
    ERRORED = "errored"

    @property
    def is_reward(self) -> bool:
        """Whether the verdict says something about the answer, not about the machinery."""
        return self not in (Verdict.TIMED_OUT, Verdict.ERRORED)

    @property
    def reward(self) -> float:
        """1 for a correct answer, else 0; means nothing unless `is_reward`."""
        return float(self is Verdict.CORRECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A leaf's text and the references, any of which makes it correct."""

    text: str
    references: tuple[str, ...]
    is_cut_off: bool
    """Whether the length limit ended the text."""
