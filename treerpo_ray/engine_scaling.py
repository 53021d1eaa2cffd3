"""Engine scaling: how many engines a pool should have, from the trees that it has in hand.

The pool grows at once and shrinks only to the most that was needed for a while, so that a learner
step, in which hardly a tree is in hand, does not cost an engine its start.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class EngineScaling:
    """The rule of one pool; times are the caller's, in seconds from anywhere."""

    fewest: int
    most: int
    trees_per_engine: int | None
    """Trees that one engine grows at a time; None: any number, so `fewest` are always enough."""
    patience_s: float
    """Time that fewer engines must have been enough before the pool shrinks to them."""
    _needs: deque[tuple[float, int]] = field(default_factory=deque)

    def target(self, num_trees: int, now_s: float) -> int:
        """Engines to have at `now_s` with so many trees waiting or growing; call it in order."""
        need = self.needed(num_trees)
        # An entry below a later one can never be the most of a window that holds both.
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now_s, need))
        while self._needs[0][0] < now_s - self.patience_s:
            self._needs.popleft()
        return self._needs[0][1]

    def needed(self, num_trees: int) -> int:
        """Engines that hold so many trees without one waiting, within the bounds."""
        if self.trees_per_engine is None:
            return self.fewest
        return min(max(-(-num_trees // self.trees_per_engine), self.fewest), self.most)
