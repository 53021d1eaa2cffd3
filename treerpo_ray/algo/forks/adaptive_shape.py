"""Adaptive shape: trees that fork where the variance is, by what earlier learner steps measured.

Some trees of some learner steps measure: they fork at all places that may be chosen, and tell what
a fork at each would save (`rule`). All others have the shape that was chosen by that: one fork,
(1, .., 1, N, 1, .., 1), or single answers, (1, .., 1), where none saves enough or nothing is known.
So what is lost where no fork pays is what measures: in some trees of some steps, tokens that single
answers would not have had.

A tree's shape is settled before any of its tokens is drawn, by batches before it alone: whatever
it is, it is then drawn as a tree of a fixed shape is, and every step's credit is as unbiased. With
a say of the batch's own rewards, shapes would win that happened to come out well.

The rule is of the mean gradient of a tree's answers. What a step weighs in an update the loss says:
where all trained steps weigh the same, the N continuations of a fork weigh N times their prefix.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from treerpo_ray.algo.forks.rule import MAX_CHILDREN, ForkEstimate

Shape = tuple[int, ...]
"""Children of an expanded step, by depth: `TreeShape.num_children`."""
LEAST_GAIN = 1.1
"""Single answers must need so many times the tokens of a fork for that to be grown: what is below
is easily lost again to what one batch has and the next has not. It is asked of a whole number N of
continuations, with one standard error against it: `ForkEstimate.cautious_share` must be less than
1 / 1.1."""

MEASURED_SHARE, FEWEST_MEASURED = 1 / 4, 8
"""Of the trees that there are those that measure, and at least how many, if there are. Forty trees
of five learner steps tell a share of tokens to 0.02 where all variance lies before the cut, to 0.1
to 0.3 where much lies behind it (measured on the tasks of conf/tasks)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChoice:
    """What the next trees are to be.

    Attributes:
        num_children: Their shape.
        token_share: Tokens that they need, over those that single answers need for gradients of the
            same variance, as high as what was seen still allows (`ForkEstimate.cautious_share`);
            1 of single answers.
    """

    num_children: Shape
    token_share: float

    @property
    def is_forked(self) -> bool:
        """Whether there is more than one answer."""
        return max(self.num_children) > 1


def is_measured(step: int, every: int) -> bool:
    """Whether trees of a learner step, counted from 0, measure forks: those of one step of `every`,
    none where that is 0. The first step has no past that a baseline could be of."""
    return step > 0 and every > 0 and (step - 1) % every == 0


def num_measured(num_trees: int) -> int:
    """How many of so many trees measure."""
    return min(num_trees, max(FEWEST_MEASURED, ceil(MEASURED_SHARE * num_trees)))


def measures(place: int, num_trees: int) -> bool:
    """Whether the tree at a place, from 0 on, of a learner step that measures is one of those that
    do: of `num_trees` there are `num_measured`, in even distances, so that minibatches have about
    equally many."""
    count = num_measured(num_trees)
    return place * count % num_trees < count


def choice_by(estimates: Iterable[ForkEstimate], num_levels: int) -> ShapeChoice | None:
    """The shape that trees of so many levels are to have; None where nothing is known of any cut.

    Args:
        estimates: What earlier learner steps tell of each cut.
        num_levels: Entries of the shape.
    """
    forks = [
        ShapeChoice(
            num_children=_forked(num_levels, each.depth, each.cautious_children),
            token_share=each.cautious_share,
        )
        for each in estimates
    ]
    if not forks:
        return None
    best = min(forks, key=lambda fork: fork.token_share)
    if best.token_share < 1 / LEAST_GAIN:
        return best
    return ShapeChoice(num_children=single_answers(num_levels), token_share=1.0)


def measured_cuts(num_children: Sequence[int]) -> tuple[int, ...]:
    """Depths of the steps behind which trees of a shape measure a fork: a step that has another
    before it and siblings. Behind the prompt there is nothing that a fork could share."""
    return tuple(depth for depth in range(1, len(num_children)) if num_children[depth] > 1)


def single_answers(num_levels: int) -> Shape:
    """One answer a question."""
    return (1,) * num_levels


def largest_forks(num_children: Sequence[int]) -> tuple[Shape, ...]:
    """Of each fork that trees of a shape measure, the largest that may be chosen."""
    return tuple(
        _forked(len(num_children), depth, MAX_CHILDREN) for depth in measured_cuts(num_children)
    )


def _forked(num_levels: int, depth: int, children: int) -> Shape:
    """One fork, behind the steps of a depth."""
    return tuple(children if level == depth else 1 for level in range(num_levels))
