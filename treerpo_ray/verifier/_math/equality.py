r"""Math equality: whether two answers, in LaTeX or plain, are the same.

Precision comes first: a false reward teaches a trick, a missed one only costs signal. So numbers
are compared exactly (0.333 is not 1/3), bracket kinds and tuple order count, a list or set may come
in any order, units that differ are an error, and 10_2 is not 10. An answer is taken apart by its
structure down to single expressions, whose values `value` compares; what cannot be read, or
would cost unbounded time (power towers, large factorials, sums), equals only its own spelling.
Nothing in here evaluates text as code.
"""

import re
from collections.abc import Callable, Sequence

from treerpo_ray.verifier._math.claims import is_same_claim, name_and_value
from treerpo_ray.verifier._math.final_answer import MAX_ANSWER_CHARS
from treerpo_ray.verifier._math.matrices import is_same_matrix
from treerpo_ray.verifier._math.notation import (
    closing,
    key,
    nesting,
    normalised,
    split,
    with_joined_thousands,
)
from treerpo_ray.verifier._math.regions import (
    UNION,
    condition,
    is_relation,
    is_same_region,
    is_same_relation,
    region,
)
from treerpo_ray.verifier._math.units import in_one_unit, without_unit
from treerpo_ray.verifier._math.value import is_same_value

MAX_NESTING = 12


SHORT_WORDS = ("yes", "no", "odd")


BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


BASE = re.compile(rf"(-?\d[0-9A-F]*|[0-9A-F]{{2,}})_\{{?(\d+|{'|'.join(BASES)})\}}?")


DIGITS = re.compile(r"-?[0-9A-F]+")


TEXT = re.compile(r"\\text\{([^{}]*)\}")


WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'-]*|\([A-Za-z][A-Za-z .'-]*\)")


CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?\(?([A-J])\)?")


CHOICE_WITH_TEXT = re.compile(  # whose text is no other choice
    r"(?:\(([A-J])\)[\s.:]*|([A-J])\s*[.):]\s+)(?![,\s]*\(?[A-J]\)?(?:[,\s]|$))(\S.*)", re.DOTALL
)


CLOCK = re.compile(r"0?(\d{1,2}):([0-5]\d)(?::([0-5]\d))?")
TIME = re.compile(
    r"(?:\\text\{\s*)?(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d))?(?::(?P<second>[0-5]\d))?"
    r"(?:(?:\\text\{|\\mathrm\{|\\[,; ]|[~\s])*(?P<half>[ap])\.?\s*m\.?)?\s*\}?",
    re.IGNORECASE,
)
"""Time of the day, with the half of it that is meant."""


CONGRUENCE = re.compile(r"(.+?)\s*\(?\\[pb]?mod(?![a-z])\s*\{?([^{}]+?)\}?\)?", re.DOTALL)


COMMA, SEMICOLON, COLON = re.compile(","), re.compile(";"), re.compile(":")


COMMA_OR_SEMICOLON = re.compile("[,;]")


INDEX = re.compile(r"_\{?\d+\}?$")


NAMED_SET = re.compile(r"\\setminus|\\mathbb")


PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-z])")


def is_equal(answer: str, reference: str) -> bool:
    """Whether the answer is the reference; false where either is empty.

    An answer of 60,120 may be a list or one number, a reference of it is a list.
    """
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARS:
        return False
    a, b = normalised(answer), normalised(reference)
    if not (a and b):
        return False
    joined = with_joined_thousands(a)
    return _is_same(a, b) or (joined != a and _is_same(joined, b))


def _is_same(a: str, b: str) -> bool:
    """Compare spellings, then structures; `b` is the reference."""
    return bool(a) if key(a) == key(b) else is_same_structure(a, b)


def is_same_structure(a: str, b: str) -> bool:
    """The first rule that is about such answers decides."""
    if max(nesting(a), nesting(b)) > MAX_NESTING:
        return False
    a, b = (in_one_unit(condition(text) or text) for text in (a, b))
    for is_same in RULES:
        verdict = is_same(a, b)
        if verdict is not None:
            return verdict
    return _is_same_quantity(a, b)


def _is_same_base(a: str, b: str) -> bool | None:
    based_a, based_b = BASE.fullmatch(key(a)), BASE.fullmatch(key(b))
    if based_a and based_b:
        return (based_a[1], _base(based_a)) == (based_b[1], _base(based_b))
    if based_b and DIGITS.fullmatch(key(a)):
        return key(a) == based_b[1]  # the question names the base
    return based_a and (based_a[1], _base(based_a)) == (key(b), 10)


def _base(number: re.Match[str]) -> int:
    return BASES.index(number[2]) + 2 if number[2] in BASES else int(number[2])


def _is_same_choice(a: str, b: str) -> bool | None:
    """Compare (B) 12 with B; where both have a text, the text counts as well."""
    plain_a, plain_b = (TEXT.sub(r"\1", text).strip() for text in (a, b))
    with_text_a, with_text_b = map(CHOICE_WITH_TEXT.fullmatch, (plain_a, plain_b))
    choice_a, choice_b = map(CHOICE.fullmatch, (plain_a, plain_b))
    if with_text_a and choice_b:
        return (with_text_a[1] or with_text_a[2]) == choice_b[1]
    if choice_a and choice_b:
        return choice_a[1] == choice_b[1]
    if with_text_b and choice_a:
        return (with_text_b[1] or with_text_b[2]) == choice_a[1]
    return None


def _is_same_words(a: str, b: str) -> bool | None:
    text_a, text_b = TEXT.fullmatch(a), TEXT.fullmatch(b)
    words_a, words_b = (text_a[1] if text_a else a), (text_b[1] if text_b else b)
    if not (WORDS.fullmatch(words_a.strip()) and WORDS.fullmatch(words_b.strip())):
        return False if (text_a or text_b) and words_a != words_b else None
    is_short = max(len(key(a)), len(key(b))) <= 3 and key(a).lower() not in SHORT_WORDS
    if not text_a and not text_b and is_short:
        return None  # xy and yx are products
    parts = [
        sorted(re.sub(r"s$", "", word) for word in re.sub(r"[^a-z,]", "", words.lower()).split(","))
        for words in (words_a, words_b)
    ]
    return parts[0] == parts[1]


def _is_same_time(a: str, b: str) -> bool | None:
    """Compare times of the day of which one at least says which half of it is meant."""
    found_a, found_b = TIME.fullmatch(a.strip()), TIME.fullmatch(b.strip())
    if not (found_a and found_b and (found_a["half"] or found_b["half"])):
        return None
    halves = {found["half"].lower() for found in (found_a, found_b) if found["half"]}
    times = [
        [int(found[part] or 0) for part in ("hour", "minute", "second")]
        for found in (found_a, found_b)
    ]
    return len(halves) == 1 and times[0] == times[1]


def _is_same_ratio(a: str, b: str) -> bool | None:
    """Compare 2:4:6 with 1:2:3 and 3:4 with 3/4; a time of the day is no ratio."""
    if any("=" in text or "|" in text for text in (a, b)):
        return None
    (a, unit_a), (b, unit_b) = without_unit(a), without_unit(b)
    parts_a, parts_b = split(a, COLON)[::2], split(b, COLON)[::2]
    if len(parts_a) == len(parts_b) == 1:
        return None
    clock_a, clock_b = CLOCK.fullmatch(key(a)), CLOCK.fullmatch(key(b))
    if clock_a or clock_b or unit_a or unit_b:
        is_same_unit = unit_a == unit_b or not (unit_a and unit_b)
        return bool(clock_a and clock_b and is_same_unit and clock_a.groups() == clock_b.groups())
    if 1 in (len(parts_a), len(parts_b)):
        fractions = [rf"\frac{{{p[0]}}}{{{p[1]}}}" for p in (parts_a, parts_b) if len(p) == 2]
        return bool(fractions) and is_same_value(fractions[0], a if len(parts_a) == 1 else b)
    if len(parts_a) != len(parts_b) or any(is_same_value(p[-1], "0") for p in (parts_a, parts_b)):
        return False
    return all(
        is_same_value(f"({x})({parts_b[-1]})", f"({y})({parts_a[-1]})")
        for x, y in zip(parts_a, parts_b, strict=True)
    )


def _is_same_list(a: str, b: str) -> bool | None:
    separator = SEMICOLON if _has_rows(a) or _has_rows(b) else COMMA_OR_SEMICOLON
    (parts_a, is_set_a), (parts_b, is_set_b) = _parts(a, separator), _parts(b, separator)
    if any(len(p) == 1 and name_and_value(t) for p, t in ((parts_a, a), (parts_b, b))):
        return None  # S = \{1,2\}
    if len(parts_a) > 1 or len(parts_b) > 1:
        if _is_same_system(parts_a, b) or _is_same_system(parts_b, a):
            return True
        if (is_relation(a) or is_relation(b)) and not (is_set_a or is_set_b):
            return _is_matching(parts_a, parts_b) or None
        if len(parts_b) == 1 and not is_set_a and not is_set_b:
            return all(_is_same(part, b) for part in parts_a)  # 26/36, or 13/18
        values_a, values_b = _without_name(parts_a, parts_b), _without_name(parts_b, parts_a)
        if _named(values_a)[1] or _named(values_b)[1]:
            return _is_matching(parts_a, parts_b)
        return _is_matching(values_a, values_b)
    return _is_matching(parts_a, parts_b) if is_set_a or is_set_b else None


def _has_rows(text: str) -> bool:
    """Whether semicolons part lists of the same length, as in x = 1, y = 2; x = 3, y = 4."""
    lengths = {len(split(part, COMMA)) for part in split(text, SEMICOLON)[::2]}
    return ";" in text and len(lengths) == 1 and lengths != {1}


def _parts(text: str, separator: re.Pattern[str]) -> tuple[list[str], bool]:
    """Elements of a list or of a set in braces, and whether there are braces."""
    text = text.strip()
    is_set = text.startswith(r"\{") and closing(text, 1) == len(text) - 1
    parts = split(text[2:-2] if is_set else text, separator)[::2]
    return [
        variant
        for part in parts
        for variant in ((_signed(part, "+-"), _signed(part, "-+")) if _has_both(part) else (part,))
    ], is_set


def _has_both(text: str) -> bool:
    return bool(PLUS_MINUS.search(text))


def _signed(text: str, signs: str) -> str:
    r"""The text with the first of the signs for \pm and the second for \mp."""
    return PLUS_MINUS.sub(lambda sign: signs[sign[1] == "mp"], text)


def _is_same_system(parts: Sequence[str], other: str) -> bool:
    """Whether x = 3, y = -3 are the values of the tuple or list, by the order of the names."""
    claims = [name_and_value(part) for part in parts]
    values = {key(claim[0]): claim[1] for claim in claims if claim}
    if len(values) < max(2, len(claims)):
        return False
    other = other.strip()
    if other.startswith("(") and closing(other, 0) == len(other) - 1:
        other = other[1:-1]
    others = split(other, COMMA_OR_SEMICOLON)[::2]
    if any(map(name_and_value, others)):
        return False
    ordered = [values[name] for name in sorted(values)]
    return len(ordered) == len(others) and all(map(_is_same, ordered, others))


def _without_name(parts: list[str], others: list[str]) -> list[str]:
    """The values of x = 5, x = 6 or of x = 5, 6, where the others are of x, too, or of no name.

    x_1 = 5, x_2 = 6 are values of x; where the others have such names as well, the names count.
    """
    claims, names = _named(parts)
    _, other_names = _named(others)
    has_name = bool(claims[0]) and (all(claims) or not any(claims[1:]))
    if not has_name or (len(names) > 1 and len(other_names) > 1):
        return parts
    names = {INDEX.sub("", each) for each in names} if len(names) > 1 else names
    if len(other_names) > 1:
        other_names = {INDEX.sub("", each) for each in other_names}
    if len(names) > 1 or (other_names and names != other_names):
        return parts
    return [claim[1] if claim else part for claim, part in zip(claims, parts, strict=True)]


def _named(parts: list[str]) -> tuple[list[tuple[str, str] | None], set[str]]:
    claims = [name_and_value(part) for part in parts]
    return claims, {key(claim[0]) for claim in claims if claim}


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


def _is_same_stated(a: str, b: str) -> bool | None:
    return is_same_claim(a, b, _is_same)


def _is_same_range(a: str, b: str) -> bool | None:
    """Compare intervals, unions of them and inequalities; two plain brackets are for a group."""
    if not any(is_relation(t) or UNION.search(t) or NAMED_SET.search(t) for t in (a, b)):
        return None
    region_a, region_b = region(a), region(b)
    if region_a is not None and region_b is not None:
        return is_same_region(region_a, region_b, _is_same)
    return is_relation(a) and is_relation(b) and is_same_relation(a, b, _is_same)


def _is_same_group(a: str, b: str) -> bool | None:
    """Compare tuples and intervals: the same brackets, the same elements in order."""
    groups = []
    for text in (a.strip(), b.strip()):
        is_whole = text[:1] in ("(", "[") and closing(text, 0) == len(text) - 1
        parts = split(text[1:-1], COMMA_OR_SEMICOLON)[::2] if is_whole else []
        groups.append((text[0] + text[-1], parts) if len(parts) > 1 else ("", []))
    (kind_a, parts_a), (kind_b, parts_b) = groups
    if not (kind_a or kind_b):
        return None
    is_alike = kind_a == kind_b and len(parts_a) == len(parts_b)
    return is_alike and all(map(_is_same, parts_a, parts_b))


def _is_same_matrix(a: str, b: str) -> bool | None:
    return is_same_matrix(a, b, _is_same)


def _is_same_congruence(a: str, b: str) -> bool | None:
    """Compare residues; the modulus counts where both name one."""
    found_a, found_b = CONGRUENCE.fullmatch(a), CONGRUENCE.fullmatch(b)
    if not (found_a or found_b):
        return None
    if found_a and found_b and not _is_same(found_a[2], found_b[2]):
        return False
    return _is_same(found_a[1] if found_a else a, found_b[1] if found_b else b)


def _is_same_quantity(a: str, b: str) -> bool:
    """Compare expressions with their units; a percentage may be written as its share."""
    (a, unit_a), (b, unit_b) = without_unit(a), without_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    if is_same_value(a, b) or key(a) == key(b):
        return True
    if "%" not in (unit_a, unit_b) or unit_a == unit_b:
        return False
    share_a, share_b = (
        rf"\frac{{{text}}}{{100}}" if unit == "%" else text
        for text, unit in ((a, unit_a), (b, unit_b))
    )
    return is_same_value(share_a, share_b)


RULES: tuple[Callable[[str, str], bool | None], ...] = (
    _is_same_base,
    _is_same_choice,
    _is_same_time,
    _is_same_words,
    _is_same_ratio,
    _is_same_list,
    _is_same_matrix,
    _is_same_congruence,
    _is_same_stated,
    _is_same_range,
    _is_same_group,
)
