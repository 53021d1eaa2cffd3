"""Countdown answer: whether an expression makes the target of the given numbers, each used once.

A reference is `12 3 25=40`, numbers and target. The answer is the last line that starts with
`####`; it may hold numbers, + - * /, parentheses and spaces. Nothing in here evaluates text as
code: the expression is read token by token, with exact fractions and without recursion.
"""

import re
from fractions import Fraction

SELF_TEST: tuple[tuple[str, tuple[str, ...], bool | None], ...] = (
    ("25+12=37\n37+3=40\n#### (25+12)+3", ("12 3 25=40",), True),
    ("#### 3 + 25 + 12", ("12 3 25=40",), True),
    ("#### 6/(1-3/4)", ("1 3 4 6=24",), True),
    ("#### 2-3*4+20", ("2 3 4 20=10",), True),
    ("#### 8-3-2", ("2 3 8=7",), False),
    ("#### 40", ("12 3 25=40",), False),
    ("#### 25+15", ("12 3 25=40",), False),
    ("#### 20+20", ("20 3=40",), False),
    ("#### 25+12+3+0", ("12 3 25=40",), False),
    ("#### 12/(3-3)", ("12 3 3=12",), False),
    ("#### (25+12+3", ("12 3 25=40",), False),
    ("#### 25+12)+(3", ("12 3 25=40",), False),
    ("#### 5**2+15", ("5 2 15=40",), False),
    ("#### -5+45", ("5 45=40",), False),
    ("#### \u0662\u0665+12+3", ("12 3 25=40",), False),
    ("#### ", ("12 3 25=40",), False),
    ("25+12=37\n37+3=40", ("12 3 25=40",), None),
)

MARK = "####"
MAX_CHARS = 200
REFERENCE = re.compile(r"([0-9]+(?: [0-9]+)*)=([0-9]+)")
TOKEN = re.compile(r" *([0-9]+|[-+*/()]) *")
RANKS = {"+": 1, "-": 1, "*": 2, "/": 2}


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool = False) -> bool | None:
    """Whether the text's last answer is right for any reference; None if it holds none.

    Raises:
        ValueError: a reference is not numbers and a target.
    """
    expression = last_expression(text, is_cut_off)
    if expression is None:
        return None
    return any(is_right(expression, reference) for reference in references)


def is_answer(reference: str) -> bool:
    """Whether the reference is numbers and a target."""
    return REFERENCE.fullmatch(reference) is not None


def find_answer(text: str, is_cut_off: bool = False) -> str | None:
    """What the text's last answer makes of which numbers: nothing else decides if it is right.

    So `3+4` and `4 + 3` are one answer, and `2+5` is another. What is no expression stands for
    itself, without spaces, so that it is none of those.
    """
    expression = last_expression(text, is_cut_off)
    if expression is None:
        return None
    try:
        value, numbers = evaluate(expression)
    except (ValueError, ZeroDivisionError):
        return expression.replace(" ", "")
    return f"{value} of {sorted(numbers)}"


def last_expression(text: str, is_cut_off: bool) -> str | None:
    """What stands behind the last mark; None without one.

    Where the length limit cut the text, its last line may be half an expression and doesn't count.
    """
    lines = text.split("\n")[: -1 if is_cut_off else None]
    answers = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    return answers[-1] if answers else None


def is_right(expression: str, reference: str) -> bool:
    """Whether the expression has the value and the numbers of the reference."""
    read = REFERENCE.fullmatch(reference)
    if read is None:
        raise ValueError(f"reference {reference!r} is not of the form '12 3 25=40'")
    try:
        value, numbers = evaluate(expression)
    except (ValueError, ZeroDivisionError):
        return False
    return value == int(read[2]) and sorted(numbers) == sorted(map(int, read[1].split()))


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Value of an expression and the numbers in it, by two stacks: of values and of operators.

    Raises:
        ValueError: it is no expression, or too long.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"more than {MAX_CHARS} characters")
    numbers: list[int] = []
    values: list[Fraction] = []
    signs: list[str] = []
    needs_value, position = True, 0
    while position < len(expression):
        token = TOKEN.match(expression, position)
        if token is None or (token[1] == "(" or token[1].isdigit()) is not needs_value:
            raise ValueError(f"no expression at {position}")
        position = token.end()
        if token[1].isdigit():
            numbers.append(int(token[1]))
            values.append(Fraction(numbers[-1]))
        elif token[1] == ")":
            _reduce(values, signs, rank=1)
            if not signs:
                raise ValueError("a parenthesis too many")
            signs.pop()
        elif token[1] != "(":
            _reduce(values, signs, rank=RANKS[token[1]])
        if token[1] in "(+-*/":
            signs.append(token[1])
        needs_value = token[1] in "(+-*/"
    if needs_value:
        raise ValueError("no expression at its end")
    _reduce(values, signs, rank=1)
    if signs:
        raise ValueError("a parenthesis is not closed")
    return values[0], numbers


def _reduce(values: list[Fraction], signs: list[str], *, rank: int) -> None:
    """Apply the operators on top of the stack that bind at least as tightly as `rank`."""
    while signs and RANKS.get(signs[-1], 0) >= rank:
        right, left = values.pop(), values.pop()
        match signs.pop():
            case "+":
                values.append(left + right)
            case "-":
                values.append(left - right)
            case "*":
                values.append(left * right)
            case "/":
                values.append(left / right)
