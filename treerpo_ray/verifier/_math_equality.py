r"""Math equality: whether two answers, in LaTeX or plain, are the same.

Precision comes first: a false reward teaches a trick, a missed one only costs signal. So numbers
are compared exactly (0.333 is not 1/3), bracket kinds and tuple order count, a list or set may come
in any order, units that differ are an error, and 10_2 is not 10. What strings and exact numbers do
not settle goes to math-verify, one scalar or equation at a time: its LaTeX grammar builds SymPy
objects, and the numbers in it are read here, so that nothing runs `eval`. Answers that could cost
unbounded time (power towers, large factorials, sums, deep nesting) are compared as strings only.
"""

import logging
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from latex2sympy2_extended import NormalizationConfig, latex2sympy2
from math_verify import LatexExtractionConfig, parse, parser, verify
from sympy import Add, And, Basic, Eq, Expr, Float, Integer, MatrixBase, Mul, Pow, nan, zoo

from treerpo_ray.verifier._math_notation import (
    closing,
    key,
    letters,
    nesting,
    normalised,
    number,
    split,
    without_unit,
)

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off


MAX_ANSWER_CHARS = 1000


MAX_PARSED_CHARS = 300


MAX_NESTING = 12


MAX_POWER = 1_000_000  # product of all exponents, which bounds a number's digits


MAX_ANGLE_POWER = 300  # the same where sines are: to take off full turns needs all digits


MAX_PRODUCTS = 8  # products inside of each other, which double the time


MAX_RELATIVE_ERROR = 1e-9


PROBES = (0.7390851, 1.3247179)  # values that no answer is likely to be a root at


LATEX = [  # without its units, which would be any letter t, c, h, ... at the end of an expression
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True),
    )
]


BASE = re.compile(r"(-?\d[0-9A-F]*|[0-9A-F]{2,})_\{?(\d+)\}?")


TEXT = re.compile(r"\\text\{([^{}]*)\}")


WORDS = re.compile(r"\(?[A-Za-z][A-Za-z ,.'-]*\)?")


NAME = re.compile(
    r"((?:[A-Za-z]|\\[a-z]+|[A-Z]{2,3})(?:_\{?\w+\}?)?'*(?:\([a-z]\))?|\([a-z](?:,\s*[a-z])+\))"
    r"\s*(?:=|\\in(?![a-z]))(.+)",
    re.DOTALL,
)


CONSTANT = r"(?:\\(?:frac|sqrt|pi|cdot|times|%)|[^\\A-Za-z=])"


CHAIN = re.compile(rf"{CONSTANT}+(?:={CONSTANT}+)+")  # 2 + 4 = 6


MATRIX = re.compile(r"\\begin\{([a-z]+)\}(.*)\\end\{\1\}", re.DOTALL)


UNBOUNDED = re.compile(
    r"\\(?:sum|prod|int|lim|begin|Gamma|exp)|[)}!]\s*!|\d{4}\s*!|\d_|\*\*|binom.*(?:\d{4}|\^)"
)


ANGULAR = re.compile("sin|cos|tan|cot|sec|csc")


BRACKETS = {"(": ")", "[": "]", "{": "}"}


def _to_number(reader: object, text: str) -> Integer | Float:
    """A number of the LaTeX grammar, which has digits, a point and an exponent at most."""
    plain = text.replace(",", "")
    return Integer(int(plain)) if plain.isdecimal() else Float(plain)


latex2sympy2._Latex2Sympy.parse_number = _to_number  # its own is SymPy's, which runs `eval` on it


parser.should_treat_as_complex = lambda latex: False  # the symbols of 2 i are not those of 2i


def is_equal(answer: str, reference: str) -> bool:
    """Whether the answer is the reference; false where either is empty."""
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARS:
        return False
    a, b = normalised(answer), normalised(reference)
    return bool(a and b) and _is_same(a, b)


def _is_same(a: str, b: str) -> bool:
    """Compare spellings, then values; `b` is the reference."""
    return bool(a) if key(a) == key(b) else _is_same_value(a, b)


def _is_same_value(a: str, b: str) -> bool:
    """Compare structure by structure."""
    if max(nesting(a), nesting(b)) > MAX_NESTING:
        return False
    (a, unit_a), (b, unit_b) = without_unit(a), without_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    number_a, number_b = number(a), number(b)
    if number_a is not None and number_b is not None:
        share_a = number_a / 100 if unit_a == "%" and not unit_b else number_a
        share_b = number_b / 100 if unit_b == "%" and not unit_a else number_b
        return number_a == number_b or share_a == share_b
    for compare in (_same_base, _same_words, _same_list, _same_named, _same_group, _same_matrix):
        verdict = compare(a, b)
        if verdict is not None:
            return verdict
    return _same_expression(a, b)


def _same_base(a: str, b: str) -> bool | None:
    based_a, based_b = BASE.fullmatch(key(a)), BASE.fullmatch(key(b))
    if based_a and based_b:
        return based_a.groups() == based_b.groups()
    if based_b:  # the question names the base, so that the digits alone answer it
        return key(a) == based_b[1]
    return based_a and based_a.groups() == (key(b), "10")


def _same_words(a: str, b: str) -> bool | None:
    text_a, text_b = TEXT.fullmatch(a), TEXT.fullmatch(b)
    words_a, words_b = (text_a[1] if text_a else a), (text_b[1] if text_b else b)
    if not (WORDS.fullmatch(words_a.strip()) and WORDS.fullmatch(words_b.strip())):
        return False if (text_a or text_b) and words_a != words_b else None
    if not text_a and not text_b and max(len(key(a)), len(key(b))) <= 3:
        return None  # xy and yx are products
    parts = [sorted(re.sub(r"[^a-z,]", "", w.lower()).split(",")) for w in (words_a, words_b)]
    return parts[0] == parts[1]


def _same_list(a: str, b: str) -> bool | None:
    is_set = False
    for separator in (",", ";", r"\cup"):
        (parts_a, is_set_a), (parts_b, is_set_b) = _parts(a, separator), _parts(b, separator)
        is_set = is_set or is_set_a or is_set_b
        if len(parts_a) > 1 or len(parts_b) > 1:
            return _is_matching(parts_a, parts_b)
    return _is_matching(parts_a, parts_b) if is_set else None


def _parts(text: str, separator: str) -> tuple[list[str], bool]:
    """Elements of a list or of a set in braces, and whether there are braces."""
    text = text.strip()
    is_set = text.startswith(r"\{") and closing(text, 1) == len(text) - 1
    parts = split(text[2:-2] if is_set else text, separator)
    return [
        variant
        for part in parts
        for variant in (
            (part.replace(r"\pm", "+"), part.replace(r"\pm", "-")) if r"\pm" in part else (part,)
        )
    ], is_set


def _is_matching(parts_a: Sequence[str], parts_b: Sequence[str]) -> bool:
    rest = list(parts_b)
    if len(parts_a) != len(rest):
        return False
    for part in parts_a:
        match = next((other for other in rest if _is_same(part, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _same_named(a: str, b: str) -> bool | None:
    """Compare x = 3 with 3 and with x = 3; other equations are for math-verify."""
    named_a, named_b = NAME.fullmatch(a), NAME.fullmatch(b)
    if named_a and named_b:
        if key(named_a[1]) != key(named_b[1]):
            return None
        return _is_same(named_a[2].split("=")[-1], named_b[2].split("=")[-1])
    if named_a and "=" not in b:
        return _is_same(named_a[2].split("=")[-1], b)
    if named_b and "=" not in a:
        return _is_same(a, named_b[2].split("=")[-1])
    if CHAIN.fullmatch(a) or CHAIN.fullmatch(b):
        return _is_same(*(t.split("=")[-1] if CHAIN.fullmatch(t) else t for t in (a, b)))
    return None


def _same_group(a: str, b: str) -> bool | None:
    """Compare tuples and intervals: the same brackets, the same elements in order."""
    groups = []
    for text in (a.strip(), b.strip()):
        is_whole = text[:1] in ("(", "[") and closing(text, 0) == len(text) - 1
        parts = split(text[1:-1], ",") if is_whole else []
        groups.append((text[0] + text[-1], parts) if len(parts) > 1 else ("", []))
    (kind_a, parts_a), (kind_b, parts_b) = groups
    if not (kind_a or kind_b):
        return None
    is_alike = kind_a == kind_b and len(parts_a) == len(parts_b)
    return is_alike and all(map(_is_same, parts_a, parts_b))


def _same_matrix(a: str, b: str) -> bool | None:
    matrices = [found for text in (a, b) if (found := MATRIX.fullmatch(text.strip()))]
    if len(matrices) < 2:
        return False if matrices else None
    determinants, cells = [], []
    for kind, body in map(re.Match.groups, matrices):
        rows = re.split(r"\\\\(?:\[\w+\])?", re.sub(r"^\{[clr|]*\}", "", body.strip()))
        determinants.append(kind.lower() == "vmatrix")
        cells.append([row.split("&") for row in rows if row.strip()])
    return (
        determinants[0] == determinants[1]
        and [len(row) for row in cells[0]] == [len(row) for row in cells[1]]
        and all(
            _is_same(x, y) for p, q in zip(*cells, strict=True) for x, y in zip(p, q, strict=True)
        )
    )


def _same_expression(a: str, b: str) -> bool:
    """Ask math-verify, unless a look shows that the two differ or cost too much."""
    most = MAX_ANGLE_POWER if ANGULAR.search(a + b) else MAX_POWER
    if letters(a) != letters(b) or not (_is_bounded(a, most) and _is_bounded(b, most)):
        return False
    parsed_a, parsed_b = _parsed(a), _parsed(b)
    if parsed_a is None or parsed_b is None or _is_apart(parsed_a, parsed_b):
        return False
    if isinstance(parsed_a, Eq) and isinstance(parsed_b, Eq) and _has_unknown_power(parsed_a):
        return True  # to solve for an exponent takes any time, and one is a multiple of the other
    return verify(parsed_b, parsed_a, timeout_seconds=None)


def _has_unknown_power(equation: Basic) -> bool:
    return any(power.exp.free_symbols for power in equation.atoms(Pow))


@lru_cache(maxsize=2048)
def _parsed(latex: str) -> Basic | MatrixBase | None:
    found = parse(f"${latex}$", LATEX, fallback_mode="no_fallback", parsing_timeout=None)
    if not found or _products(found[0]) <= MAX_PRODUCTS:
        return found[0] if found else None
    flat = _flat(found[0])
    return flat if _products(flat) <= MAX_PRODUCTS else None


def _products(expression: Basic | MatrixBase) -> int:
    """Products inside of each other; SymPy evaluates each factor twice, so that time doubles."""
    inner = max((_products(part) for part in expression.args), default=0)
    return inner + isinstance(expression, Mul)


def _flat(expression: Basic | MatrixBase) -> Basic | MatrixBase:
    """The same sum or product with all its terms or factors side by side, as far as that goes."""
    if not isinstance(expression, Add | Mul):
        return expression
    parts = [_flat(part) for part in expression.args]
    kind = type(expression)
    sides = [side for part in parts for side in (part.args if type(part) is kind else (part,))]
    return kind(*sides, evaluate=False)


def _is_apart(a: Basic | MatrixBase, b: Basic | MatrixBase) -> bool:
    """Whether two expressions are of different kinds or differ in value at a probe.

    Equations are apart unless one is a multiple of the other: math-verify compares their solutions,
    and takes any two without a real solution for the same.
    """
    if any(isinstance(each, And) and each.has(Eq) for each in (a, b)):
        return True  # several equations at once take any time to solve: alike only to the letter
    is_equation = isinstance(a, Eq) and isinstance(b, Eq)
    if is_equation:
        a, b = a.args[0] - a.args[1], b.args[0] - b.args[1]
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return isinstance(a, Expr) or isinstance(b, Expr)
    if a.has(nan, zoo) or b.has(nan, zoo):
        return True
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    ratios = []
    for probe in PROBES:
        point = {name: probe + index for index, name in enumerate(names)}
        try:
            value_a, value_b = complex(a.evalf(subs=point)), complex(b.evalf(subs=point))
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            return is_equation  # has no value, such as an unknown function's: for math-verify
        if not is_equation and not _is_close(value_a, value_b):
            return True
        ratios.append(value_a / value_b if value_b else 0)
    return is_equation and not (all(ratios) and _is_close(*ratios))


def _is_close(a: complex, b: complex) -> bool:
    return a == b or abs(a - b) <= MAX_RELATIVE_ERROR * max(abs(a), abs(b))


def _is_bounded(text: str, max_power: int) -> bool:
    """Whether the size of the text and its powers and factorials bound the time to compare it."""
    if len(text) > MAX_PARSED_CHARS or UNBOUNDED.search(text):
        return False
    power = 1
    for exponent in re.finditer(r"\^\s*", text):
        start = exponent.end()
        if text[start : start + 1] in BRACKETS:
            content = text[start + 1 : closing(text, start)]
        else:
            # LaTeX raises to the first digit, the parser to all of them.
            content = "".join(takewhile(str.isdecimal, text[start:])) or text[start : start + 1]
        if "!" in content or ("^" in content and not letters(content)):
            return False
        power *= math.prod(max(1, int(digits)) for digits in re.findall(r"\d+", content))
    return power <= max_power
