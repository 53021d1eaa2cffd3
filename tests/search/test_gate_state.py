"""The state of a gate comes back as it was, also from checkpoints of before there were shapes."""

import json

from treerpo_ray.search.adaptive import ChosenShape
from treerpo_ray.search.curriculum import Measurement
from treerpo_ray.search.gate_state import from_state, to_state
from treerpo_ray.task import GateState

MEASURED = [Measurement(0, 3, 0.5), Measurement(2, 6, 1.0, 0.0), Measurement(3, 5, 1 / 3)]


def test_measurements_and_shapes_come_back_from_a_state_as_they_were() -> None:
    shapes = [ChosenShape(1, (1, 8)), ChosenShape(11, (1, 1, 16))]
    assert from_state(to_state(MEASURED, shapes)) == (MEASURED, shapes)
    assert from_state(to_state([], [])) == from_state(None) == ([], [])


def test_an_older_state_is_a_list_of_measurements() -> None:
    assert from_state(GateState(json.dumps(MEASURED))) == (MEASURED, [])
