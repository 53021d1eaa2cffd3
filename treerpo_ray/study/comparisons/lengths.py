"""Lengths at equal reward: tokens of an arm's answers while it is as good as the others are.

At the end of a run an arm that is better is often shorter, too, since what makes answers wrong
makes them long. So answers are held against each other where arms are equally good and all still
learn: where the training reward of an arm (`ArmCurve`) is first half-way between the first and the
last tenth of the best flat arm's. It is the length in training, of the tenth of a run's tokens
around that place, in the mean over learner steps.

Intervals are a jackknife's over seeds, of ratios as those of tokens are; the flat arm that makes
the level is taken as it is.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float

from treerpo_ray.study.comparisons.comparison import Result
from treerpo_ray.study.comparisons.curves import is_fair
from treerpo_ray.study.comparisons.intervals import Interval, jackknife_interval, ratio_interval
from treerpo_ray.study.comparisons.token_ratios import ArmCurve, each_left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfwayLength:
    """Tokens of an arm's answers where it is half-way to the best flat arm's last reward."""

    level: float
    """The training reward there, in percent."""
    tokens: Interval
    """Of an answer."""
    over: dict[str, Interval]
    """Their ratio to those of each other reference arm that gets there."""


def halfway_length(
    own: list[Result], others: dict[str, list[Result]], flat: list[Result]
) -> HalfwayLength | None:
    """The length of an arm's answers, and over those of others, all in one setting.

    None where the arm does not get there, or either has no run, or chooses what it trains on, which
    makes its rewards no fair sample. Other arms of which that is so are left out.

    Args:
        own: Results of the arm.
        others: Of other arms, by name.
        flat: Of the best flat arm.
    """
    if not (is_fair(own) and is_fair(flat)):
        return None
    level = ArmCurve.of(flat).halfway
    if not (ours := _ArmLength.at(own, level)).is_there:
        return None
    over: dict[str, Interval] = {}
    for name, results in others.items():
        if not is_fair(results):
            continue
        theirs = _ArmLength.at(results, level)
        if theirs.is_there:
            over[name] = ratio_interval(
                np.log(ours.tokens / theirs.tokens),
                np.log(ours.without / theirs.tokens),
                np.log(ours.tokens / theirs.without),
            )
    return HalfwayLength(
        level=100 * level, tokens=jackknife_interval(ours.tokens, ours.without), over=over
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ArmLength:
    """Tokens of an arm's answers where it is at a level."""

    is_there: bool
    """Whether it ever is; else they are those at its end."""
    tokens: float
    without: Float[np.ndarray, " seeds"]
    """Without each seed in turn; none where there is one alone."""

    @classmethod
    def at(cls, results: list[Result], level: float) -> Self:
        curve = ArmCurve.of(results)
        return cls(
            is_there=curve.tokens_to(level) is not None,
            tokens=curve.length_at(level),
            without=np.array([rest.length_at(level) for rest in each_left_out(results)]),
        )
