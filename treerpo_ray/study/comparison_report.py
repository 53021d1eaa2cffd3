"""Comparison report: table of the results that a comparison has so far."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import rich.console
import rich.table
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy import stats

from treerpo_ray.study.comparison import Comparison, Result
from treerpo_ray.study.comparison_curves import is_chosen_mix, of_arm, places, rewards, total
from treerpo_ray.study.plots import KEPT, figure_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t); NaN bounds for one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return "" if np.isnan(self.mean) else f"{self.mean:.1f}"
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One arm in one setting; shares in percent, differences in points."""

    setting: str
    arm: str
    num_seeds: int
    num_steps: float
    """Learner steps of a run, mean over seeds."""
    sampled_tokens: float
    start: float
    pass_at_1: Interval
    ahead: dict[str, Interval]
    """Pass@1 less that of each other reference arm (Welch), at the same sampled tokens."""
    same_steps: Interval
    """Training reward after as many learner steps as the arm with the fewest made; NaN for an arm
    that chooses what it trains on, which does not count among them."""
    length: Interval
    """Tokens of a held-out answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Table of a comparison."""

    references: list[str]
    lines: list[Line]
    sampling: str
    """How the held-out answers were sampled."""

    def write(self, folder: Path) -> None:
        """Write the table as JSON, in which an unknown number is null."""
        table = _without_nan(asdict(self))
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
            }
            for line in self.lines
        ]
        return pd.DataFrame(columns).set_index(["setting", "arm"])


def _without_nan(node: object) -> object:
    if isinstance(node, dict):
        return {name: _without_nan(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_without_nan(value) for value in node]
    return None if isinstance(node, float) and np.isnan(node) else node


def report(comparison: Comparison, results: list[Result]) -> Report:
    """Means, intervals and differences by setting and arm."""
    lines = []
    for setting in comparison.settings:
        here = [result for result in results if result.trial.setting == setting]
        for arm in comparison.arms:
            if own := of_arm(here, setting, arm):
                others = {
                    reference: _percent(of_arm(here, setting, reference))
                    for reference in comparison.references
                    if reference != arm
                }
                lines.append(_line(own, others, here))
    ways = sorted({result.after.sampling for result in results})
    return Report(references=comparison.references, lines=lines, sampling="; or ".join(ways))


def _line(
    own: list[Result], others: dict[str, Float[np.ndarray, " seeds"]], here: list[Result]
) -> Line:
    passed = _percent(own)
    return Line(
        setting=own[0].trial.setting,
        arm=own[0].trial.arm,
        num_seeds=len(own),
        num_steps=float(np.mean([len(result.curve["step"]) for result in own])),
        sampled_tokens=float(np.mean([sum(r.curve["tokens/sampled"]) for r in own])),
        start=100 * own[0].before.pass_at_1,
        pass_at_1=mean_interval(passed),
        ahead={name: difference_interval(passed, theirs) for name, theirs in others.items()},
        same_steps=mean_interval(_rewards_at_fewest_steps(own, here)),
        length=mean_interval(np.array([result.after.length for result in own])),
    )


def mean_interval(values: Float[np.ndarray, " seeds"]) -> Interval:
    """Mean and its 95 % interval by Student's t."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(mean=mean, low=float(mean - half), high=float(mean + half))


def difference_interval(
    ours: Float[np.ndarray, " seeds"], theirs: Float[np.ndarray, " others"]
) -> Interval:
    """Difference of two means and its 95 % interval (Welch's t, unequal variances)."""
    if not len(theirs):
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    mean = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    squares = [values.var(ddof=1) / len(values) for values in (ours, theirs)]
    parts = [
        square**2 / (len(values) - 1)
        for square, values in zip(squares, (ours, theirs), strict=True)
    ]
    freedom = sum(squares) ** 2 / max(sum(parts), np.finfo(float).tiny)
    half = float(stats.t.ppf(0.975, max(freedom, 1.0)) * sum(squares) ** 0.5)
    return Interval(mean=mean, low=mean - half, high=mean + half)


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


def print_table(table: Report) -> None:
    """Print the table to stdout."""
    shown = rich.table.Table(title=f"Pass@1 in % ({table.sampling}), mean over seeds [95 %]")
    for title in (
        "setting",
        "arm",
        "seeds",
        "steps",
        "tokens",
        "Pass@1",
        *(f"ahead of {name}" for name in table.references),
        "same steps",
        "length",
    ):
        shown.add_column(title, justify="left" if title in ("setting", "arm") else "right")
    for line in table.lines:
        shown.add_row(
            line.setting,
            line.arm,
            str(line.num_seeds),
            f"{line.num_steps:.0f}",
            f"{line.sampled_tokens / 1000:.0f} k",
            str(line.pass_at_1),
            *(str(line.ahead.get(name, "")) for name in table.references),
            str(line.same_steps),
            f"{line.length.mean:.1f}",
        )
    rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(shown)


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
