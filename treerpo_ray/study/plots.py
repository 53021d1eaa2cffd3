"""Plots: figures of a whole run; every function gives a new matplotlib Figure."""

import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from treerpo_ray.metrics.events import EVENTS_FILE
from treerpo_ray.study.analysis import NotThere, Run
from treerpo_ray.study.panels import Panel, panels_of

KEPT, PRUNED, GRID = "#2a6f97", "#b8c0c8", "#eceff1"
LINES = (KEPT, "#e08e2b", "#5b8c5a", "#8e5ea2")
WIDTHS = (2.4, 1.5, 1.1)
"""Of the lines of a panel, so that of two with the same values both are seen."""
LEAST_RANGE = 0.1
"""Of an axis, as a share of what stands on it: less is noise, and should look like it."""
MARKED_STEPS = 15
"""A line of at most so many points shows each of them."""


def plot_curves(run: Run) -> Figure:
    """The run's metrics by learner step; metrics that it does not have are left out.

    Raises:
        NotThere: the run has no steps yet.
    """
    metrics = run.metrics()
    panels = panels_of({name: metrics[name].dropna() for name in metrics})
    if not panels:
        raise NotThere(f"{run.folder} has no metrics to draw yet")
    figure, grid = figure_grid(len(panels), num_columns=3)
    for axes, panel in zip(grid, panels, strict=True):
        _draw_panel(axes, panel, metrics)
    figure.supxlabel("learner step", fontsize=9)
    return figure


def plot_kept_by_depth(run: Run) -> Figure:
    """Left the step groups of the whole run by depth, right the share kept by learner step.

    Raises:
        NotThere: the run has no steps yet, or none with step groups.
    """
    metrics = run.metrics()
    kept, pruned = _groups_by_depth(metrics)
    if kept.empty:
        raise NotThere(f"{run.folder} has no metrics groups/kept_depth_... yet")
    figure, (bars, lines) = figure_grid(2, num_columns=2, height=3.0)
    num_kept = kept.sum()
    bars.bar(num_kept.index, num_kept, width=0.6, color=KEPT, label="kept")
    bars.bar(num_kept.index, pruned.sum(), 0.6, bottom=num_kept, color=PRUNED, label="pruned")
    bars.set_title("step groups of the whole run", loc="left", fontsize=10)
    bars.set(xlabel="depth", xticks=num_kept.index)
    bars.legend(frameon=False, fontsize=8)
    share = kept / (kept + pruned)
    for color, depth in zip(LINES, share.columns, strict=False):
        _draw_line(lines, share[depth], color, f"depth {depth}")
    lines.set_title("share of them kept", loc="left", fontsize=10)
    lines.set(xlabel="learner step", ylim=(-0.03, 1.03))
    lines.yaxis.set_major_formatter(PercentFormatter(1))
    lines.legend(frameon=False, fontsize=8)
    return figure


def plot_pool(run: Run) -> Figure:
    """Nodes and engines above, trees in hand below, by the time since the first event (s).

    Raises:
        NotThere: the run has no such events yet.
    """
    events = run.events()
    pool = events[events["kind"] == "pool"]
    if pool.empty:
        raise NotThere(f"{run.folder} has no event pool in its {EVENTS_FILE} yet")
    pool = pool.set_index((pool["time"] - events["time"].iloc[0]).dt.total_seconds())
    pool = pool.assign(engines=pool["serving"] + pool["starting"] + pool["draining"])
    pool = pool.assign(trees=pool["growing"] + pool["waiting"])
    figure, panels = figure_grid(2, num_columns=1, height=2.6)
    shown = (
        ("nodes and engines", {"nodes": "nodes", "engines": "engines", "serving": "serving"}),
        ("trees in hand", {"growing or waiting": "trees", "growing": "growing"}),
    )
    for axes, (title, lines) in zip(panels, shown, strict=True):
        for color, (label, name) in zip(LINES, lines.items(), strict=False):
            axes.step(pool.index, pool[name], where="post", color=color, label=label)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel("seconds", fontsize=9)
    return figure


def plot_bars(heights: Float64[np.ndarray, " bars"], title: str) -> Figure:
    """One bar beside the other, those below zero in another colour."""
    figure, (axes,) = figure_grid(1, num_columns=1, height=2.0)
    colors = [LINES[0] if height >= 0 else LINES[1] for height in heights]
    axes.bar(range(len(heights)), heights, width=0.9, color=colors)
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def figure_grid(
    num_panels: int, num_columns: int, height: float = 2.3
) -> tuple[Figure, list[Axes]]:
    """Axes in rows that are `height` inches high."""
    num_rows = -(-num_panels // num_columns)
    figure = Figure(figsize=(10.5, height * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    for axes in grid[num_panels:]:
        axes.remove()
    return figure, grid[:num_panels]


def _draw_panel(axes: Axes, panel: Panel, metrics: pd.DataFrame) -> None:
    drawn = {label: name for label, name in panel.lines.items() if name in metrics}
    for color, width, (label, name) in zip(LINES, WIDTHS, drawn.items(), strict=False):
        _draw_line(axes, metrics[name].dropna(), color, label, width if len(drawn) > 1 else 1.5)
    interval = ["eval/ci95_low", "eval/ci95_high"]
    if "eval/pass_at_1" in drawn.values() and set(interval) <= set(metrics):
        low_high = metrics[interval].dropna()
        axes.vlines(low_high.index, *low_high.to_numpy().T, color=KEPT, linewidth=2, alpha=0.5)
    if len(drawn) > 1:
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")  # lines may run behind it
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.03, 1.03)
    else:
        low, high = axes.get_ylim()
        lack = max(LEAST_RANGE * max(abs(low), abs(high)) - (high - low), 0.0)
        axes.set_ylim(low - lack / 2, high + lack / 2)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlim(metrics.index.min() - 0.5, metrics.index.max() + 0.5)


def _draw_line(axes: Axes, line: pd.Series, color: str, label: str, width: float = 1.5) -> None:
    marker = "o" if len(line) <= MARKED_STEPS else None
    axes.plot(
        line.index,
        line,
        color=color,
        linewidth=width,
        marker=marker,
        markersize=2.7 * width,
        label=label,
    )


def _groups_by_depth(metrics: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Step groups kept and pruned, by depth, in each learner step; none of a kind is 0."""
    names = [f"groups/{state}_depth_" for state in ("kept", "pruned")]
    depths = {int(column.removeprefix(name)) for name in names for column in metrics
              if column.startswith(name)}  # fmt: skip
    steps = metrics if "groups/kept" not in metrics else metrics[metrics["groups/kept"].notna()]
    kept, pruned = (
        steps.reindex(columns=[f"{name}{depth}" for depth in sorted(depths)])
        .fillna(0)
        .set_axis(sorted(depths), axis=1)
        for name in names
    )
    return kept, pruned
