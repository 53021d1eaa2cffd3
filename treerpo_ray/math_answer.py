r"""Math answer: finds the final answer in a text and compares it with the references.

Precision comes first: a false reward teaches a trick, a missed one only costs signal. So numbers
are compared exactly (0.333 is not 1/3), bracket kinds and tuple order count, a list or set may come
in any order, units that differ are an error, and 10_2 is not 10. What strings and exact numbers do
not settle goes to math-verify, one scalar or equation at a time. Its LaTeX grammar builds SymPy
objects without `eval`; answers that could cost unbounded time (power towers, large factorials,
sums, deep nesting) are compared as strings only. Run it in the verifier's workers: time-outs and
memory limits are theirs.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off

MAX_ANSWER_CHARS = 1000
MAX_PARSED_CHARS = 300
MAX_NESTING = 12
MAX_POWER = 1_000_000  # product of all exponents, which bounds the digits of a number
MAX_RELATIVE_ERROR = 1e-9
PROBE_VALUES = (0.7390851, 1.3247179)
LATEX = [LatexExtractionConfig(boxed_match_priority=-1)]

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
HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
ANSWER_IS = re.compile(
    r"answer\s*(?:is|:|=)\s*:?[\s*]*(\$[^$\n]+\$|\\\(.+?\\\)|[^\n]+?)(?=[.*]*(?:\s*\n|\s*$|\.\s))",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?(?:\\?%)?")
PLAIN = re.compile(r"([+-]?)(?:(\d+)\\frac\{(\d+)\}\{(\d+)\}|\\frac\{(-?\d+)\}\{(-?\d+)\})")
RATIO = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:/(\d+))?")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
BASE = re.compile(r"([0-9A-Fa-f,]+)_\{?(\d+)\}?")
UNIT = re.compile(r"(.*\S)\s*\\text\{\s*([A-Za-z][A-Za-z ./]*)\}(?:\^\{?[23]\}?)?", re.DOTALL)
PLAIN_UNIT = re.compile(r"([+-]?[\d.,/]+)\s+([A-Za-z]{2}[A-Za-z ]*)")
NAME = re.compile(r"((?:[A-Za-z]|\\[a-z]+|[A-Z]{2,3})(?:_\{?\w+\}?)?'*(?:\([a-z]\))?)(?:=|\\in)")
MATRIX = re.compile(r"\\begin\{([a-z]+)\}(.*)\\end\{\1\}", re.DOTALL)
EXPONENT = re.compile(r"\^\s*(\d|\{)")
UNBOUNDED = re.compile(r"\\(?:sum|prod|int|lim|begin)|[)}!]\s*!|\d{4}\s*!|\d_|\\d?binom.*\d{4}")

REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})", ""),
        (r"\\\$|\\?[°]|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])", ""),
        (r"\$|(?<!\\)\\[()\[\]]|\*\*", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|mathrm|mathbf|mathit|textbf|textit|textrm|operatorname)\s*\{", r"\\text{"),
        (r"\\text\s*\{\s*(?:,|and|or|\s)+\s*\}", ","),
        (r"\\text\s*\{\s*([^{}A-Za-z]*|[a-z])\s*\}", r"\1"),
        (r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})", r"\\frac{\1}{\2}"),
        (r"\\frac\{\{?([^{}]*)\}?\}\{\{?([^{}]*)\}?\}", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\(?:geqslant|geq)(?![a-z])", r"\\ge "),
        (r"\\(?:leqslant|leq)(?![a-z])", r"\\le "),
        (r",\s*,", ","),
    )
]
UNICODE = str.maketrans(
    {
        "−": "-",  # noqa: RUF001
        "–": "-",  # noqa: RUF001
        "π": r"\pi ",
        "√": r"\sqrt ",
        "×": r"\times ",  # noqa: RUF001
        "·": r"\cdot ",
        "÷": "/",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∞": r"\infty ",
        "∪": r"\cup ",  # noqa: RUF001
        "½": r"\frac{1}{2}",
        "²": "^2",
        "³": "^3",
        "$": "$",
        "€": "",
        "£": "",
        "\u00a0": " ",
        "\u202f": " ",
    }
)


def check_answer(text: str, references: tuple[str, ...]) -> bool | None:
    """Whether the text's final answer equals any of the references; None if it holds none."""
    answer = find_answer(text)
    if answer is None:
        return None
    return any(is_equal(answer, reference) for reference in references)


def find_answer(text: str) -> str | None:
    r"""Last balanced \boxed{} or \fbox{}, else `#### x`, else "answer is x", else the last number."""
    box = _last_box(text)
    if box is not None:
        return box
    for pattern in (HASHES, ANSWER_IS):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def is_equal(answer: str, reference: str) -> bool:
    """Whether two answers, in LaTeX or plain, are the same; false for an empty one."""
    if len(answer) > MAX_ANSWER_CHARS or not answer.strip() or not reference.strip():
        return False
    a, b = _normalised(answer), _normalised(reference)
    return bool(a and b) and (_key(a) == _key(b) or _same(a, b))


def _last_box(text: str) -> str | None:
    last, opened = None, []
    for token in TOKEN.finditer(text):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if token[1] else -1)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start >= 0 and text[start : token.start()].strip():
                last = text[start : token.start()].strip()
    if last is not None and len(last) <= MAX_ANSWER_CHARS:
        return _last_box(last) or last
    return last


def _normalised(text: str) -> str:
    text = text.translate(UNICODE)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    while text.startswith("{") and _closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _key(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _same(a: str, b: str) -> bool:
    """Compare structure by structure; `b` is the reference."""
    if _key(a) == _key(b):
        return True
    if max(_nesting(a), _nesting(b)) > MAX_NESTING:
        return False
    (a, unit_a), (b, unit_b) = _split_unit(a), _split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    numbers = _number(a), _number(b)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1] or _is_share(numbers, (unit_a, unit_b))
    for compare in (_same_base, _same_words, _same_named, _same_list, _same_group, _same_matrix):
        verdict = compare(a, b)
        if verdict is not None:
            return verdict
    return _same_expression(_key_spaced(a), _key_spaced(b))
