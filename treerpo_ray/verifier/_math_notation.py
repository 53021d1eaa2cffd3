"""Math notation: brings answers, in LaTeX or plain, into one spelling and takes them apart."""

import re
from fractions import Fraction

REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:,\s*\\!|\\!,|\{,\}|\\,)\s*(?=\d{3}(?!\d))", ""),
        (r"\\\$\s*((?:\d[\d.,]*)?\d)", r"\1\\text{ dollar}"),
        (r"\\\$|\\?°|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])", ""),
        (r"\$|(?<!\\)\\[()\[\]]|^\*\*|\*\*$", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"(?<!\\)\\!|\\phantom\s*(?:\{[^{}]*\}|[^\\])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mathbf|boldsymbol|bm)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:mbox|mathrm|textbf|textit|textrm|textnormal|operatorname)\s*\{", r"\\text{"),
        (r"\\text\s*\{\s*(?:,|and|or|\s)+\s*\}", ","),
        (r"\\text\s*\{\s*([^{}A-Za-z]*)\s*\}", r"\1"),
        (
            r"\\frac\s*(?:\{([^{}]*)\}|(\w|\\pi))\s*(?:\{([^{}]*)\}|(\w|\\pi))",
            r"\\frac{\1\2}{\3\4}",
        ),
        (r"\\varnothing(?![a-z])", r"\\emptyset"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\geq(?:slant)?(?![a-z])", r"\\ge "),
        (r"\\leq(?:slant)?(?![a-z])", r"\\le "),
        (r"^\s*\\approx|(?<=[\d})])\s*\\approx.*", ""),  # the exact value counts
        (r",\s*,", ","),
    )
]


UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u222a": r"\cup ",
        "\u00a0": " ",
        "\u202f": " ",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "·": r"\cdot ",
        "÷": "/",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∞": r"\infty ",
        "½": r"\frac{1}{2}",
        "²": "^2",
        "³": "^3",
        "€": "",
        "£": "",
    }
)


THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


FRACTION = re.compile(r"([+-]?)(\d*)\\frac\{(-?\d+)\}\{(-?\d+)\}")


RATIO = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:/(\d+))?")


MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+)/(\d+)")


PERCENT = re.compile(r"(.*?[^\s\\])\s*(?:\\?%|\bpercent)", re.DOTALL)


UNIT = re.compile(r"(.*[^\s,])\s*\\text\{\s*([A-Za-z][A-Za-z ./]*)\}(\^\{?[23]\}?)?", re.DOTALL)


PLAIN_UNIT = re.compile(
    r"([+-]?[\d.,/]+)\s+((?:[A-Za-z]{3}|[cmk]m|ft|in|lb|kg|hr)[A-Za-z ]*)(\^[23])?"
)


NOT_A_UNIT = re.compile(  # words that make another number of the one before them
    r"\b(?:and|or|to|of|more|less|fewer|than|plus|minus|times|over|hal(?:f|ves)|thirds?|fourths?"
    r"|quarters?|fifths?|sixths?|eighths?|tenths?|dozens?|hundreds?|thousands?|[mbtr]*illions?"
    r"|squared|cubed|factorial)\b",
    re.IGNORECASE,
)


SPELLINGS = (
    {"percent": "%", "degree": "", "inche": "inch", "in": "inch", "feet": "foot"}
    | {"ft": "foot", "hr": "hour", "min": "minute", "sec": "second", "lb": "pound", "meter": "m"}
    | {"centimeter": "cm", "kilometer": "km", "millimeter": "mm"}
)


def normalised(text: str) -> str:
    """The text in one spelling: no dollars, degrees, sizes or spacing, one form of each command."""
    text = text.translate(UNICODE)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if not re.search(r"[(\[]|\\\{", text):  # in a tuple a comma separates
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text


def key(text: str) -> str:
    """The text without spaces, but for those between two digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def without_unit(text: str) -> tuple[str, str]:
    """The text before a unit, and the unit in the singular: "" if there is none or degrees."""
    percent = PERCENT.fullmatch(text)
    if percent:
        return percent[1], "%"
    unit = UNIT.fullmatch(text) or PLAIN_UNIT.fullmatch(text)
    if not unit or NOT_A_UNIT.search(unit[2]):
        return text, ""
    name = re.sub(r"^sq(?:uare)?\.? (.*)", r"\1^2", unit[2].strip().lower())
    name = re.sub(r"^cu(?:bic)?\.? (.*)", r"\1^3", name) + re.sub(r"[{}]", "", unit[3] or "")
    name, _, power = re.sub(r"[ .]|s(?=\^|$)", "", name).partition("^")
    return unit[1], SPELLINGS.get(name, name) + power


def number(text: str) -> Fraction | None:
    """Exact value of a plain integer, decimal, fraction or mixed number."""
    try:
        if mixed := MIXED.fullmatch(text):
            sign, whole, top, bottom = mixed.groups()
            return Fraction(f"{sign}1") * (int(whole) + Fraction(int(top), int(bottom)))
        compact = key(text)
        if ratio := RATIO.fullmatch(compact):
            return Fraction(ratio[1]) / int(ratio[2] or 1)
        if fraction := FRACTION.fullmatch(compact):
            sign, whole, top, bottom = fraction.groups()
            return Fraction(f"{sign}1") * (int(whole or 0) + Fraction(int(top), int(bottom)))
    except (ZeroDivisionError, ValueError):  # ValueError: more digits than Python converts
        pass
    return None


def letters(text: str) -> set[str]:
    """Letters outside of commands."""
    return set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", " ", text)) - {" "}


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`, of any kind; -1 if there is none."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if depth <= 0:
            return index
    return -1


def nesting(text: str) -> int:
    """Depth of the deepest bracket."""
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand outside of brackets."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and text.startswith(separator, index):
            parts.append(text[start:index].strip())
            start = index + len(separator)
    return [*parts, text[start:].strip()]
