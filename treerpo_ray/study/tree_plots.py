"""Tree plots: figures of one tree, of a run or made by hand; every function gives a new Figure."""

import textwrap
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from treerpo_ray.algo.backup import Values
from treerpo_ray.algo.tree import ROOT, Tree
from treerpo_ray.records import TreeRecord
from treerpo_ray.study.analysis import (
    Run,
    is_mixed,
    most_mixed_tree,
    path_changes,
    worst_leaf,
)
from treerpo_ray.study.plots import KEPT, PRUNED, figure_grid
from treerpo_ray.verifier.verdict import Verdict

LOST = "#c8443c"
FONT = "DejaVu Sans Mono"
VALUE_COLORS = LinearSegmentedColormap.from_list("value", ["#f6c1b1", "#fbf8ee", "#a9d5e6"])
"""From value 0 to 1, light enough to read black text on."""
NO_VALUE = "#ffffff"
MAX_LEAVES = 40
"""Leaves up to which a tree is drawn whole."""
NOT_MIXED = "not mixed: all answers of this tree are worth the same"
LINE_CHARS = 26
"""Longest line of a step's text in a drawing."""
MAX_LINES = 3
"""Most lines of it."""
ROW_INCHES, COLUMN_INCHES = 0.68, 2.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeView:
    """What is shown of a tree."""

    tree: Tree
    question: str
    texts: Sequence[str]
    """Each step's own."""
    values: Values
    advantages: Float64[np.ndarray, " steps"]
    """NaN where a step is not trained on."""
    verdicts: Sequence[Verdict]
    """Of each leaf."""


def plot_tree(run: Run, record: TreeRecord | None = None) -> Figure:
    """The tree of a run with each step's text, value and, in kept step groups, advantage.

    A tree of more than MAX_LEAVES leaves is drawn open along one path only, the one that loses
    most value; other steps say how many leaves they hide. Without `record` it is, of the trees that
    were trained on last, the one whose steps differ most in value.
    """
    record = most_mixed_tree(run, run.trees()) if record is None else record
    view = TreeView(
        tree=record.tree,
        question=record.question,
        texts=run.step_texts(record),
        values=run.values(record),
        advantages=run.advantages(record),
        verdicts=record.verdicts,
    )
    opened = None
    if len(record.tree.leaves) > MAX_LEAVES:
        opened = {ROOT, *record.tree.path(worst_leaf(run, record))}
    figure = draw_tree(view, opened)
    if not is_mixed(run, record):
        figure.axes[0].set_title(NOT_MIXED, loc="left", fontsize=10)
    return figure


def draw_tree(view: TreeView, opened: Set[int] | None = None) -> Figure:
    """A tree from left to right; without `opened`, the steps whose children are shown, whole."""
    tree = view.tree
    opened = tree.children.keys() if opened is None else opened & tree.children.keys()
    rows = _rows(tree, ROOT, opened, count())
    num_rows, num_columns = max(rows.values()) + 1, max(tree.depths, default=0) + 1
    figure, (axes,) = figure_grid(1, num_columns=1, height=ROW_INCHES * num_rows + 0.6)
    figure.set_figwidth(COLUMN_INCHES * num_columns)
    for step in rows:
        _draw_step(axes, view, rows, step)
    axes.set(xlim=(-0.03, num_columns), ylim=(num_rows - 0.4, -0.8))
    axes.set_axis_off()
    for depth in range(num_columns):
        axes.text(depth, -0.75, f"depth {depth}" if depth else "prompt", weight="bold", size=9)
    return figure


def plot_value_along_path(
    run: Run, record: TreeRecord | None = None, leaf: int | None = None
) -> Figure:
    """Backed-up value from the prompt down to a leaf; the step that loses most is marked.

    Grey dots are the siblings of each step. Without `leaf` it is the path with the largest loss;
    without `record` the tree is that of `plot_tree`.
    """
    record = most_mixed_tree(run, run.trees()) if record is None else record
    tree, values, texts = record.tree, run.values(record), run.step_texts(record)
    leaf = worst_leaf(run, record) if leaf is None else leaf
    path, changes = tree.path(leaf), path_changes(run, record, leaf)
    along = [values.root, *values.steps[list(path)].tolist()]
    figure, (axes,) = figure_grid(1, num_columns=1, height=3.8)
    for depth, step in enumerate(path, 1):
        siblings = list(tree.children[tree.steps[step].parent])
        axes.scatter([depth] * len(siblings), values.steps[siblings], color=PRUNED, s=28)
    axes.plot(range(len(along)), along, color=KEPT, marker="o", zorder=3)
    worst = int(np.argmin(changes))
    if changes[worst] < 0:
        ends = along[worst : worst + 2]
        axes.plot([worst, worst + 1], ends, color=LOST, marker="o", linewidth=3, zorder=4)
        place = (worst + 0.55, sum(ends) / 2 + 0.04)
        axes.annotate(f"\N{MINUS SIGN}{-changes[worst]:.2f}", place, color=LOST, weight="bold")
    labels = [_clipped(record.question)] + [_clipped(texts[step]) for step in path]
    axes.set_xticks(range(len(along)), labels, family=FONT, parse_math=False)
    axes.set(ylabel="value", ylim=(-0.06, 1.06), xlim=(-0.4, len(path) + 0.4))
    axes.get_xticklabels()[worst + 1].set_color(LOST if changes[worst] < 0 else "black")
    verdict = record.verdicts[tree.leaves.index(leaf)].value.replace("_", " ")
    title = f"ticket {record.ticket}, from the prompt to leaf {leaf}: {verdict}"
    if not is_mixed(run, record):
        title += f"\n{NOT_MIXED}"
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def _rows(tree: Tree, step: int, opened: Set[int], free_rows: Iterator[int]) -> dict[int, float]:
    """Row of `step` and of all shown steps below it: a parent is in the middle of its children."""
    children = tree.children[step] if step in opened else ()
    rows: dict[int, float] = {}
    for child in children:
        rows |= _rows(tree, child, opened, free_rows)
    middle = (rows[children[0]] + rows[children[-1]]) / 2 if children else next(free_rows)
    return rows | {step: middle}


def _draw_step(axes: Axes, view: TreeView, rows: dict[int, float], step: int) -> None:
    """Draw a step, or the prompt (ROOT), in its row."""
    tree, row, value = view.tree, rows[step], _value(view, step)
    depth = 0 if step == ROOT else tree.depths[step]
    is_kept = step != ROOT and not np.isnan(view.advantages[step])
    color, width = (KEPT, 1.8) if is_kept else (PRUNED, 0.8)
    if step != ROOT:
        above, elbow = rows[tree.steps[step].parent], depth - 0.08
        line = [depth - 0.9, elbow, elbow, depth], [above, above, row, row]
        axes.plot(*line, color=color, linewidth=width, zorder=1)
    axes.text(
        depth,
        row,
        f"{_clipped(view.question if step == ROOT else view.texts[step])}\n"
        + _caption(view, rows, step),
        va="center",
        size=7.5,
        family=FONT,
        parse_math=False,
        bbox={
            "boxstyle": "round,pad=0.35",
            "facecolor": NO_VALUE if np.isnan(value) else VALUE_COLORS(value),
            "edgecolor": color,
            "linewidth": width,
        },
    )


def _value(view: TreeView, step: int) -> float:
    return view.values.root if step == ROOT else float(view.values.steps[step])


def _caption(view: TreeView, rows: dict[int, float], step: int) -> str:
    """What is known of a step, such as `v 0.75  A +1.33` or `v 0.00  A -1.33  wrong`."""
    tree = view.tree
    parts = [f"v {_value(view, step):.2f}"]
    if step != ROOT and not np.isnan(view.advantages[step]):
        parts.append(f"A {view.advantages[step]:+.2f}")
    if step in tree.leaves:
        verdict = view.verdicts[tree.leaves.index(step)]
        parts.append(verdict.value.replace("_", " "))
    elif not any(child in rows for child in tree.children.get(step, ())):
        num_hidden = sum(step in tree.path(leaf) for leaf in tree.leaves)
        parts.append(f"… {num_hidden} leaves")
    return "  ".join(parts)


def _clipped(text: str) -> str:
    """The first lines of `text`, without characters that the font cannot draw."""
    lines = [
        part for line in drawable(text).split("\n") for part in textwrap.wrap(line, LINE_CHARS)
    ]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1] = lines[MAX_LINES - 1][: LINE_CHARS - 1] + "…"
    return "\n".join(lines[:MAX_LINES])


def drawable(text: str) -> str:
    """`text` without the lines' ends around it; a dot for each character that FONT cannot draw."""
    return "".join(char if char in _known_chars() else "·" for char in text.strip("\n"))


@cache
def _known_chars() -> frozenset[str]:
    return frozenset("\n").union(map(chr, get_font(findfont(FONT)).get_charmap()))
