"""Comparison curves: training reward over learner steps, sampled tokens and time."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from treerpo_ray.study.comparisons.comparison import Comparison, Result

LEGEND_LINE = 0.16
"""Height (inches) of an arm's line in the legend."""
STYLES = ("-", "--", ":", "-.")
"""Of the first ten arms, the next and so on: there are ten colours."""
GRID_POINTS = 40
"""Points of a plotted curve."""
WINDOW_TOKENS = 12_000
"""Sampled tokens, the last of them its own, over which a step's training reward is the mean."""
MIN_PLOTTED = 3
"""Fewest seeds of an arm that is plotted."""
AXES = {"learner steps": "step", "sampled tokens": "tokens/sampled"}
"""Horizontal axes and the metric that each adds up. Time is none of them: on machines that other
work shares it differs more between sessions, CPU time too, than between methods."""


Point = tuple[str, str, str, str, str, str]
"""Setting, arm, axis, place on it, reward and half of its interval."""


def plot_comparison(
    comparison: Comparison, results: list[Result]
) -> tuple[Figure, list[Point]] | None:
    """Training reward of each arm against learner steps and tokens, and all its points.

    Drawn are the arms that have `MIN_PLOTTED` seeds, or the most. Arms that choose what they
    train on are left out; None if there is no other.
    """
    results = [result for result in results if not is_chosen_mix(result)]
    if not results:
        return None
    settings = [s for s in comparison.settings if any(r.trial.setting == s for r in results)]
    height = max(3.2 * len(settings), LEGEND_LINE * len(comparison.arms))
    figure = Figure(figsize=(10.5, height), layout="constrained")
    grid = figure.subplots(len(settings), len(AXES), squeeze=False)
    rows: list[Point] = []
    for axes_row, setting in zip(grid, settings, strict=True):
        by_arm = {arm: of_arm(results, setting, arm) for arm in comparison.arms}
        for axes, (title, metric) in zip(axes_row, AXES.items(), strict=True):
            for arm, points in _draw(axes, by_arm, metric).items():
                rows += [
                    (setting, arm, title, f"{at:.5g}", f"{reward:.5g}", f"{half:.5g}")
                    for at, reward, half in points
                ]
            axes.set_xlabel(title)
        axes_row[0].set_ylabel(f"{setting}: training reward")
    lines = {str(line.get_label()): line for axes in grid[:, 0] for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=7)
    return figure, rows


def write_plot(comparison: Comparison, results: list[Result], folder: Path) -> None:
    """Write what `plot_comparison` gives, if anything, as `curves.png` and `curves.csv`."""
    drawn = plot_comparison(comparison, results)
    if drawn is None:
        return
    figure, rows = drawn
    figure.savefig(folder / "curves.png", dpi=110)
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "arm", "axis", "at", "reward", "half_interval"])
        writer.writerows(rows)


def _draw(
    axes: Axes, by_arm: dict[str, list[Result]], metric: str
) -> dict[str, Float[np.ndarray, "at 3"]]:
    """Draw the arms over one axis; returns place, mean and half interval of each, drawn or not."""
    most = max(map(len, by_arm.values()))
    curves = {}
    for number, (arm, own) in enumerate(by_arm.items()):
        if not own:
            continue
        curves[arm] = _curve(own, metric)
        if len(own) >= min(MIN_PLOTTED, most):
            at, mean, half = curves[arm].T
            color = f"C{number}"  # the same in every setting, and again after ten
            style = STYLES[number // 10 % len(STYLES)]
            axes.plot(at, mean, style, label=arm, linewidth=1.4, color=color)
            axes.fill_between(at, mean - half, mean + half, alpha=0.15, color=color)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    return curves


def _curve(results: list[Result], metric: str) -> Float[np.ndarray, "at 3"]:
    """Places, mean reward there and half of its 95 % interval, as far as all seeds go."""
    ats = [places(result, metric) for result in results]
    grid = np.linspace(max(at[0] for at in ats), min(at[-1] for at in ats), GRID_POINTS)
    found = np.stack([np.interp(grid, at, rewards(r)) for at, r in zip(ats, results, strict=True)])
    half = np.full(GRID_POINTS, np.nan)
    if (count := len(results)) > 1:
        half = stats.t.ppf(0.975, count - 1) * found.std(0, ddof=1) / count**0.5
    return np.stack([grid, found.mean(0), half], axis=1)


def places(result: Result, metric: str) -> Float[np.ndarray, " steps"]:
    """Where each learner step of a run ends on the axis of a metric; NaN without the metric."""
    values = np.array(result.curve[metric] or [np.nan] * len(result.curve["step"]))
    return values if metric == "step" else np.cumsum(values)


def total(result: Result, metric: str) -> float:
    """Where a run ends on the axis of a metric."""
    return float(places(result, metric)[-1])


def rewards(result: Result) -> Float[np.ndarray, " steps"]:
    """Training reward over the last tokens at each step: no run is judged by what came after.

    The same tokens for all arms: in steps, a run of few large ones would be judged by its past.
    """
    found, ends = np.array(result.curve["reward/mean"]), places(result, "tokens/sampled")
    firsts = np.searchsorted(ends, ends - WINDOW_TOKENS, side="right")
    return np.array([found[first : i + 1].mean() for i, first in enumerate(firsts)])


def is_chosen_mix(result: Result) -> bool:
    """Whether the run refilled, so that its reward is of no fair sample."""
    return bool(result.settings.get("gate.max_redraws"))


def is_fair(results: list[Result]) -> bool:
    """Whether there are runs, and the rewards of all are of a fair sample."""
    return bool(results) and not any(map(is_chosen_mix, results))


def of_arm(results: list[Result], setting: str, arm: str) -> list[Result]:
    """The results of one arm in one setting."""
    return [r for r in results if r.trial.setting == setting and r.trial.arm == arm]
