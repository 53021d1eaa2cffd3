r"""Math regions: sets of real numbers as intervals, unions, inequalities or set-builders.

x \ge 1, 1 \le x, [1,\infty) and \{x \mid x \ge 1\} are the same region.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from treerpo_ray.verifier._math.expression import read
from treerpo_ray.verifier._math.notation import closing, key, split
from treerpo_ray.verifier._math.value import ratio_of_differences, real_value

ORDER = re.compile(r"<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|=")


FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", "=": "="}


UNION = re.compile(r"\\cup(?![a-z])|\\lor(?![a-z])")


UNION_OR_COMMA = re.compile(UNION.pattern + "|,")


MINUS = re.compile(r"\\setminus(?![a-z])")


BUILDER = re.compile(
    r"\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid(?![a-z])|\||:)(.+)", re.DOTALL
)


COMMA = re.compile("[,;]")


AND = re.compile(r"\\land(?![a-z])")


INFINITE = r"\infty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """An end of an interval as it is written, and its place among the others."""

    text: str
    is_closed: bool
    place: Fraction | float | None
    """Nearly its value; None if it has unknowns in it."""


@dataclass(frozen=True, slots=True)
class Interval:
    low: Bound
    high: Bound
    name: str = ""
    """The unknown of an inequality."""


def condition(text: str) -> str | None:
    r"""What \{x \mid x > 1\} says of its elements; None for another text."""
    text = text.strip()
    if not (text.startswith(r"\{") and closing(text, 1) == len(text) - 1):
        return None
    found = BUILDER.fullmatch(text[2:-2])
    return found[1].strip() if found else None


def is_relation(text: str) -> bool:
    """Whether the text says that something is less, more or other than something."""
    return any(part != "=" for part in split(text, ORDER)[1::2])


def is_same_relation(a: str, b: str, is_same: Callable[[str, str], bool]) -> bool:
    """Whether two inequalities have the same sides, or one is a multiple of the other."""
    chains = [split(text, ORDER) for text in (a, b)]
    flipped = [FLIPPED.get(part, part) for part in reversed(chains[1])]
    for other in (chains[1], flipped):
        is_alike = len(chains[0]) == len(other) and chains[0][1::2] == other[1::2]
        if is_alike and all(map(is_same, chains[0][::2], other[::2])):
            return True
    if [len(chain) for chain in chains] != [3, 3]:
        return False
    (left_a, order_a, right_a), (left_b, order_b, right_b) = chains
    ratio = ratio_of_differences((left_a, right_a), (left_b, right_b))
    if ratio is None:
        return False
    return order_a == (order_b if ratio > 0 else FLIPPED[order_b])


def region(text: str) -> list[Interval] | None:
    """The intervals that the text is made of, in order and joined; None if it is no region."""
    minuend, *points = split(text, MINUS)[::2]
    separator = UNION_OR_COMMA if is_relation(minuend) else UNION
    pieces: list[Interval] = []
    for part in split(minuend, separator)[::2]:
        found = _condition(part) if is_relation(part) else _interval(part)
        if found is None:
            return None
        pieces += found
    for point in points:
        removed = _points(point)
        if removed is None:
            return None
        for bound in removed:
            pieces = [piece for each in pieces for piece in _without(each, bound)]
    if len({key(piece.name) for piece in pieces if piece.name}) > 1:
        return None
    return _joined(pieces, may_overlap="," not in text or separator is UNION)


def is_same_region(
    a: Sequence[Interval], b: Sequence[Interval], is_same: Callable[[str, str], bool]
) -> bool:
    """Whether two regions have the same intervals, and the same unknown if both name one."""
    names = {key(each.name) for each in (*a, *b) if each.name}
    if len(a) != len(b) or len(names) > 1:
        return False
    return all(
        x.is_closed == y.is_closed and is_same(x.text, y.text)
        for first, second in zip(a, b, strict=True)
        for x, y in ((first.low, second.low), (first.high, second.high))
    )


def _infinite(sign: str) -> Bound:
    return _bound(f"{sign}{INFINITE}", is_closed=False)


def _bound(text: str, *, is_closed: bool) -> Bound:
    spelt = key(text)
    if spelt.lstrip("+-") == INFINITE:
        sign = "-" if spelt[0] == "-" else ""
        return Bound(text=f"{sign}{INFINITE}", is_closed=is_closed, place=float(f"{sign}inf"))
    return Bound(text=text.strip(), is_closed=is_closed, place=real_value(text))


def _interval(text: str) -> list[Interval] | None:
    text = text.strip()
    if key(text) == r"\mathbb{R}":
        return [Interval(_infinite("-"), _infinite("+"))]
    if text.startswith(r"\{"):
        points = _points(text)
        return None if points is None else [Interval(point, point) for point in points]
    if text[:1] not in ("(", "[") or closing(text, 0) != len(text) - 1:
        return None
    ends = split(text[1:-1], COMMA)[::2]
    if len(ends) != 2 or text[-1] not in ")]":
        return None
    low = _bound(ends[0], is_closed=text[0] == "[")
    return [Interval(low, _bound(ends[1], is_closed=text[-1] == "]"))]


def _points(text: str) -> list[Bound] | None:
    text = text.strip()
    if text.startswith(r"\{") and closing(text, 1) == len(text) - 1:
        return [_bound(part, is_closed=True) for part in split(text[2:-2], COMMA)[::2]]
    return None


def _condition(text: str) -> list[Interval] | None:
    """The region of an inequality in one unknown that stands alone, or of two with `and`."""
    both = split(text, AND)[::2]
    if len(both) == 2:
        first, second = _condition(both[0]), _condition(both[1])
        if not (first and second and len(first) == len(second) == 1):
            return None
        return _common(first[0], second[0])
    chain = split(text, ORDER)
    if len(chain) == 3:
        left, order, right = chain
        return _half(left, order, right) or _half(right, FLIPPED[order], left)
    return _between(chain) if len(chain) == 5 else None


def _between(chain: list[str]) -> list[Interval] | None:
    """The region of low < name < high, in either direction."""
    if {chain[1], chain[3]} <= {">", r"\ge"}:
        chain = [FLIPPED.get(part, part) for part in reversed(chain)]
    low, first, name, second, high = chain
    if not {first, second} <= {"<", r"\le"} or not _is_unknown(name) or _has(name, low, high):
        return None
    ends = _bound(low, is_closed=first != "<"), _bound(high, is_closed=second != "<")
    return [Interval(*ends, name)]


def _half(name: str, order: str, limit: str) -> list[Interval] | None:
    if not _is_unknown(name) or not _is_known(limit):
        return None
    bound = _bound(limit, is_closed=order in (r"\le", r"\ge"))
    low, high = _infinite("-"), _infinite("+")
    inner = re.fullmatch(r"\|(.*)\|", name.strip())
    below = _bound(f"-({limit})", is_closed=bound.is_closed)
    if inner and order in ("<", r"\le"):
        return [Interval(below, bound, inner[1])]
    if inner and order in (">", r"\ge"):
        return [Interval(low, below, inner[1]), Interval(bound, high, inner[1])]
    if order == r"\ne" and not inner:
        return [Interval(low, bound, name), Interval(bound, high, name)]
    if inner or order == "=":
        return None
    return [Interval(low, bound, name)] if order in ("<", r"\le") else [Interval(bound, high, name)]


def _common(a: Interval, b: Interval) -> list[Interval] | None:
    """What lies in both, where one bounds from below and the other from above."""
    if key(a.name) != key(b.name):
        return None
    for first, second in ((a, b), (b, a)):
        if first.high.text == INFINITE and second.low.text == f"-{INFINITE}":
            return [Interval(first.low, second.high, first.name)]
    return None


def _is_unknown(text: str) -> bool:
    """Whether the text is an unknown, a value of a function, or the size of an unknown."""
    term = read(text)
    if term is not None and term.kind == "abs":
        term = term.parts[0]
    return term is not None and term.kind in ("symbol", "applied")


def _has(name: str, *texts: str) -> bool:
    return any(key(name) in key(each) for each in texts)


def _is_known(*texts: str) -> bool:
    return all(_bound(each, is_closed=False).place is not None for each in texts)


def _without(interval: Interval, point: Bound) -> list[Interval]:
    """The interval with a point of it taken out."""
    low, high = interval.low, interval.high
    if None in (low.place, high.place, point.place):
        return [interval]
    if low.place < point.place < high.place:  # type: ignore[operator]
        hole = replace(point, is_closed=False)
        return [replace(interval, high=hole), replace(interval, low=hole)]
    if low.place == point.place:
        return [replace(interval, low=replace(low, is_closed=False))]
    if high.place == point.place:
        return [replace(interval, high=replace(high, is_closed=False))]
    return [interval]


def _joined(pieces: list[Interval], *, may_overlap: bool) -> list[Interval] | None:
    """The pieces in order, those that touch as one; None if they overlap and may not.

    Pieces with a comma between them are taken for a union only where nothing lies in both.
    """
    if any(each.low.place is None or each.high.place is None for each in pieces):
        return pieces
    joined: list[Interval] = []
    for piece in sorted(pieces, key=lambda each: (each.low.place, not each.low.is_closed)):
        last = joined[-1] if joined else None
        if last is None or _is_apart(last.high, piece.low):
            joined.append(piece)
            continue
        if not may_overlap:
            return None
        ends = (last.high, piece.high)
        high = max(ends, key=lambda bound: (bound.place, bound.is_closed))
        joined[-1] = replace(last, high=high)
    return joined


def _is_apart(high: Bound, low: Bound) -> bool:
    assert high.place is not None and low.place is not None
    return high.place < low.place or (
        high.place == low.place and not (high.is_closed or low.is_closed)
    )
