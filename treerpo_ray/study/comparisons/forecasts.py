"""Forecasts: the tokens that the fork rule predicts an arm to need, beside those that it needed.

The rule (`treerpo_ray.algo.forks.rule`) is of forks (1, .., 1, N, 1, .., 1) against single answers:
tokens to gradients of the same variance, both with a baseline that is no part of the batch. Its
partner is therefore the arm of single answers with the same advantage form, or else the one with
`past_baseline` (REINFORCE), which is the very gradient that is measured: not the best flat arm,
whose form may be worth more than any shape. Of several, with other learning rates, it is the best.
What is left between an arm and REINFORCE is then the arm's form too.

Predicted is the mean over the measurements of a run, each at the N that its trees have then, in the
mean over seeds; realised is the `TokenRatio` to the partner's level. The two are the same only
where the noise of gradients is what learning waits for, at the same rate and number of tokens a
learner step. Of an adaptive run the N is that which the same measurement chose, so that its share
is a little low, and the steps that measure are in what was realised alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from treerpo_ray.algo.forks.rule import Fork
from treerpo_ray.metrics.fork_lines import ForkLine, fork_lines, shape_of
from treerpo_ray.metrics.rows import Row
from treerpo_ray.study.comparisons.comparison import Comparison, Result
from treerpo_ray.study.comparisons.curves import is_chosen_mix, of_arm
from treerpo_ray.study.comparisons.intervals import Interval, mean_interval
from treerpo_ray.study.comparisons.report import without_nan
from treerpo_ray.study.comparisons.token_ratios import TokenRatio, token_ratio

TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
"""Ratios that axes are marked at."""
MARGIN = 1.25
"""Factor between what is drawn and the ends of the axes."""
MARKERS = "osDvPX*<>"
"""Of the arms of a setting, one after the other."""
LEGEND_COLUMNS, LEGEND_ROW = 2, 0.18
"""Entries side by side below the axes, and height (inches) of a row of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One arm in one setting."""

    setting: str
    arm: str
    partner: str
    """The arm of single answers that both numbers are relative to."""
    predicted: Interval
    """Share of the tokens of single answers; over seeds, of one seed by its standard error."""
    realised: TokenRatio


def forecasts(comparison: Comparison, results: list[Result]) -> list[Forecast]:
    """Of each arm that grows single forks, or adapts, has measured them and has a partner."""
    found = []
    for setting in comparison.settings:
        here = [result for result in results if result.trial.setting == setting]
        for arm in comparison.arms:
            own = [result for result in of_arm(here, setting, arm) if not result.is_flat]
            predicted, partner = _predicted(own), _partner(own, here)
            realised = token_ratio(own, partner)
            if predicted is not None and realised is not None:
                forecast = Forecast(
                    setting=setting,
                    arm=arm,
                    partner=realised.flat,
                    predicted=predicted,
                    realised=realised,
                )
                found.append(forecast)
    return found


def share_at(line: ForkLine, num_children: int) -> tuple[float, float]:
    """Tokens that trees [1, num_children] need over those of single answers, and the error of it.

    It is that of the line, at the line's own number, of the share of variance within prefixes, in
    which a token share is linear: that of the tokens before and behind the cut is left out.
    """
    if num_children == 1:
        return 1.0, 0.0
    within = min(max(line.within, 0.0), 1.0)
    fork = Fork(within=within, between=1 - within, before=line.before, after=line.after)

    def slope(number: int) -> float:
        return (1 - 1 / number) * (line.before + number * line.after)

    error = line.token_share_se * slope(num_children) / slope(line.children)
    return fork.token_share(num_children), error


def _predicted(own: list[Result]) -> Interval | None:
    """Mean over seeds; None where no run has measured the forks that it grew."""
    runs = [np.mean(shares, axis=0) for result in own if (shares := _shares(result))]
    if not runs:
        return None
    shares, errors = np.stack(runs, axis=1)
    if len(runs) > 1:
        return mean_interval(shares)
    share, half = float(shares[0]), 1.96 * float(errors[0])
    return Interval(mean=share, low=share - half, high=share + half)


def _shares(result: Result) -> list[tuple[float, float]]:
    """Token share and standard error of the trees that a run grew, as each measurement has it."""
    found = []
    for row in result.forks:
        shape = _shape(row, result)
        forked = [depth for depth, number in enumerate(shape) if number > 1]
        lines = {line.depth: line for line in fork_lines(row)}
        if not forked:
            found.append((1.0, 0.0))
        elif len(forked) == 1 and forked[0] in lines:
            found.append(share_at(lines[forked[0]], shape[forked[0]]))
    return found


def _shape(row: Row, result: Result) -> tuple[int, ...]:
    """What trees had from the row on: what an adaptive run chose by it, or what was set."""
    own = tuple(result.num_children)
    return shape_of(row, own) if result.is_adaptive else own


def _partner(own: list[Result], here: list[Result]) -> list[Result]:
    """The runs of the arm of single answers that an arm is held against; none if there is none."""
    if not own:
        return []
    arms: dict[str, list[Result]] = {}
    for result in here:
        is_single = result.is_flat and result.num_children[0] == 1
        if is_single and not is_chosen_mix(result):
            arms.setdefault(result.trial.arm, []).append(result)
    for form in (_form(own[0]), "PAST_BASELINE"):
        if alike := [runs for runs in arms.values() if _form(runs[0]) == form]:
            return max(alike, key=lambda runs: np.mean([run.after.pass_at_1 for run in runs]))
    return []


def _form(result: Result) -> object:
    return result.settings["learner.advantage"]


# Files and plot ----------------------------------------------------------------------------------


def write_forecasts(found: Sequence[Forecast], folder: Path) -> None:
    """Write `ratio.json` and `ratio.png`, if there is something to write."""
    if not found:
        return
    points = [without_nan(asdict(each)) for each in found]
    (folder / "ratio.json").write_text(json.dumps(points, indent=1, allow_nan=False) + "\n")
    plot_forecasts(found).savefig(folder / "ratio.png", dpi=110)


def plot_forecasts(found: Sequence[Forecast]) -> Figure:
    """Predicted against realised token ratio, a point a setting and arm; as predicted is what lies
    on the diagonal, and below 1 what needed fewer tokens. An arrow up is a lower bound."""
    num_rows = -(-len(found) // LEGEND_COLUMNS)
    figure = Figure(figsize=(6.5, 6.2 + LEGEND_ROW * num_rows), layout="compressed")
    axes = figure.subplots()
    settings = list(dict.fromkeys(each.setting for each in found))
    numbers = dict.fromkeys(settings, 0)
    for each in found:  # a colour a setting, a marker an arm of it
        marker = MARKERS[numbers[each.setting] % len(MARKERS)]
        numbers[each.setting] += 1
        color = f"C{settings.index(each.setting)}"
        _draw(axes, each, color, "^" if each.realised.is_bound else marker)
    low, high = _limits(found)
    axes.plot([low, high], [low, high], color="0.6", linewidth=1, linestyle="--", zorder=0)
    for line in (axes.axhline, axes.axvline):
        line(1, color="0.8", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("predicted: tokens over those of single answers, by measured variances")
    axes.set_ylabel("realised: tokens to the same training reward, over theirs")
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    return figure


def _draw(axes: Axes, each: Forecast, color: str, marker: str) -> None:
    own, ratio = each.predicted, each.realised.ratio
    label = f"{each.setting}: {each.arm} over {each.partner}"
    axes.plot(own.mean, ratio.mean, marker, color=color, label=label)
    axes.plot([own.low, own.high], [ratio.mean] * 2, color=color, alpha=0.6)
    axes.plot([own.mean] * 2, [ratio.low, ratio.high], color=color, alpha=0.6)


def _limits(found: Sequence[Forecast]) -> tuple[float, float]:
    """Ends of both axes: around all means and 1, and of intervals as far as the ticks go."""
    intervals = [interval for each in found for interval in (each.predicted, each.realised.ratio)]
    means = [1.0, *(interval.mean for interval in intervals)]
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    drawn = [*means, *(end for end in ends if TICKS[0] <= end <= TICKS[-1])]
    return min(drawn) / MARGIN, max(drawn) * MARGIN
