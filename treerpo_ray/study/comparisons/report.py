"""Report: what the results that a comparison has so far come to."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from treerpo_ray.study.comparisons.comparison import Comparison, Result
from treerpo_ray.study.comparisons.curves import is_chosen_mix, of_arm, places, rewards, total
from treerpo_ray.study.comparisons.intervals import Interval, difference_interval, mean_interval
from treerpo_ray.study.comparisons.lengths import HalfwayLength, halfway_length
from treerpo_ray.study.comparisons.pairs import Pair, pairs
from treerpo_ray.study.comparisons.token_ratios import TokenRatio, token_ratio
from treerpo_ray.study.plots import KEPT, figure_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One arm in one setting; shares in percent, differences in points."""

    setting: str
    arm: str
    is_flat: bool
    """Whether its answers share nothing but the prompt."""
    num_seeds: int
    num_steps: float
    """Learner steps of a run, mean over seeds."""
    sampled_tokens: float
    start: float
    pass_at_1: Interval
    pass_at_k: Interval
    """Of the k answers that the problems were sampled; NaN where k is 1."""
    ahead: dict[str, Interval]
    """Pass@1 less that of each other reference arm (Welch), at the same sampled tokens."""
    same_steps: Interval
    """Training reward after as many learner steps as the arm with the fewest made; NaN for an arm
    that chooses what it trains on, which does not count among them."""
    length: Interval
    """Tokens of a held-out answer."""
    halfway: HalfwayLength | None
    """Tokens of an answer where the arm is as good as the best flat arm half-way, over those of
    each other reference arm; None without such an arm, where it is never so good, and for one that
    chooses what it trains on."""
    token_ratio: TokenRatio | None
    """Tokens to nine tenths of the last training reward of the best flat arm, over that arm's; None
    without such an arm, and for one that chooses what it trains on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Table of a comparison."""

    references: list[str]
    lines: list[Line]
    sampling: str
    """How the held-out answers were sampled."""
    num_samples: list[int]
    """Answers a held-out problem, the k of pass@k; several where results differ."""
    best_flat: dict[str, str]
    """By setting the flat arm with the highest mean Pass@1, of those that take prompts as they
    come. It is chosen by the very results that it is compared in, which favours it."""
    pairs: list[Pair]

    def write(self, folder: Path) -> None:
        """Write the table as JSON, in which an unknown number is null."""
        table = without_nan(asdict(self))
        (folder / "table.json").write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")

    def frame(self) -> pd.DataFrame:
        """The table with a row an arm, numbers and intervals in columns."""
        columns = [
            {
                "setting": line.setting,
                "arm": line.arm,
                "seeds": line.num_seeds,
                "tokens": round(line.sampled_tokens),
                "steps": round(line.num_steps),
                "Pass@1": str(line.pass_at_1),
                **{f"ahead of {name}": str(line.ahead.get(name, "")) for name in self.references},
                "same steps": str(line.same_steps),
                "length": str(line.length),
                "length half-way": "" if line.halfway is None else str(line.halfway.tokens),
                "pass@k": str(line.pass_at_k),
                "tokens over the best flat's": str(line.token_ratio or ""),
            }
            for line in self.lines
        ]
        return pd.DataFrame(columns).set_index(["setting", "arm"])


def without_nan(node: object) -> object:
    """What JSON can hold: an unknown number is null."""
    if isinstance(node, dict):
        return {name: without_nan(value) for name, value in node.items()}
    if isinstance(node, list):
        return [without_nan(value) for value in node]
    return None if isinstance(node, float) and np.isnan(node) else node


def report(comparison: Comparison, results: list[Result]) -> Report:
    """Means, intervals and differences by setting and arm."""
    lines, best_flat = [], {}
    for setting in comparison.settings:
        here = [result for result in results if result.trial.setting == setting]
        best = _best_flat(here, setting, comparison)
        if best:
            best_flat[setting] = best[0].trial.arm
        for arm in comparison.arms:
            if own := of_arm(here, setting, arm):
                others = {
                    reference: of_arm(here, setting, reference)
                    for reference in comparison.references
                    if reference != arm
                }
                lines.append(_line(own, others, here, best))
    return Report(
        references=comparison.references,
        lines=lines,
        sampling="; or ".join(sorted({result.after.sampling for result in results})),
        num_samples=sorted({result.after.num_samples for result in results}),
        best_flat=best_flat,
        pairs=pairs(comparison, results),
    )


def _best_flat(here: list[Result], setting: str, comparison: Comparison) -> list[Result]:
    fair = [result for result in here if result.is_flat and not is_chosen_mix(result)]
    arms = [own for arm in comparison.arms if (own := of_arm(fair, setting, arm))]
    return max(arms, key=lambda own: _percent(own).mean(), default=[])


def _line(
    own: list[Result],
    others: dict[str, list[Result]],
    here: list[Result],
    best_flat: list[Result],
) -> Line:
    passed = _percent(own)
    any_of = [each.after.pass_at_k if each.after.num_samples > 1 else None for each in own]
    return Line(
        setting=own[0].trial.setting,
        arm=own[0].trial.arm,
        is_flat=own[0].is_flat,
        num_seeds=len(own),
        num_steps=float(np.mean([len(result.curve["step"]) for result in own])),
        sampled_tokens=float(np.mean([sum(r.curve["tokens/sampled"]) for r in own])),
        start=100 * own[0].before.pass_at_1,
        pass_at_1=mean_interval(passed),
        pass_at_k=mean_interval(100 * np.array(any_of, np.float64)),
        ahead={
            name: difference_interval(passed, _percent(theirs)) for name, theirs in others.items()
        },
        same_steps=mean_interval(_rewards_at_fewest_steps(own, here)),
        length=mean_interval(np.array([result.after.length for result in own])),
        halfway=halfway_length(own, others, best_flat),
        token_ratio=token_ratio(own, best_flat),
    )


def plot_intervals(table: Report) -> Figure:
    """Pass@1 of each arm with its interval, a panel a setting, the best arm above."""
    settings = list(dict.fromkeys(line.setting for line in table.lines))
    most = max(sum(line.setting == setting for line in table.lines) for setting in settings)
    height = 0.28 * most + 0.7
    figure, panels = figure_grid(len(settings), num_columns=min(len(settings), 2), height=height)
    for axes, setting in zip(panels, settings, strict=True):
        lines = [line for line in table.lines if line.setting == setting]
        lines.sort(key=lambda line: line.pass_at_1.mean)
        for row, line in enumerate(lines):
            own = line.pass_at_1
            if not np.isnan(own.low):
                axes.plot([own.low, own.high], [row, row], color=KEPT, linewidth=2, alpha=0.5)
            axes.plot(own.mean, row, "o", color=KEPT)
        axes.set_yticks(range(len(lines)), [f"{each.arm} ({each.num_seeds})" for each in lines])
        axes.set_xlabel("Pass@1 in % (seeds in brackets)", fontsize=8)
        axes.set_title(setting, loc="left", fontsize=10)
    return figure


def _rewards_at_fewest_steps(own: list[Result], here: list[Result]) -> Float[np.ndarray, " seeds"]:
    """Training reward in percent where the run with the fewest steps in its setting ended."""
    if any(map(is_chosen_mix, own)):
        return np.full(len(own), np.nan)
    least = min(total(result, "step") for result in here if not is_chosen_mix(result))
    return np.array(
        [100 * np.interp(least, places(result, "step"), rewards(result)) for result in own]
    )


def _percent(results: list[Result]) -> Float[np.ndarray, " seeds"]:
    return np.array([100 * result.after.pass_at_1 for result in results])
