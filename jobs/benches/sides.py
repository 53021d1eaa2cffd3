"""Sides: two that do the same work, in turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 5
"""Times that the two sides of a comparison take turns."""
NUM_TREES = 24
"""Trees that the longer ones work on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: medians over the rounds."""

    name: str
    ours: str
    other: str
    ours_cost: float
    other_cost: float
    unit: str
    """Of both costs: s or GiB."""
    ratio: float
    """Median over the rounds of other / ours: how many times less ours costs."""
    low: float
    high: float
    """Smallest and largest ratio of a round."""


def compared(
    name: str,
    ours: tuple[str, Callable[[], float]],
    other: tuple[str, Callable[[], float]],
    unit: str = "s",
    rounds: int = ROUNDS,
) -> Row:
    """Run both sides in turns; each returns its cost, in `unit`, for the same work."""
    for _, side in (ours, other):
        side()  # warm-up
    costs = [(ours[1](), other[1]()) for _ in range(rounds)]
    mine, theirs = map(list, zip(*costs, strict=True))
    return compared_rounds(name, (ours[0], mine), (other[0], theirs), unit)


def compared_rounds(
    name: str, ours: tuple[str, list[float]], other: tuple[str, list[float]], unit: str = "s"
) -> Row:
    """The comparison of two sides by what each of their rounds cost, in `unit`."""
    ratios = sorted(theirs / mine for mine, theirs in zip(ours[1], other[1], strict=True))
    return Row(
        name=name,
        ours=ours[0],
        other=other[0],
        ours_cost=statistics.median(ours[1]),
        other_cost=statistics.median(other[1]),
        unit=unit,
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of `work`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of `work`, freeing its result aside."""
    start = time.process_time()
    result = work()
    end = time.process_time()
    del result
    return end - start
