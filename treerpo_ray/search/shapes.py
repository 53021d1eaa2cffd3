"""Adaptive shapes: which shape each tree of a learner step has, where earlier steps choose it.

Who chooses is the learner, by `treerpo_ray.algo.forks.adaptive_shape`; here is kept what it chose,
for as long as a ticket to come may ask for it.
"""

from collections.abc import Iterable
from typing import NamedTuple

from treerpo_ray.algo.forks.adaptive_shape import Shape, is_measured, measures, single_answers


class ChosenShape(NamedTuple):
    """What the looks up to a learner step chose, with its own."""

    step: int
    num_children: Shape


class AdaptiveShapes:
    """Shapes of the trees of a run, by learner step and place in it.

    Args:
        measuring: Shape of the trees that measure.
        every: Learner steps between two that measure; 0: all trees have the one shape.
        trees_per_step: Of a learner step.
        chosen: Those of earlier learner steps, in the order of the steps.
    """

    def __init__(
        self,
        *,
        measuring: Shape,
        every: int,
        trees_per_step: int,
        chosen: Iterable[ChosenShape] = (),
    ) -> None:
        self.measuring, self.every, self.trees_per_step = measuring, every, trees_per_step
        self.chosen = list(chosen) if every else []

    def shape(self, step: int, place: int, last_step: int) -> Shape:
        """Shape of the tree at a place of learner step `step`: a pure function of both and of what
        the steps up to `last_step` chose; a single answer while they chose nothing."""
        if not self.every:
            return self.measuring
        if is_measured(step, self.every) and measures(place, self.trees_per_step):
            return self.measuring
        known = [each.num_children for each in self.chosen if each.step <= last_step]
        return known[-1] if known else single_answers(len(self.measuring))

    def add(self, chosen: ChosenShape, last_step: int) -> None:
        """Add that of a learner step; steps to come ask for what was chosen up to `last_step` or
        later, so that of all before only the newest is kept."""
        together = [*self.chosen, chosen]
        settled = [each for each in together if each.step <= last_step]
        self.chosen = [*settled[-1:], *(each for each in together if each.step > last_step)]
