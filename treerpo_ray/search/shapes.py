"""Adaptive shapes: which shape the trees of each learner step have, where earlier steps choose it.

Who chooses is the learner, by `treerpo_ray.algo.forks.adaptive_shape`; here is kept what it chose,
for as long as a ticket to come may ask for it.
"""

from collections.abc import Iterable
from typing import NamedTuple

from treerpo_ray.algo.forks.adaptive_shape import Shape, is_measured


class ChosenShape(NamedTuple):
    """What the looks up to a learner step chose, with its own."""

    step: int
    num_children: Shape


class AdaptiveShapes:
    """Shapes of the trees of a run, by learner step.

    Args:
        measuring: Shape of the trees that measure, and of all until something is measured.
        every: Learner steps between two that measure; 0: all trees have the one shape.
        chosen: Those of earlier learner steps, in the order of the steps.
    """

    def __init__(self, *, measuring: Shape, every: int, chosen: Iterable[ChosenShape] = ()) -> None:
        self.measuring, self.every = measuring, every
        self.chosen = list(chosen) if every else []

    def shape(self, step: int, last_step: int) -> Shape:
        """Shape of the trees of learner step `step`: a pure function of that and of what the steps
        up to `last_step` chose."""
        known = [each.num_children for each in self.chosen if each.step <= last_step]
        if not known or is_measured(step, self.every):
            return self.measuring
        return known[-1]

    def add(self, chosen: ChosenShape, last_step: int) -> None:
        """Add that of a learner step; steps to come ask for what was chosen up to `last_step` or
        later, so that of all before only the newest is kept."""
        together = [*self.chosen, chosen]
        settled = [each for each in together if each.step <= last_step]
        self.chosen = [*settled[-1:], *(each for each in together if each.step > last_step)]
