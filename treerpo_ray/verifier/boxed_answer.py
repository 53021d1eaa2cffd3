r"""Boxed answer: the reward of TreeRPO's paper, for which only the last \boxed{} of a text counts.

A text without a box, or whose last one is empty or stays open, holds no answer: math_answer would
take an earlier box, several boxes as one answer, `#### x`, "answer is x" or the last expression.
"""

from treerpo_ray.verifier._math.equality import is_equal as is_equal  # to count majorities
from treerpo_ray.verifier._math.final_answer import last_box
from treerpo_ray.verifier.math_answer import equals_any
from treerpo_ray.verifier.math_answer import is_answer as is_answer

SELF_TEST: tuple[tuple[str, tuple[str, ...], bool | None], ...] = (
    (r"So it is \boxed{\frac{1}{2}}.", ("0.5",), True),
    (r"First \boxed{3}, then \boxed{4}", ("3",), False),
    (r"\boxed{7}", ("6", "7"), True),
    (r"\boxed{4}, or rather \boxed{", ("4",), None),
    ("The answer is 7.\n#### 7", ("7",), None),
)


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool = False) -> bool | None:
    """Whether the text's last box equals any of the references, or the last box of one; None if
    it holds none."""
    boxes = tuple(find_answer(reference) or reference for reference in references)
    return equals_any(find_answer(text, is_cut_off), boxes)


def find_answer(text: str, is_cut_off: bool = False) -> str | None:
    r"""Content of the last \boxed{}, which counts in a cut-off text as in any other."""
    _, box, rest = text.rpartition(r"\boxed")
    return last_box(box + rest) if box else None
