"""The verifier of arithmetic, at a pace that leaves the machine to what comes up meanwhile: a run
that goes on while engines and workers start would otherwise take it from them."""

import time

from treerpo_ray.verifier import math_answer

SELF_TEST = math_answer.SELF_TEST
PAUSE_S = 0.2
"""Time for each answer, in which nothing is computed."""


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool) -> bool | None:
    time.sleep(PAUSE_S)
    return math_answer.check_answer(text, references, is_cut_off)
