"""Math tokens: the numbers, commands and signs of an expression, numbers by their exact value."""

import re
from fractions import Fraction

MAX_EXPONENT_DIGITS = 4  # of a number such as 1.5e-12


TOKEN = re.compile(
    r"""\s*(?:
    (?P<repeating>(?P<whole>\d*)\.(?P<once>\d*)\\(?:overline|bar|dot)\s*\{(?P<again>\d+)\})
    |(?P<endless>\d*\.\d+)(?:\.\.\.|\\[lc]?dots(?![A-Za-z]))
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![.\d]))
    |(?P<sign>\\[A-Za-z]+|\\%|[A-Za-z]|[-+*/^_!'%|()\[\]{},])
    )""",
    re.VERBOSE,
)


PERIOD = re.compile(r"(\d*)\.(\d*?)(\d+?)\3+")


class Unreadable(ValueError):
    """The text is no expression, or one of several meanings."""


def tokens(text: str) -> list[str | Fraction]:
    """Numbers as values, everything else as it is written.

    Raises:
        Unreadable: something in the text is part of no expression.
    """
    found: list[str | Fraction] = []
    text = text.strip()
    end = 0
    while end < len(text):
        token = TOKEN.match(text, end)
        if token is None:
            raise Unreadable(text)
        end = token.end()
        found.append(token["sign"] or _number(token))
    return found


def _number(token: re.Match[str]) -> Fraction:
    if token["repeating"]:
        return _repeating_decimal(token["whole"], token["once"], token["again"])
    if token["endless"]:
        period = PERIOD.fullmatch(token["endless"])
        repeated = period and len(token["endless"]) - period.end(2)
        if not period or not repeated or repeated < 3:
            raise Unreadable(token["endless"])
        return _repeating_decimal(*period.groups())
    return _decimal(token["number"])


def _decimal(text: str) -> Fraction:
    """Exact value of digits, a point and an exponent.

    Raises:
        Unreadable: the exponent or the number is out of all bounds.
    """
    exponent = re.search(r"[eE][+-]?0*(\d+)$", text)
    if exponent and len(exponent[1]) > MAX_EXPONENT_DIGITS:
        raise Unreadable(text)
    return Fraction(text if text[-1] != "." else text[:-1])


def _repeating_decimal(whole: str, once: str, again: str) -> Fraction:
    """Exact value of 0.1666..., given as 0, 1 and 6."""
    shift = 10 ** len(once)
    tail = Fraction(int(again), (10 ** len(again) - 1) * shift)
    return int(whole or 0) + Fraction(int(once or 0), shift) + tail
