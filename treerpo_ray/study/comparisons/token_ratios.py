"""Token ratios: sampled tokens that an arm needs to get as far as a flat arm, over the flat arm's.

How far is read off training rewards: a prompt is met about once, so that the mean reward of a
learner step estimates Pass@1 at the sampling temperature, or the mean reward where there is partial
credit. Held-out problems, which are sampled otherwise and at the end alone, have no part in it.

A run is at a level with the tokens from which on its reward stays there: where the isotonic
regression of its reward over learner steps, each with the weight of its tokens, reaches the level.
Its last tenth is one value of these, lest a single good step at the end pass for a level.

- A run of the flat arm needs what it takes it to its own last tenth, which it always reaches.
- The level that a run of the other arm must come to is the mean of these last tenths. One that does
  not get there counts with all its tokens, which are fewer than it would need: the ratio is then a
  lower bound, without an interval.

The interval is that of these seeds at this level, whose own error is not in it.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.optimize import isotonic_regression

from treerpo_ray.study.comparisons.comparison import Result
from treerpo_ray.study.comparisons.curves import is_chosen_mix, places
from treerpo_ray.study.comparisons.intervals import Interval, ratio_interval

LAST = 0.1
"""Share of a run's tokens, those at its end, that tell how far it has come."""
ROUNDING = 1e-9
"""By which a mean may miss a level that it equals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRatio:
    """What an arm needs of a flat arm's tokens to the same training reward."""

    flat: str
    """The flat arm."""
    level: float
    """Its last training reward, in percent."""
    tokens: list[float | None]
    """Sampled tokens of each run of the arm until it is there; None: it never is."""
    flat_tokens: list[float]
    """Of each run of the flat arm until it is where it ends."""
    ratio: Interval
    """Of geometric means over seeds; without bounds of the flat arm itself and of a lower bound."""
    is_bound: bool
    """Whether the ratio is a lower bound, for some run of the arm does not get there."""

    def __str__(self) -> str:
        low, high = self.ratio.low, self.ratio.high
        interval = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return f"{'> ' if self.is_bound else ''}{self.ratio.mean:.2f}{interval}"


def token_ratio(own: list[Result], flat: list[Result]) -> TokenRatio | None:
    """What an arm needs of a flat arm's tokens, both in one setting.

    None where either has no run, or chooses what it trains on, which makes its rewards no fair
    sample.
    """
    if not (own and flat) or any(map(is_chosen_mix, own + flat)):
        return None
    level = float(np.mean([_curve(result)[0][-1] for result in flat]))
    is_itself = own[0].trial.arm == flat[0].trial.arm
    theirs = [_tokens_to_its_end(result) for result in flat]
    ours: list[float | None] = [*theirs]
    if not is_itself:
        ours = [tokens_to(level, result) for result in own]
    counted = ratio_interval(_counted(ours, own), np.array(theirs))
    is_bound = None in ours
    if is_bound or is_itself:
        counted = replace(counted, low=float("nan"), high=float("nan"))
    return TokenRatio(
        flat=flat[0].trial.arm,
        level=100 * level,
        tokens=ours,
        flat_tokens=theirs,
        ratio=counted,
        is_bound=is_bound,
    )


def tokens_to(level: float, result: Result) -> float | None:
    """Sampled tokens of a run from which on its training reward stays at a level or above it; None
    if it never does."""
    values, sizes = _curve(result)
    fit = isotonic_regression(values, weights=sizes).x
    there = np.flatnonzero(fit >= level - ROUNDING)
    return float(sizes.cumsum()[there[0]]) if len(there) else None


def _tokens_to_its_end(result: Result) -> float:
    needed = tokens_to(float(_curve(result)[0][-1]), result)
    assert needed is not None  # the regression ends no lower than the last value
    return needed


def _curve(result: Result) -> tuple[Float[np.ndarray, " at"], Float[np.ndarray, " at"]]:
    """Training rewards and the tokens that each is of: of single steps, and the last tenth's."""
    rewards, ends = np.array(result.curve["reward/mean"]), places(result, "tokens/sampled")
    sizes = np.array(result.curve["tokens/sampled"])
    first = int(np.argmax(ends > (1 - LAST) * ends[-1]))
    last = np.average(rewards[first:], weights=sizes[first:])
    return np.append(rewards[:first], last), np.append(sizes[:first], sizes[first:].sum())


def _counted(tokens: list[float | None], results: list[Result]) -> Float[np.ndarray, " seeds"]:
    """The same numbers, of runs that do not get there all their tokens."""
    ends = [sum(result.curve["tokens/sampled"]) for result in results]
    return np.array([end if own is None else own for own, end in zip(tokens, ends, strict=True)])
