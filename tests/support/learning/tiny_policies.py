"""Policies over a few tokens, of which all trees can be written down with their chances."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from math import prod

import numpy as np

from tests.support.learning.trees import make_tree, on_leaves
from treerpo_ray.algo.backup import Values, mean_backup
from treerpo_ray.algo.tree import ROOT, Tree

Prefix = tuple[int, ...]
Steps = tuple[tuple[int, "Steps"], ...]
"""The steps below a prefix: a token each, with what is below it."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A softmax policy whose steps are one choice each.

    Attributes:
        chances: Of the tokens after each prefix; the others are complete answers.
        rewards: Of the complete answers.
        lengths: Tokens of the step that ends each prefix; one where none is named.
    """

    chances: dict[Prefix, tuple[float, ...]]
    rewards: dict[Prefix, float]
    lengths: dict[Prefix, int] = field(default_factory=dict)

    def worth(self, prefix: Prefix) -> float:
        """Expected reward after a prefix."""
        if prefix in self.rewards:
            return self.rewards[prefix]
        return sum(p * self.worth((*prefix, a)) for a, p in enumerate(self.chances[prefix]))

    def gradient(self, prefix: Prefix) -> np.ndarray:
        """Of the expected reward, by the logits of the tokens after a prefix."""
        chances = np.array(self.chances[prefix])
        worth = np.array([self.worth((*prefix, token)) for token in range(len(chances))])
        return self.reached(prefix) * chances * (worth - chances @ worth)

    def reached(self, prefix: Prefix) -> float:
        """Chance that an answer begins so."""
        return prod(self.chances[prefix[:n]][token] for n, token in enumerate(prefix))

    def trees(self, shape: tuple[int, ...], prefix: Prefix = ()) -> Iterator[tuple[float, Steps]]:
        """All that can grow below a prefix, with its chance; `shape` counts children by depth."""
        if not shape or prefix not in self.chances:
            yield 1.0, ()
            return
        own = self.chances[prefix]
        for tokens in product(range(len(own)), repeat=shape[0]):
            below = [list(self.trees(shape[1:], (*prefix, token))) for token in tokens]
            for parts in product(*below):
                chance = prod(own[token] for token in tokens) * prod(part[0] for part in parts)
                yield chance, tuple(zip(tokens, (part[1] for part in parts), strict=True))


POLICIES = {
    "flat": Policy(chances={(): (0.3, 0.5, 0.2)}, rewards={(0,): 1.0, (1,): 0.0, (2,): 0.4}),
    "two deep": Policy(
        chances={(): (0.3, 0.7), (0,): (0.2, 0.8), (1,): (0.6, 0.4)},
        rewards={(0, 0): 1.0, (0, 1): 0.25, (1, 0): 0.0, (1, 1): 0.5},
    ),
    "ends early": Policy(
        chances={(): (0.3, 0.5, 0.2), (0,): (0.2, 0.8)},
        rewards={(0, 0): 1.0, (0, 1): -0.5, (1,): 0.75, (2,): 0.0},
    ),
    "lengths": Policy(
        chances={(): (0.2, 0.3, 0.1, 0.4)},
        rewards={(0,): 1.0, (1,): 1.0, (2,): 1.0, (3,): 0.4},
        lengths={(0,): 2, (1,): 7, (2,): 4, (3,): 9},
    ),
    "lengths below": Policy(
        chances={(): (0.3, 0.5, 0.2), (0,): (0.2, 0.8), (1,): (0.5, 0.3, 0.2)},
        rewards={(0, 0): 1.0, (0, 1): 0.0, (1, 0): 1.0, (1, 1): 1.0, (1, 2): 0.5, (2,): 1.0},
        lengths={(0,): 3, (1,): 5, (2,): 11, (1, 0): 4, (1, 1): 9},
    ),
}


@cache
def grown(name: str, shape: tuple[int, ...]) -> list[tuple[float, Tree, Values, list[Prefix]]]:
    """All trees of a policy: the chance of each, and the prefix of each step with its token."""
    return list(grown_by(POLICIES[name], shape))


def grown_by(
    policy: Policy, shape: tuple[int, ...]
) -> Iterator[tuple[float, Tree, Values, list[Prefix]]]:
    """The same of any policy."""
    for chance, steps in policy.trees(shape):
        parents, prefixes = _by_depth(steps)
        tree = make_tree(parents, [policy.lengths.get(prefix, 1) for prefix in prefixes])
        rewards = on_leaves(tree, [policy.rewards[prefixes[leaf]] for leaf in tree.leaves])
        yield chance, tree, mean_backup(tree, rewards), prefixes


def _by_depth(steps: Steps) -> tuple[list[int], list[Prefix]]:
    """Parent and prefix of each step, shallow ones first."""
    parents, prefixes = list[int](), list[Prefix]()
    level: list[tuple[int, Prefix, Steps]] = [(ROOT, (), steps)]
    while level:
        above, level = level, []
        for parent, before, own in above:
            for token, below in own:
                level.append((len(parents), (*before, token), below))
                parents.append(parent)
                prefixes.append((*before, token))
    return parents, prefixes
