"""Verdict: what became of an answer, and its reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Verdict(StrEnum):
    """What became of a leaf's answer."""

    CORRECT = "correct"
    """The whole reward: 1."""
    PARTIAL = "partial"
    """A reward between 0 and 1, which stands beside the verdict."""
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
        """1 for a correct answer, else 0; means nothing for PARTIAL and unless `is_reward`."""
        return float(self is Verdict.CORRECT)


class Grade(NamedTuple):
    """Verdict and reward of an answer."""

    verdict: Verdict
    reward: float
    """From 0 to 1; NaN without a reward."""

    @classmethod
    def of(cls, reward: bool | float | None, *, is_cut_off: bool) -> "Grade":
        """What a check returned, as a grade; None: the text holds no answer."""
        if reward is None:
            return cls(Verdict.CUT_OFF if is_cut_off else Verdict.UNANSWERED, 0.0)
        verdict = {0.0: Verdict.WRONG, 1.0: Verdict.CORRECT}.get(reward, Verdict.PARTIAL)
        return cls(verdict, float(reward))

    @classmethod
    def without_reward(cls, verdict: Verdict) -> "Grade":
        """Of an answer about which the verdict says nothing."""
        return cls(verdict, math.nan)


def weighted(grades: Sequence[Grade], weights: Sequence[float]) -> Grade:
    """One grade of those that several checks gave to an answer: their weighted mean.

    Where one could not tell, there is none. 0 has the verdict of the first check.
    """
    for grade in grades:
        if not grade.verdict.is_reward:
            return grade
    # Both sums are rounded alike, so that 1 from every check is 1, whatever the weights.
    reward = sum(w * g.reward for w, g in zip(weights, grades, strict=True)) / sum(weights)
    return grades[0] if not reward else Grade.of(reward, is_cut_off=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A leaf's text with what it is graded by."""

    text: str
    references: tuple[str, ...]
    """Answers of the data set, any of which makes it correct."""
    is_cut_off: bool
    """Whether the length limit ended the text."""
    question: str = ""
    row: str = "{}"
    """Row of the data set, as JSON."""
