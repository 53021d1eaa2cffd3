r"""Math answer: finds the final answer in a text and compares it with the references.

It runs in the verifier's workers, whose time and memory limits it relies on. Nothing in it
evaluates text as code.
"""

import re

from treerpo_ray.verifier._math_equality import MAX_ANSWER_CHARS, is_equal

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
    ("I do not know.", ("1",), None),
)


TOKEN = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


BARE_BOX = re.compile(r"\\boxed\s*(-?\d+)")


HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")


ANSWER_IS = re.compile(r"\banswer\s*(?:is|:|=)[\s:*]*([^\n]+)", re.IGNORECASE)


FIRST_MATH = re.compile(r"\$([^$\n]+)\$|\\\((.+?)\\\)")


EMPTY = re.compile(r"\\(?:boxed|fbox)|[{}\s]")


SENTENCE_END = re.compile(r"[.!?](?:\s|\*|$)|,\s+(?=[a-z]{2})")


NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?"
)


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool = False) -> bool | None:
    """Whether the text's final answer equals any of the references; None if it holds none."""
    return equals_any(find_answer(text, is_cut_off), references)


def equals_any(answer: str | None, references: tuple[str, ...]) -> bool | None:
    """Whether the answer equals any of the references; None for none."""
    if answer is None:
        return None
    return any(is_equal(answer, reference) for reference in references)


def find_answer(text: str, is_cut_off: bool = False) -> str | None:
    r"""Last balanced \boxed{} or \fbox{}, else `#### x`, else "answer is x", else last number.

    Where the length limit cut the text, its last line may be half an answer and its last number is
    one of the reasoning's, so that neither counts.
    """
    box = last_box(text)
    if box is not None:
        return box
    if is_cut_off:
        text = text.rpartition("\n")[0]
    for pattern in (BARE_BOX, HASHES):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    claims = ANSWER_IS.findall(text)
    if claims and EMPTY.sub("", claim := _claimed(claims[-1])):
        return claim
    numbers = [] if is_cut_off else NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_box(text: str) -> str | None:
    r"""Content of the last balanced \boxed{} or \fbox{} that is not empty, and of a box in it."""
    last: str | None = None
    opened: list[int | None] = []  # start of a box's content, none for another brace
    for token in TOKEN.finditer(text):
        if token[1]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                last = text[start : token.start()].strip() or last
    if last is None or len(last) > MAX_ANSWER_CHARS:
        return last
    return last_box(last) or last


def _claimed(claim: str) -> str:
    math = FIRST_MATH.match(claim)
    if math:
        return math[1] or math[2]
    return SENTENCE_END.split(claim)[0].strip(" *")
