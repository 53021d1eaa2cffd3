"""Curriculum: what was measured of each prompt, and which prompts tickets come back to.

A prompt's weight is the variance of one leaf's reward: v(1 - v) where it is right or wrong, most
where it is as often the one as the other; none where nothing can be told apart.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

REVISITS = 1
"""Sets the draws of a ticket apart from those of its tree's seed and of its other prompts."""


class Measurement(NamedTuple):
    """Root value of a tree of a prompt (row of the training set) that a learner step consumed."""

    step: int
    prompt: int
    value: float
    variance: float | None = None
    """As in `RootValue`."""

    @property
    def weight(self) -> float:
        """Variance of the reward of one answer."""
        return self.value * (1 - self.value) if self.variance is None else self.variance


class Curriculum:
    """Draws the prompts of some tickets from those that were measured.

    Args:
        share: Probability that a ticket comes back to a prompt.
        seed: Seed of the draws.
        measurements: Those of earlier learner steps, in the order of the steps.
    """

    def __init__(
        self, *, share: float, seed: int, measurements: Iterable[Measurement] = ()
    ) -> None:
        self.share, self.seed = share, seed
        self.measurements = list(measurements) if share else []
        """In the order of steps, so that the last of a prompt is its newest."""
        self._weights: dict[int, dict[int, float]] = {}

    def revisited(self, number: int, last_step: int) -> int | None:
        """The prompt that ticket `number` comes back to; None: it follows the data set.

        A pure function of seed, number and what the learner steps up to `last_step` measured.
        """
        if not self.share:
            return None
        sequence = np.random.SeedSequence((self.seed, number), spawn_key=(REVISITS,))
        rng = np.random.default_rng(sequence)
        if rng.random() >= self.share or not (weights := self.weights(last_step)):
            return None
        chances = np.array(list(weights.values()))
        return int(rng.choice(list(weights), p=chances / chances.sum()))

    def weights(self, last_step: int) -> dict[int, float]:
        """Weight of every prompt where it is not 0, by ascending prompt.

        It is that of the prompt's newest measurement of the learner steps up to `last_step`.
        """
        if last_step not in self._weights:
            newest = {m.prompt: m.weight for m in self.measurements if m.step <= last_step}
            self._weights[last_step] = {prompt: w for prompt, w in sorted(newest.items()) if w > 0}
        return self._weights[last_step]

    def add(self, measured: Sequence[Measurement], last_step: int) -> None:
        """Add those of a learner step; tickets to come ask for none older than `last_step`.

        So of each prompt only the newest one up to there is kept, where it has weight, and all
        that are newer.
        """
        together = [*self.measurements, *measured]
        settled = {m.prompt: m for m in together if m.step <= last_step}
        self.measurements = [
            *(m for m in settled.values() if m.weight > 0),
            *(m for m in together if m.step > last_step),
        ]
        self._weights.clear()
