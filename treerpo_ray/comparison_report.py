"""Comparison report: table and plot of the results that a comparison has so far."""

import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import rich.console
import rich.table
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from omegaconf import OmegaConf
from scipy import stats

from treerpo_ray.comparison import Comparison, Result

GRID_POINTS = 40
"""Points of a plotted curve."""
WINDOW_TOKENS = 12_000
"""Sampled tokens, the last of them its own, over which a step's training reward is the mean."""
MIN_PLOTTED = 3
"""Fewest seeds of an arm that is plotted."""
CPU = "time/cpu_s"
"""Its sum is the time axis: wall time says little on a machine that other work shares."""


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
    num_steps: int
    sampled_tokens: float
    cpu_s: float
    """CPU time of engines and learner in the learner steps; NaN if a result has none."""
    start: float
    pass_at_1: Interval
    ahead: dict[str, Interval]
    """Pass@1 less that of each other reference arm (Welch), at the same sampled tokens."""
    same_steps: Interval
    """Training reward after as many learner steps as the arm with the fewest made; NaN for an arm
    that chooses what it trains on, which does not count among them."""
    same_cpu: Interval
    """Training reward after the CPU time of the run that took least; NaN as above."""
    length: Interval
    """Tokens of a held-out answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Table of a comparison."""

    references: list[str]
    lines: list[Line]

    def write(self, folder: Path) -> None:
        """Write the table as JSON, in which an unknown number is null."""
        table = _without_nan(asdict(self))
        (folder / "table.json").write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")


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
            if own := _of(here, setting, arm):
                others = {
                    reference: _percent(_of(here, setting, reference))
                    for reference in comparison.references
                    if reference != arm
                }
                lines.append(_line(own, others, here))
    return Report(references=comparison.references, lines=lines)


def _line(
    own: list[Result], others: dict[str, Float[np.ndarray, " seeds"]], here: list[Result]
) -> Line:
    passed = _percent(own)
    return Line(
        setting=own[0].trial.setting,
        arm=own[0].trial.arm,
        num_seeds=len(own),
        num_steps=len(own[0].curve["step"]),
        sampled_tokens=float(np.mean([sum(r.curve["tokens/sampled"]) for r in own])),
        cpu_s=float(np.mean([_total(result, CPU) for result in own])),
        start=100 * own[0].before.pass_at_1,
        pass_at_1=mean_interval(passed),
        ahead={name: difference_interval(passed, theirs) for name, theirs in others.items()},
        same_steps=mean_interval(_rewards_at_least(own, here, "step")),
        same_cpu=mean_interval(_rewards_at_least(own, here, CPU)),
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


def print_table(table: Report) -> None:
    """Print the table to stdout."""
    shown = rich.table.Table(title="Pass@1 in %, mean over seeds [95 %]")
    for title in (
        "setting",
        "arm",
        "seeds",
        "steps",
        "tokens",
        "CPU",
        "Pass@1",
        *(f"ahead of {name}" for name in table.references),
        "same steps",
        "same CPU",
        "length",
    ):
        shown.add_column(title, justify="left" if title in ("setting", "arm") else "right")
    for line in table.lines:
        shown.add_row(
            line.setting,
            line.arm,
            str(line.num_seeds),
            str(line.num_steps),
            f"{line.sampled_tokens / 1000:.0f} k",
            f"{line.cpu_s:.0f} s",
            str(line.pass_at_1),
            *(str(line.ahead.get(name, "")) for name in table.references),
            str(line.same_steps),
            str(line.same_cpu),
            f"{line.length.mean:.1f}",
        )
    rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(shown)


def write_plot(comparison: Comparison, results: list[Result], folder: Path) -> None:
    """Training reward of each arm against learner steps, tokens and time: `curves.csv`.

    `curves.png` draws the arms that have `MIN_PLOTTED` seeds there, or the most. Arms that choose
    what they train on are left out of both.
    """
    results = [result for result in results if not _is_chosen_mix(result)]
    if not results:
        return
    settings = [s for s in comparison.settings if any(r.trial.setting == s for r in results)]
    figure = Figure(figsize=(12, 3.2 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), 3, squeeze=False)
    rows: list[tuple[str, str, str, float, float, float]] = []
    for axes_row, setting in zip(grid, settings, strict=True):
        most = max(len(_of(results, setting, arm)) for arm in comparison.arms)
        for axes, (title, metric) in zip(axes_row, AXES.items(), strict=True):
            for number, arm in enumerate(comparison.arms):
                if own := _of(results, setting, arm):
                    at, mean, half = _curve(own, metric)
                    if len(own) >= min(MIN_PLOTTED, most):
                        color = f"C{number}"  # the same in every setting
                        axes.plot(at, mean, label=arm, linewidth=1.4, color=color)
                        axes.fill_between(at, mean - half, mean + half, alpha=0.15, color=color)
                    rows += [
                        (setting, arm, title, *point) for point in zip(at, mean, half, strict=True)
                    ]
            axes.set_xlabel(title)
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(f"{setting}: training reward")
        if axes_row[0].lines:
            axes_row[0].legend(fontsize=7)
    figure.savefig(folder / "curves.png", dpi=110)
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "arm", "axis", "at", "reward", "half_interval"])
        writer.writerows((*row[:3], *(f"{value:.5g}" for value in row[3:])) for row in rows)


AXES = {
    "learner steps": "step",
    "sampled tokens": "tokens/sampled",
    "CPU seconds of engine and learner": CPU,
}
"""Horizontal axes and the metric that each adds up."""


def _curve(
    results: list[Result], metric: str
) -> tuple[Float[np.ndarray, " at"], Float[np.ndarray, " at"], Float[np.ndarray, " at"]]:
    """Places, mean reward there and half of its 95 % interval, as far as all seeds go."""
    ats = [_places(result, metric) for result in results]
    grid = np.linspace(max(at[0] for at in ats), min(at[-1] for at in ats), GRID_POINTS)
    rewards = np.stack(
        [np.interp(grid, at, _smooth(r)) for at, r in zip(ats, results, strict=True)]
    )
    half = np.full(GRID_POINTS, np.nan)
    if (count := len(results)) > 1:
        half = stats.t.ppf(0.975, count - 1) * rewards.std(0, ddof=1) / count**0.5
    return grid, rewards.mean(0), half


def _places(result: Result, metric: str) -> Float[np.ndarray, " steps"]:
    values = np.array(result.curve[metric] or [np.nan] * len(result.curve["step"]))
    return values if metric == "step" else np.cumsum(values)


def _total(result: Result, metric: str) -> float:
    return float(_places(result, metric)[-1])


def _smooth(result: Result) -> Float[np.ndarray, " steps"]:
    """Training reward over the last tokens at each step: no run is judged by what came after.

    The same tokens for all arms: in steps, a run of few large ones would be judged by its past.
    """
    rewards, ends = np.array(result.curve["reward/mean"]), _places(result, "tokens/sampled")
    firsts = np.searchsorted(ends, ends - WINDOW_TOKENS, side="right")
    return np.array([rewards[first : i + 1].mean() for i, first in enumerate(firsts)])


def _is_chosen_mix(result: Result) -> bool:
    """Whether the run refilled or came back to prompts, so that its reward is of no fair sample."""
    config = OmegaConf.create(result.config)
    return any(OmegaConf.select(config, f"gate.{key}") for key in ("max_redraws", "revisit"))


def _rewards_at_least(
    own: list[Result], here: list[Result], metric: str
) -> Float[np.ndarray, " seeds"]:
    """Training reward in percent where the run with the least of `metric` in its setting ended."""
    if any(map(_is_chosen_mix, own)):
        return np.full(len(own), np.nan)
    least = np.nanmin([_total(result, metric) for result in here if not _is_chosen_mix(result)])
    return np.array(
        [100 * np.interp(least, _places(result, metric), _smooth(result)) for result in own]
    )


def _of(results: list[Result], setting: str, arm: str) -> list[Result]:
    return [r for r in results if r.trial.setting == setting and r.trial.arm == arm]


def _percent(results: list[Result]) -> Float[np.ndarray, " seeds"]:
    return np.array([100 * result.after.pass_at_1 for result in results])
