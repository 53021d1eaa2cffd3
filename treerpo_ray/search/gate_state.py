"""Gate state: what a gate must know to issue the same tickets again, as text."""

import json
from collections.abc import Sequence

from treerpo_ray.search.adaptive import ChosenShape
from treerpo_ray.search.curriculum import Measurement
from treerpo_ray.task import GateState

MEASUREMENTS, SHAPES = "measurements", "shapes"


def to_state(measurements: Sequence[Measurement], shapes: Sequence[ChosenShape]) -> GateState:
    """What was measured of prompts, and the shapes that were chosen, as text."""
    return GateState(json.dumps({MEASUREMENTS: measurements, SHAPES: shapes}))


def from_state(state: GateState | None) -> tuple[list[Measurement], list[ChosenShape]]:
    """Both as they were; none of a gate that has not issued a ticket yet."""
    if not state:
        return [], []
    found = json.loads(state)
    if isinstance(found, list):  # older ones hold measurements alone
        found = {MEASUREMENTS: found, SHAPES: []}
    shapes = [ChosenShape(step, tuple(shape)) for step, shape in found[SHAPES]]
    return [Measurement(*row) for row in found[MEASUREMENTS]], shapes
