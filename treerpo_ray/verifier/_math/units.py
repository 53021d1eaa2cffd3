"""Math units: the unit behind a quantity, and what a quantity of several units comes to."""

import re
from fractions import Fraction
from itertools import pairwise

WORD = r"[A-Za-z][A-Za-z ./]*"


POWER = r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?"


TEXT_UNIT = re.compile(
    rf"(.*?[^\s,=])\s*((?:\s*(?:/|\\cdot)?\s*\\text\{{\s*{WORD}\}}{POWER})+)", re.DOTALL
)


SHORT = (
    r"[kM]?(?:eV|Hz|Pa|[JWN])(?![A-Za-z])|[ap]\.?m|[kcmdn]?m|km/h|m/s|mi|ft|in|yd|kg|mg|lbs?|oz"
    r"|hrs?|mph|mL|ml|kJ|cc|gal|min|sec"
)


PLAIN_UNIT = re.compile(
    rf"([+-]?[\d.,/:]+)(?:\s+((?:[A-Za-z]{{3}}|{SHORT}|sq)[A-Za-z ./]*)){POWER}"
)


KNOWN = (
    r"(?:[cmk]m|km/h|m/s|ft|kg|(?:square|sq\.?|cubic) [a-z]+"
    r"|(?:centi|milli|kilo)?(?:met|lit)(?:er|re)s?"
    r"|(?:kilo|milli)?grams?|inch(?:es)?|foot|feet|yards?|miles?|units?|degrees?|radians?|dollars?"
    r"|cents?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|mph|pounds?|ounces?|gallons?)"
)


KNOWN_UNIT = re.compile(rf"(.*?[\d}})a-z])\s+({KNOWN}(?: per [a-z]+)?){POWER}", re.DOTALL)


GLUED_UNIT = re.compile(
    rf"([+-]?[\d.,/]*\d)([cmk]m|kg|ft|mph|lbs?|oz|hrs?|mL|ml)(?![A-Za-z]){POWER}"
)


FRACTION_UNIT = re.compile(
    r"(.*[\d})])\s*\\frac\{\s*(?:\\text\{)?\s*([a-z]{1,3})\s*\}?\s*\}"
    r"\{\s*(?:\\text\{)?\s*([a-z]{1,3})\s*\}?\s*\}",
    re.DOTALL,
)


SHORT_UNITS = {"m", "km", "cm", "mm", "mi", "ft", "in", "g", "kg", "L", "s", "h", "hr", "min"}


PERCENT = re.compile(r"(.*?[^\s\\])\s*(?:\\?%|\\text\{\s*percent\s*\}|\bpercent)", re.DOTALL)


ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*)?\{?\s*(?:\\text\{\s*)?(?:st|nd|rd|th)\s*\}?\s*\}?")


ARC = re.compile(r"([+-]?[\d.]+)\s*'{1,2}")


NOT_A_UNIT = re.compile(  # words that make another number of the one before them
    r"\b(?:and|or|to|of|more|less|fewer|than|plus|minus|times|over|hal(?:f|ves)|thirds?|fourths?"
    r"|quarters?|fifths?|sixths?|eighths?|tenths?|dozens?|hundreds?|thousands?|[mbtr]*illions?"
    r"|squared|cubed|factorial|january|february|march|april|may|june|july|august|september"
    r"|october|november|december)\b",
    re.IGNORECASE,
)


SPELLINGS = (
    {"percent": "%", "degree": "", "inche": "inch", "in": "inch", "feet": "foot"}
    | {"ft": "foot", "hr": "hour", "h": "hour", "min": "minute", "sec": "second", "s": "second"}
    | {"lb": "pound", "meter": "m", "metre": "m", "mi": "mile", "yd": "yard", "oz": "ounce"}
    | {"centimeter": "cm", "kilometer": "km", "millimeter": "mm", "gram": "g", "kilogram": "kg"}
    | {"liter": "l", "litre": "l", "mph": "mile/hour", "yr": "year"}
)


PARTS = {  # of the unit before, how many of the next smaller one
    ("day", "hour"): 24,
    ("hour", "minute"): 60,
    ("minute", "second"): 60,
    ("week", "day"): 7,
    ("year", "month"): 12,
    ("foot", "inch"): 12,
    ("yard", "foot"): 3,
    ("pound", "ounce"): 16,
    ("dollar", "cent"): 100,
    ("m", "cm"): 100,
    ("kg", "g"): 1000,
}


QUANTITY = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:\\text\{)?\s*([A-Za-z]+)\.?\s*\}?\s*(?:,|and|\\text\{\s*and\s*\}|\s)*"
)


def without_unit(text: str) -> tuple[str, str]:
    """The text before a unit, and the unit in the singular: "" if there is none or degrees."""
    if percent := PERCENT.fullmatch(text):
        return percent[1], "%"
    if ordinal := ORDINAL.fullmatch(text) or ARC.fullmatch(text):
        return ordinal[1], ""
    ratio = FRACTION_UNIT.fullmatch(text)
    if ratio and {ratio[2], ratio[3]} <= SHORT_UNITS:
        return ratio[1], f"{_singular(ratio[2])}/{_singular(ratio[3])}"
    for pattern in (TEXT_UNIT, PLAIN_UNIT, KNOWN_UNIT, GLUED_UNIT):
        unit = pattern.fullmatch(text)
        if unit and not NOT_A_UNIT.search(unit[2]):
            return unit[1], _name(unit[2], None if pattern is TEXT_UNIT else unit[3])
    return text, ""


def _name(unit: str, power: str | None) -> str:
    """One spelling of a unit with the power behind it: sq. feet and ft^2 are foot^2."""
    words = re.sub(r"\\text|[{}]|\\cdot", " ", unit).strip()
    words = re.sub(r"(?i)^(?:sq(?:uare)?)\.? (.*)", r"\1^2", words)
    words = re.sub(r"(?i)^(?:cu(?:bic)?)\.? (.*)", r"\1^3", words)
    words = re.sub(r"\s+per\s+|\s*/\s*", "/", words)
    parts = [_singular(part) for part in words.split("/")]
    return "/".join(parts) + (f"^{power}" if power else "")


def _singular(name: str) -> str:
    name, _, power = name.partition("^")
    name = re.sub(r"[ .]", "", name)
    name = name if len(name) == 1 else name.lower()
    single = SPELLINGS.get(name) or re.sub(r"s$", "", name) if len(name) > 1 else name
    single = SPELLINGS.get(single, single)
    return single + (f"^{power}" if power else "")


def in_one_unit(text: str) -> str:
    """3 hours 30 minutes as 7/2 hours; another text as it is."""
    quantity = _several(text)
    return rf"{quantity[0]} \text{{ {quantity[1]}}}" if quantity else text


def _several(text: str) -> tuple[str, str] | None:
    total, end = Fraction(0), 0
    units: list[str] = []
    while end < len(text):
        part = QUANTITY.match(text, end)
        if part is None or len(part[1]) > 12:
            return None
        unit = _singular(part[2])
        if units:
            share = PARTS.get((units[-1], unit))
            if share is None:
                return None
            total *= share
        total += Fraction(part[1])
        units.append(unit)
        end = part.end()
    if len(units) < 2:
        return None
    for pair in pairwise(units):
        total /= PARTS[pair]
    return f"{total.numerator}/{total.denominator}", units[0]
