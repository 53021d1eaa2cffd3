r"""Math claims: answers that say what something is, as x = 3, m + n = 7 or \pi \approx 3.14."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from treerpo_ray.verifier._math.expression import Term, read
from treerpo_ray.verifier._math.notation import closing, key, split
from treerpo_ray.verifier._math.regions import is_relation
from treerpo_ray.verifier._math.units import without_unit
from treerpo_ray.verifier._math.value import is_same_value, ratio_of_differences, real_value

IsSame = Callable[[str, str], bool]
EQUALS = re.compile(r"=|\\approx(?![a-z])|\\equiv(?![a-z])|\\in(?![a-z])")
WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[A-Za-z][A-Za-z .'-]*)+(?:_\{?[\w\s\\]+\}?)?")
COMMA, COLON = re.compile(","), re.compile(":")
APPROX = r"\approx"
MAX_NAME_CHARS = 80
ROUNDING = Fraction(999, 1000)  # of the last place: rounded or cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    name: str
    """What the values are of; "" if the first member is a value itself."""
    exact: tuple[str, ...]
    approximate: tuple[str, ...]


def name_and_value(text: str) -> tuple[str, str] | None:
    """The name and what stands behind the first = of x = 3; None if the text is no such claim."""
    claim = _claim(text)
    if claim is None or not claim.name:
        return None
    exact, approximate = " = ".join(claim.exact), rf" {APPROX} ".join(claim.approximate)
    return claim.name, rf" {APPROX} ".join(filter(None, (exact, approximate)))


def is_same_claim(a: str, b: str, is_same: IsSame) -> bool | None:
    """Compare x = 3 with x = 3 and with 3; None if neither text states anything."""
    claim_a, claim_b = _claim(a), _claim(b)
    if claim_a is None and claim_b is None:
        return None
    if claim_a is None or claim_b is None:
        claim, plain = (claim_b, a) if claim_b is not None else (claim_a, b)
        assert claim is not None
        return _states(claim, plain, is_same)
    if claim_a.name and claim_b.name and _is_same_name(claim_a.name, claim_b.name):
        return _is_same_values(claim_a, claim_b, is_same)
    return _is_same_equation(a, b, is_same)


def _claim(text: str) -> _Claim | None:
    members = split(text, EQUALS)
    if len(members) < 3 or "" in members:
        return None
    values, signs = members[::2], members[1::2]
    if len(values) == 2 and _is_name(values[1]) and not _is_name(values[0]) and signs == ["="]:
        values.reverse()  # 5 = x
    name = ""
    if _is_name(values[0]):
        name, first_sign = values.pop(0), signs[0]
        signs = signs[1:]
        if first_sign == APPROX:
            return _Claim(name=name, exact=(), approximate=tuple(values))
    num_exact = signs.index(APPROX) + 1 if APPROX in signs else len(values)
    exact, approximate = tuple(values[:num_exact]), tuple(values[num_exact:])
    return _Claim(name=name, exact=exact, approximate=approximate)


def _is_name(text: str) -> bool:
    """Whether the text names something, in a word, a letter or an expression of several letters.

    2x = 6 is an equation to solve, x^2 = 4 and m + n = 4 tell what was asked for.
    """
    text = text.strip()
    if len(text) > MAX_NAME_CHARS or is_relation(text):
        return False
    if WORDS.fullmatch(text):
        return True
    is_group = text.startswith("(") and closing(text, 0) == len(text) - 1
    parts = split(text[1:-1], COMMA)[::2] if is_group else split(text, COLON)[::2]
    if len(parts) > 1:
        return all(map(_is_name, parts))
    term = read(text)
    if term is None:
        return bool(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))) and "," not in text
    return _is_name_term(term)


def _is_name_term(term: Term) -> bool:
    unknowns = _unknowns(term)
    if len(unknowns) != 1:
        return len(unknowns) > 1
    if term.kind in ("+", "-", "*"):
        return False
    return term.kind != "^" or not _is_name_term(term.parts[0]) or term.parts[1].kind == "number"


def _unknowns(term: Term) -> set[str]:
    own = {term.name} if term.kind in ("symbol", "applied") else set()
    return own.union(*map(_unknowns, term.parts))


def _is_same_name(a: str, b: str) -> bool:
    if WORDS.fullmatch(a) and WORDS.fullmatch(b) and max(len(a), len(b)) > 1:
        return key(a).lower() == key(b).lower()
    return key(a) == key(b) or is_same_value(a, b)


def _states(claim: _Claim, plain: str, is_same: IsSame) -> bool:
    """Whether the claim is of what the text says: exactly, or as its rounded value."""
    if claim.exact and not _is_consistent(claim.exact):
        return False
    if claim.exact and is_same(claim.exact[-1], plain):
        return True
    if not claim.approximate:
        return False
    is_near = not claim.exact or _is_near(claim.exact[-1], claim.approximate[-1])
    return is_near and is_same(claim.approximate[-1], plain)


def _is_same_values(a: _Claim, b: _Claim, is_same: IsSame) -> bool:
    for own, other in ((a.exact, b.exact), (a.approximate, b.approximate)):
        if own and other and not _is_same_members(own, other, is_same):
            return False
    return bool((a.exact and b.exact) or (a.approximate and b.approximate))


def _is_same_members(a: Sequence[str], b: Sequence[str], is_same: IsSame) -> bool:
    if len(a) == len(b) and all(map(is_same, a, b)):
        return True
    if any(read(member) is None for member in (*a[:-1], *b[:-1])):
        return False
    return _is_consistent(a) and _is_consistent(b) and is_same(a[-1], b[-1])


def _is_consistent(members: Sequence[str]) -> bool:
    """Whether what is said to be equal is so, as far as it can be read."""
    if any("\n" in member for member in members):
        return False
    readable = [member for member in members if read(member) is not None]
    return all(is_same_value(member, readable[-1]) for member in readable[:-1])


def _is_near(exact: str, rounded: str) -> bool:
    """Whether a decimal is what the value rounds to, in its last place or one off."""
    decimal = re.fullmatch(r"[+-]?\d*(?:\.(\d+))?", key(without_unit(rounded)[0]))
    values = [real_value(without_unit(text)[0]) for text in (exact, rounded)]
    if decimal is None or values[0] is None or values[1] is None:
        return False
    return abs(values[0] - values[1]) * 10 ** len(decimal[1] or "") < ROUNDING


def _is_same_equation(a: str, b: str, is_same: IsSame) -> bool:
    """Whether the sides are the same, or the one equation is a multiple of the other.

    That holds for equations in several unknowns or for two that are both not solved: 2x = 6 does
    not answer what x is.
    """
    sides_a, sides_b = split(a, EQUALS), split(b, EQUALS)
    if len(sides_a) != len(sides_b) or sides_a[1::2] != sides_b[1::2]:
        return False
    values_a, values_b = sides_a[::2], sides_b[::2]
    if not any(map(_has_unknown, (*values_a, *values_b))):
        # cos(pi) = -1 and cos(3 pi) = -1 are true of other things.
        is_turned = all(map(_is_same_spelling, values_a, values_b[::-1]))
        is_of_same = _is_same_spelling(values_a[0], values_b[0])
        return is_turned or (is_of_same and all(map(is_same, values_a, values_b)))
    if all(map(is_same, values_a, values_b)) or all(map(_is_same_name, values_a, values_b[::-1])):
        return True
    if len(sides_a) != 3 or sides_a[1] != "=":
        return False
    if _is_solved(sides_a) != _is_solved(sides_b):
        return False
    pair_a, pair_b = (sides_a[0], sides_a[2]), (sides_b[0], sides_b[2])
    return ratio_of_differences(pair_a, pair_b) is not None


def _has_unknown(text: str) -> bool:
    term = read(text)
    return term is None or bool(_unknowns(term))


def _is_same_spelling(a: str, b: str) -> bool:
    return key(a) == key(b) or (read(a) is not None and read(a) == read(b))


def _is_solved(sides: list[str]) -> bool:
    """Whether it tells a number of one unknown."""
    left, right = read(sides[0]), read(sides[2])
    if left is None or right is None:
        return False
    has_symbol = "symbol" in (left.kind, right.kind)
    return has_symbol and not (_unknowns(left) and _unknowns(right))
