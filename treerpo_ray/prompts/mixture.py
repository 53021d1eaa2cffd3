"""Mixture: which prompt is whose turn, where the training set is of one or several data sets.

The sets stand one behind the other in the training set, so that a prompt's number is its row
there. A ticket draws its set by weight; within a set, prompts come in fresh permutations of it:
none again before all others of its set had their turn. A set's epochs are its own: a small one
with much weight begins again while a large one goes on, and none of them ends the run.

All is a pure function of a ticket's number and the seed, so that a resumed run goes on as it was.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BLOCK = 1024
"""Tickets whose sets are drawn together."""
SETS, ORDERS = 2, 3
"""Set these draws apart from each other and from all others of a run."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Data sets that are trained on together.

    Attributes:
        sizes: Prompts of each set.
        weights: Chances of the sets, in any unit.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the tickets that each set gets."""
        return tuple(weight / sum(self.weights) for weight in self.weights)

    def start(self, chosen: int) -> int:
        """Row of a set's first prompt in the training set."""
        return sum(self.sizes[:chosen])

    def at(self, word: int) -> int:
        """The prompt that 64 random bits stand for: its set by weight, each prompt of it alike."""
        if len(self.sizes) == 1:
            return word % self.sizes[0]
        place = word / 2**64
        bounds = np.cumsum(self.shares)
        chosen = min(int(np.searchsorted(bounds, place, side="right")), len(self.sizes) - 1)
        inside = (place - bounds[chosen]) / self.shares[chosen] + 1
        size = self.sizes[chosen]
        return self.start(chosen) + min(max(int(inside * size), 0), size - 1)


def id_of(name: str, problem: str) -> str:
    """Id of a problem of the set of that name."""
    return f"{name}/{problem}"


def set_of(problem: str, names: Iterable[str]) -> str | None:
    """The set that a problem is of by its id, of those with these names; None: of none of them."""
    found = [name for name in names if problem.startswith(id_of(name, ""))]
    return max(found, key=len, default=None)


def one_set(size: int) -> Mixture:
    """The mixture of a single data set."""
    return Mixture(sizes=(size,), weights=(1.0,))


class Turns:
    """The prompts of tickets in their turn; see the module text for the rule.

    Args:
        mixture: The sets.
        seed: Seed of the draws and of the permutations.
    """

    def __init__(self, *, mixture: Mixture, seed: int) -> None:
        self.mixture, self.seed = mixture, seed
        self._before = [np.zeros(len(mixture.sizes), np.int64)]
        """Tickets of each set before each block."""
        self._orders: dict[int, dict[int, np.ndarray]] = {}

    def prompt(self, number: int) -> int:
        """The prompt of the ticket with that number."""
        sizes = self.mixture.sizes
        if len(sizes) == 1:
            epoch, place = divmod(number, sizes[0])
            return int(self._order(0, epoch, ())[place])
        block, place = divmod(number, BLOCK)
        drawn = self._sets(block)
        chosen = int(drawn[place])
        turn = int(self._counts(block)[chosen] + (drawn[:place] == chosen).sum())
        epoch, place = divmod(turn, sizes[chosen])
        return self.mixture.start(chosen) + int(self._order(chosen, epoch, (ORDERS, chosen))[place])

    def _order(self, number: int, epoch: int, key: tuple[int, ...]) -> np.ndarray:
        """The prompts of a set in the order of an epoch; the last two of each set are kept."""
        known = self._orders.setdefault(number, {})
        if epoch not in known:
            for old in sorted(known)[:-1]:
                del known[old]
            sequence = np.random.SeedSequence((self.seed, epoch), spawn_key=key)
            size = self.mixture.sizes[number]
            known[epoch] = np.random.default_rng(sequence).permutation(size)
        return known[epoch]

    def _sets(self, block: int) -> np.ndarray:
        """Set of each ticket of a block."""
        sequence = np.random.SeedSequence((self.seed, block), spawn_key=(SETS,))
        shares = self.mixture.shares
        return np.random.default_rng(sequence).choice(len(shares), size=BLOCK, p=shares)

    def _counts(self, block: int) -> np.ndarray:
        """Tickets of each set before a block."""
        for number in range(len(self._before) - 1, block):
            drawn = np.bincount(self._sets(number), minlength=len(self.mixture.sizes))
            self._before.append(self._before[-1] + drawn)
        return self._before[block]
