r"""Math answer: finds the final answer in a text and compares it with the references.

It runs in the verifier's workers, whose time and memory limits it relies on. Nothing in it
evaluates text as code.
"""

from treerpo_ray.verifier._math.equality import is_equal
from treerpo_ray.verifier._math.final_answer import (
    is_sentence,
    last_expression,
    reference_answer,
    stated_answer,
)

SELF_TEST: tuple[tuple[str, tuple[str, ...], bool | None], ...] = (
    (r"So it is \boxed{\frac{1}{2}}.", ("0.5",), True),
    (r"First \boxed{3}, then \boxed{4}", ("3",), False),
    ("16 - 3 = 13\n#### 1,300", ("1300",), True),
    ("The answer is $x = 3$.", ("3",), True),
    (r"\boxed{2\sqrt{3} + 1}", (r"1+\sqrt{12}",), True),
    (r"\boxed{(1,2)}", ("(2,1)",), False),
    (r"\boxed{1, 2}", ("2,1",), True),
    (r"\boxed{(1,2]}", ("(1,2)",), False),
    (r"\boxed{10_2}", ("10",), False),
    (r"\boxed{\text{Odd}}", (r"\text{odd}",), True),
    (r"\boxed{5\text{ cm}}", (r"5\text{ m}",), False),
    (r"\boxed{9^{9^{9^{9}}}}", ("9",), False),
    (r"\boxed{7}", ("6", "7"), True),
    (r"\boxed{7}", (r"Six and one make $\boxed{7}$.",), True),
    ("I do not know.", ("1",), None),
)


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool = False) -> bool | None:
    """Whether the text's final answer equals any of the references; None if it holds none."""
    return equals_any(find_answer(text, is_cut_off), references)


def equals_any(answer: str | None, references: tuple[str, ...]) -> bool | None:
    """Whether the answer equals any of the references, or what a worked solution among them states;
    None for none."""
    if answer is None:
        return None
    return any(is_equal(answer, reference_answer(each)) for each in references)


def is_answer(reference: str) -> bool:
    """Whether the reference is an answer or states one, so that some text may equal it."""
    answer = reference_answer(reference)
    return not is_sentence(answer) and is_equal(answer, answer)


def find_answer(text: str, is_cut_off: bool = False) -> str | None:
    r"""Last balanced \boxed{}, <answer>, `#### x` or "answer is x", else the last expression.

    Where the length limit cut the text, its last line may be half an answer and its last number is
    one of the reasoning's, so that neither counts.
    """
    answer = stated_answer(text, is_cut_off)
    return answer if answer is not None or is_cut_off else last_expression(text)
