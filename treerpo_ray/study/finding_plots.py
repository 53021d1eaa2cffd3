"""Finding plots: figures of what the newest saved trees and the evaluations of a run tell.

Every function gives a new Figure, whose title says of how many trees or problems of which learner
step, and raises `NotThere` for a run that does not have them (yet).
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from treerpo_ray.study.analysis import Run
from treerpo_ray.study.findings import (
    OUTCOMES,
    Answer,
    before_after,
    decided_by_depth,
    group_table,
    mismatch_by_staleness,
    with_value,
    worst_losses,
)
from treerpo_ray.study.plots import KEPT, LINES, PRUNED, figure_grid
from treerpo_ray.study.tree_plots import FONT, LOST, NO_VALUE, VALUE_COLORS, drawable

OUTCOME_COLORS = dict(zip(OUTCOMES, (KEPT, "#a9d5e6", "#f6c1b1", PRUNED, "#333333"), strict=True))
LINE_CHARS, MAX_LINES, MAX_ANSWERS = 56, 12, 4
"""Of an answer's text, and answers that are shown of a problem."""
LINE_INCHES = 0.16
MAX_BINS = 24


def plot_losses(run: Run) -> Figure:
    """Left where wrong answers lost most value, right at which depth it is decided what becomes of
    an answer."""
    table = with_value(run.tree_table())
    losses, decided = worst_losses(table), decided_by_depth(table)
    figure, (left, right) = figure_grid(2, num_columns=2, height=3.0)
    depths = [0, *decided.index]
    counts = losses["depth"].value_counts().reindex(depths, fill_value=0)
    left.bar(depths, counts, width=0.6, color=[PRUNED, *[LOST] * len(decided)])
    left.set_xticks(depths, ["no better\nanswer", *map(str, decided.index)])
    left.set(xlabel="depth of the largest loss", ylabel="wrong answers")
    _title(left, f"{len(losses)} wrong answers of {int(table['is_leaf'].sum())}")
    right.bar(decided.index, decided.fillna(0), width=0.6, color=KEPT)
    right.set(xlabel="depth", xticks=decided.index, ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    _title(right, "share of the reward's variance that is decided there")
    return _signed(figure, run, table)


def plot_advantages_by_depth(run: Run) -> Figure:
    """Left the advantages of the trained steps by depth (box: quartiles, line: median, whiskers: 5
    and 95 %), right the share of |advantage| times tokens, that is of the pull on the model."""
    table = run.tree_table()
    depths = sorted(table["depth"].unique())
    trained = table[table["is_kept"]]
    own = [trained.loc[trained["depth"] == depth, "advantage"].to_numpy() for depth in depths]
    figure, (left, right) = figure_grid(2, num_columns=2, height=3.0)
    left.boxplot(
        own,
        positions=depths,
        widths=0.5,
        whis=(5, 95),
        manage_ticks=False,
        flierprops={"markersize": 2, "markeredgecolor": PRUNED},
        medianprops={"color": LINES[1]},
    )
    left.set_xticks(
        depths, [f"{depth}\n{len(of)} steps" for depth, of in zip(depths, own, strict=True)]
    )
    left.axhline(0, color=PRUNED, linewidth=0.8)
    left.set(xlabel="depth", xlim=(min(depths) - 0.6, max(depths) + 0.6))
    _title(left, "advantage of trained steps")
    pull = (trained["advantage"].abs() * trained["length"]).groupby(trained["depth"]).sum()
    pull = pull.reindex(depths, fill_value=0)
    right.bar(depths, pull / (pull.sum() or 1), width=0.6, color=KEPT)
    right.set(xlabel="depth", xticks=depths, ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    _title(right, "share of |advantage| \N{MULTIPLICATION SIGN} tokens")
    return _signed(figure, run, table)


def plot_pruned_groups(run: Run) -> Figure:
    """What becomes of the step groups by depth, and why groups are pruned."""
    table = run.tree_table()
    groups = group_table(table)
    counts = groups.groupby(["depth", "outcome"]).size().unstack(fill_value=0)
    figure, (axes,) = figure_grid(1, num_columns=1, height=2.4)
    below = pd.Series(0, index=counts.index)
    for outcome in (name for name in OUTCOMES if name in counts):
        own, color = counts[outcome], OUTCOME_COLORS[outcome]
        axes.barh(own.index, own, 0.6, left=below, color=color, label=outcome)
        below = below + own
    axes.set(xlabel="step groups", ylabel="depth", yticks=counts.index)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _title(axes, f"{len(groups)} step groups, {int((groups['outcome'] == 'kept').sum())} kept")
    return _signed(figure, run, table)


def plot_entropy_and_length(run: Run) -> Figure:
    """Left the entropy by depth, as the engines sampled, of steps that lead to mostly right and to
    mostly wrong answers; right the length of right and wrong answers."""
    table = run.tree_table().dropna(subset=["value"])
    is_right = table["value"] >= 0.5
    kinds = (("right", is_right, KEPT, -0.18), ("wrong", ~is_right, LOST, 0.18))
    figure, (left, right) = figure_grid(2, num_columns=2, height=3.0)
    ends = table.loc[table["is_leaf"], "end"]
    width = max(1, np.ptp(ends) // MAX_BINS) if len(ends) else 1
    edges = np.arange(ends.min(), ends.max() + 2 * width, width) - 0.5 if len(ends) else [0, 1]
    bins = list(map(float, edges))
    for label, chosen, color, shift in kinds:
        own = table[chosen & (table["length"] > 0)]
        nats = (own["surprisal"] * own["length"]).groupby(own["depth"]).sum()
        entropy = nats / own["length"].groupby(own["depth"]).sum()
        left.bar(entropy.index + shift, entropy, width=0.34, color=color, label=label)
        leaves = table.loc[chosen & table["is_leaf"], "end"]
        name = f"{label}: {len(leaves)}"
        right.hist(leaves, bins=bins, color=color, alpha=0.6, label=name)
    left.set(xlabel="depth", xticks=sorted(table["depth"].unique()))
    _title(left, "entropy (nats a token): mean \N{MINUS SIGN}log p of what was sampled")
    right.set(xlabel="tokens")
    right.margins(x=0.5 if len(ends) and ends.min() == ends.max() else 0.05)
    right.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _title(right, "length of the answers")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    return _signed(figure, run, table)


def plot_mismatch_by_staleness(run: Run) -> Figure:
    """How far the learner was from the engines, by how old the sampling weights were."""
    found = mismatch_by_staleness(run)
    figure, (axes,) = figure_grid(1, num_columns=1, height=2.4)
    axes.bar(found.index, found["mean"], width=0.5, color=KEPT)
    labels = [f"{age}\n{tokens} tokens" for age, tokens in found["tokens"].items()]
    axes.set_xticks(found.index, labels)
    axes.set_xlim(found.index.min() - 1, found.index.max() + 1)
    axes.set(xlabel="versions that the sampling weights were behind the learner")
    _title(axes, "|log p(learner) \N{MINUS SIGN} log p(engine)| before the update (nats a token)")
    return _signed(figure, run, run.tree_table())


def plot_before_after(run: Run, problem: str | None = None) -> Figure:
    """Answers to one held-out problem in the first and the last evaluation, coloured by reward;
    without `problem` to the one that gained most."""
    found = before_after(run, problem)
    texts = [[_label(answer) for answer in own[:MAX_ANSWERS]] for own in found.answers]
    heights = [sum(text.count("\n") + 3 for text in own) for own in texts]
    question = textwrap.wrap(drawable(found.question), 2 * LINE_CHARS)[:MAX_LINES]
    height = LINE_INCHES * (max(heights) + len(question)) + 0.9
    figure, panels = figure_grid(2, num_columns=2, height=height)
    for axes, step, answers, own in zip(panels, found.steps, found.answers, texts, strict=True):
        axes.set(ylim=(max(heights), -1), xlim=(0, 1))
        axes.set_axis_off()
        row = 0.0
        for answer, text in zip(answers, own, strict=False):
            _draw_answer(axes, answer, text, row)
            row += text.count("\n") + 3
        num_right = sum(answer.reward >= 0.5 for answer in answers)
        _title(axes, f"step {step}: {num_right} of {len(answers)} answers right")
    title = (
        f"{found.problem}, one of {found.num_problems} held-out problems: from mostly wrong to "
        f"mostly right went {found.num_fixed}, back {found.num_broken}\n" + "\n".join(question)
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, parse_math=False)
    return figure


def _draw_answer(axes: Axes, answer: Answer, text: str, row: float) -> None:
    axes.text(
        0.02,
        row,
        text,
        va="top",
        size=8.5,
        family=FONT,
        parse_math=False,
        bbox={
            "boxstyle": "round,pad=0.35",
            "facecolor": NO_VALUE if np.isnan(answer.reward) else VALUE_COLORS(answer.reward),
            "edgecolor": PRUNED,
        },
    )


def _label(answer: Answer) -> str:
    """The verdict and the text; of a long one the beginning and the end."""
    known = drawable(answer.text).split("\n")
    lines = [part for line in known for part in textwrap.wrap(line, LINE_CHARS)]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 4], "…", *lines[-3:]]
    return "\n".join([f"[{answer.verdict.replace('_', ' ')}]", *lines])


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)


def _signed(figure: Figure, run: Run, table: pd.DataFrame) -> Figure:
    """The figure with what it was made of."""
    num_trees, step = table["ticket"].nunique(), run.tree_steps()[-1]
    figure.suptitle(f"{num_trees} trees of learner step {step}", x=0.01, ha="left", fontsize=9)
    return figure
