"""Fork lines: what a row of metrics tells of the fork rule, by the depth d behind which to fork.

fork/children_depth_d        number N of continuations, of 2 and more, that needs the fewest tokens
fork/token_share_depth_d     tokens that trees [1, N] need, over those that single answers need
fork/token_share_se_depth_d  its standard error
fork/best_children_depth_d   N*, the best number if it need not be whole; at most MAX_CHILDREN
fork/gain_depth_d            G, by how much fewer tokens are needed at N*
fork/within_depth_d          sigma^2 / (sigma^2 + tau^2), with noise below 0 or above 1
fork/before_depth_d          a, tokens from the prompt to the cut
fork/after_depth_d           b, tokens from the cut to the end of an answer
fork/num_prefixes_depth_d    prefixes that all of these were measured on
fork/num_trees_depth_d       trees that those are of

tree/next_children_depth_d   of an adaptive run: children, behind a step of depth d (0: the prompt),
                             of the trees that are grown by this measurement

All is measured on gradients of one layer, with the run's credit of a single answer. By all trained
parameters (`jobs/forks.py --all-parameters`) it came out within a tenth, or within its error:
jobs/comparisons/README.md, Predicted and realised.
Single answers are one a question. The number N is the best one on the very trees that the share is
measured on, so that the share is a little low; its error does not know of the choice, and is too
small where nearly all answers are right: what happens once in a hundred trees is in none of forty.
Adaptive trees are chosen by a share that takes this in, and its error (`cautious_share`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the first line should not wait for what these import
    from treerpo_ray.algo.forks.adaptive_shape import Shape
    from treerpo_ray.algo.forks.rule import ForkEstimate
    from treerpo_ray.metrics.rows import Row

AREA, AT = "fork/", "_depth_"
SHARE = f"{AREA}token_share{AT}"
NEXT = f"tree/next_children{AT}"


def fork_row(estimate: "ForkEstimate", most: int) -> "Row":
    """The metrics of one cut.

    Args:
        estimate: Of it.
        most: What N* is cut off at, for rows hold finite numbers.
    """
    fork, (within, between) = estimate.fork, estimate.variances
    number = fork.children
    found = {
        "children": number,
        "token_share": fork.token_share(number),
        "token_share_se": estimate.token_share_error(number),
        "best_children": min(fork.best_children, most),
        "gain": fork.gain,
        "within": within / (within + between) if within + between > 0 else 0.0,
        "before": fork.before,
        "after": fork.after,
        "num_prefixes": estimate.num_prefixes,
        "num_trees": len(estimate.samples),
    }
    return {f"{AREA}{name}{AT}{estimate.depth}": float(value) for name, value in found.items()}


def shape_row(num_children: "Shape") -> "Row":
    """The metrics of the shape that was chosen."""
    return {f"{NEXT}{depth}": float(number) for depth, number in enumerate(num_children)}


def shape_of(row: "Row", else_: "Shape") -> "Shape":
    """What `shape_row` gave, or else another shape where a row has none."""
    return tuple(round(row.get(f"{NEXT}{depth}", own)) for depth, own in enumerate(else_))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkLine:
    """What a row tells of one cut; see the top of this module."""

    depth: int
    children: int
    token_share: float
    token_share_se: float
    best_children: float
    gain: float
    within: float
    before: float
    after: float
    num_prefixes: int
    num_trees: int

    def __str__(self) -> str:
        return (
            f"a tree of [1, {self.children}] would need {self.token_share:.2f} \u00b1 "
            f"{self.token_share_se:.2f} of the tokens of single answers (fork at "
            f"depth {self.depth}, {self.num_prefixes} prefixes of {self.num_trees} trees)"
        )


def fork_lines(row: "Row") -> list[ForkLine]:
    """The cuts of a row, shallow ones first; none where nothing was measured."""
    depths = [int(name.removeprefix(SHARE)) for name in row if name.startswith(SHARE)]
    return [_line(row, depth) for depth in sorted(depths)]


def _line(row: "Row", depth: int) -> ForkLine:
    def number(name: str) -> float:
        return row[f"{AREA}{name}{AT}{depth}"]

    return ForkLine(
        depth=depth,
        children=round(number("children")),
        token_share=number("token_share"),
        token_share_se=number("token_share_se"),
        best_children=number("best_children"),
        gain=number("gain"),
        within=number("within"),
        before=number("before"),
        after=number("after"),
        num_prefixes=round(number("num_prefixes")),
        num_trees=round(number("num_trees")),
    )
