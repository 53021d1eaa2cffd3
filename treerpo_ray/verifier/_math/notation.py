"""Math notation: brings answers, in LaTeX or plain, into one spelling and takes them apart."""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

Replacement = str | Callable[[re.Match[str]], str]


FUNCTION_WORDS = (
    "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|lg|log|exp|gcd|lcm|max|min"
)


def _joined_digits(number: re.Match[str]) -> str:
    return re.sub(r"[,\s]", "", number[0])


def _sexagesimal(angle: re.Match[str]) -> str:
    degrees, minutes, seconds = (int(part or 0) for part in angle.groups())
    total = degrees + Fraction(minutes, 60) + Fraction(seconds, 3600)
    return rf"\frac{{{total.numerator}}}{{{total.denominator}}}"


def _upright(style: re.Match[str]) -> str:
    """What is set upright is a unit or a word, unless it is a function or a letter's own sign."""
    content = style[1].strip()
    if re.fullmatch(FUNCTION_WORDS, content):
        return rf"\{content} "
    return content if content in ("e", "i", "d") else rf"\text{{{style[1]}}}"


def _matrix(array: re.Match[str]) -> str:
    """An array in brackets is the matrix with those brackets."""
    opener, body, closer = array.groups()
    kind = {"[]": "pmatrix", "()": "pmatrix", "||": "vmatrix"}.get(f"{opener}{closer}")
    if kind is None:
        return array[0]
    return rf"\begin{{{kind}}}{body}\end{{{kind}}}"


def _system(cases: re.Match[str]) -> str:
    rows = [row.strip(" ,;&") for row in re.split(r"\\\\", cases[1])]
    return ", ".join(row.replace("&", "") for row in rows if row)


MARKUP: list[tuple[str, Replacement]] = [
    ("[\u200b-\u200f\u2060\ufeff]", ""),
    (r"(?:√|(?<![A-Za-z\\])sqrt)\s*(\d+)", r"\\sqrt{\1}"),
    ("√", "sqrt"),
    (r"</?(?:b|i|em|strong|u|span|p|div|br)\s*/?>", " "),
    (r"(?<!\\)\\[()\[\]]|^\*\*|\*\*$", ""),
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|normalsize)(?![A-Za-z])", ""),
    (r"\\(?:tiny|small|large|Large|LARGE|huge|Huge|bf|rm|it)(?![A-Za-z])", " "),
    (r"(?<=\d)(?:,\s*\\!|\\!,|\{,\}|\\,)\s*(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"(?<!\\)\\!|\\phantom\s*(?:\{[^{}]*\}|[^\\])|\\hspace\s*\{[^{}]*\}", ""),
    (r"\\text\s*\{\s*(\\?\$\s*[\d.,]+)\s*\}", r"\1"),
    (r"\\textdollar(?![A-Za-z])|\\dollar(?![A-Za-z])", r"\\$"),
    (r"(?<=\\\$)\s*\d{1,3}(?:,\d{3})+", _joined_digits),
    (r"\\\$\s*((?:\d[\d.]*)?\d)", r"\1\\text{ dollar}"),
    (r"\\?\$", ""),
    (r"(?:\\\\|\\newline)[\s.]*$", ""),
    (r"[^\S\n]+", " "),
    (r"\s*\n\s*", "\n"),
    (r"^(?:\"|``|\u201c|')([A-Za-z][^\"']*)(?:\"|''|\u201d|')$", r"\1"),
    (r"\{\}(?=\d)", ""),
]
"""What is about how an answer looks."""


COMMANDS: list[tuple[str, Replacement]] = [
    (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\{([^{}]*?)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:mathrm|operatorname\*?)\s*\{([^{}]*)\}", _upright),
    (r"\\(?:mbox|textbf|textit|textrm|textnormal|textsf|emph)\s*\{", r"\\text{"),
    (r"\\[lr]brace(?![A-Za-z])", lambda brace: r"\{" if brace[0] == r"\lbrace" else r"\}"),
    (r"\\lbrack(?![A-Za-z])|\\langle(?![A-Za-z])", lambda b: "[" if "k" in b[0] else "("),
    (r"\\rbrack(?![A-Za-z])|\\rangle(?![A-Za-z])", lambda b: "]" if "k" in b[0] else ")"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\ast(?![A-Za-z])", "*"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
    (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\le "),
    (r"\\neq?(?![A-Za-z])|(?<!\S)!=|\\not\s*=", r"\\ne "),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r":=", "="),
    (
        r"^\s*(?:\\text\{\s*)?((?=[A-Z ]*[a-z])[A-Za-z]{2}[A-Za-z ]*?)"
        r"\s*(?::\s*\}|\}?\s*:)\s*(?=[-\d\\(])",
        r"\1 = ",
    ),
    (r"\\(?:approx(?:eq)?|simeq|doteq)(?![A-Za-z])|~=", r"\\approx "),
    (r"^\s*\\(?:approx|sim)(?![A-Za-z])", ""),
    (r"\\(?:ldots|dotsc|dotsb|cdots)(?![A-Za-z])|\.\.\.", r"\\dots "),
    (r"\\(?:backslash|smallsetminus)(?![A-Za-z])", r"\\setminus "),
    (r"\\(?:wedge|land)(?![A-Za-z])", r"\\land "),
    (r"\\(?:vee|lor)(?![A-Za-z])", r"\\lor "),
    (r"\^\s*\{?\s*((?:\\prime\s*)+)\}?", lambda primes: "'" * primes[1].count("prime")),
    (r"\\prime(?![A-Za-z])", "'"),
    (
        r"([\[(|])?\s*\\begin\{array\}(?:\[\w\])?\{[^{}]*\}(.*?)\\end\{array\}\s*([\])|])?",
        _matrix,
    ),
    (r"^\s*\(\s*(\\begin\{[pb]matrix\}.*\\end\{[pb]matrix\})\s*\)\s*$", r"\1"),
    (r"\\begin\{cases\}(.*)\\end\{cases\}", _system),
    (r"\\(?:begin|end)\{small(matrix)\}", lambda m: m[0].replace("small", "")),
]
"""One form of each command."""


PLAIN: list[tuple[str, Replacement]] = [
    (rf"(?<![A-Za-z\\])({FUNCTION_WORDS})(?=\s*[({{^])", r"\\\1"),
    (r"(?<![A-Za-z\\])(sin|cos|tan|ln|log|sqrt)(?=\s*(?:\d|\\[a-z]|[a-z](?![A-Za-z])))", r"\\\1 "),
    (r"(?<![A-Za-z\\])a(sin|cos|tan)(?=\s*\()", r"\\arc\1"),
    (r"(?<![A-Za-z\\])cbrt(?=\s*\()", r"\\sqrt[3]"),
    (r"(?<![A-Za-z\\])(pi|infinity|theta|alpha|beta)(?![A-Za-z])", r"\\\1 "),
    (r"\\infinity(?![A-Za-z])|(?<![A-Za-z\\])(?<=[-+(,\s])(?:inf|oo)(?=[\s)\],]|$)", r"\\infty "),
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"(?<![A-Za-z\\])all real(?: number)?s(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (
        r"\\frac\s*(?:\{([^{}]*)\}|(\w|\\pi))\s*(?:\{([^{}]*)\}|(\w|\\pi))",
        r"\\frac{\1\2}{\3\4}",
    ),
    (r",\s*,", ","),
]
"""What models write as if it were a program, or short."""


DEGREES: list[tuple[str, Replacement]] = [
    (r"\\degrees?(?![A-Za-z])|\\?°|\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\^\\circ\s*(?:\\text\{\s*)?([CF])\s*\}?(?![A-Za-z])", r"\\text{ degree \1}"),
    (r"(\d+)\s*\^\\circ\s*(\d+)\s*'(?:\s*(\d+)\s*'')?", _sexagesimal),
]


CONJUNCTIONS: list[tuple[str, Replacement]] = [
    (
        r"\s*\b(?:when|if|after|in) (?:simpl|lowest|reduc)[a-z]*(?: (?:form|terms))?\s*\.?$",
        "",
    ),
    (r"\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
    (r"\s*,?\s*(?<![A-Za-z\\])(and|or)(?![A-Za-z])\s*", lambda word: f" {word[1]} "),
    (r"\\text\s*\{\s*([^{}A-Za-z]*)\s*\}", r"\1"),
]


ANGULAR = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])|\\ne(?![a-z])")


UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u222a": r"\cup ",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u2032": "'",
        "\u2033": "''",
        "\u2044": "/",
        "π": r"\pi ",
        "θ": r"\theta ",
        "·": r"\cdot ",
        "÷": "/",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∞": r"\infty ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "∠": r"\angle ",
        "△": r"\triangle ",
        "\u211d": r"\mathbb{R}",
        "°": r"^\circ ",
        "\u00ba": r"^\circ ",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "²": "^2",
        "³": "^3",
        "€": "",
        "£": "",
    }
)


RULES = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (*MARKUP, *COMMANDS, *PLAIN, *DEGREES, *CONJUNCTIONS)
]


NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


DEGREE = re.compile(r"\^\s*\\circ(?![a-z])")


CONJUNCTION = re.compile(r"[\s,]* (and|or) [\s,]*")


BRACKETED = re.compile(r"[(\[]|\\\{")


THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


ONE_COMMA = re.compile(r"[1-9]\d{0,2},[1-9]\d\d")


SPACED_THOUSANDS = re.compile(r"(-?[1-9]\d{0,2}(?: \d{3})+)(?= *(?:\D|$))(?! *[,;])")


@lru_cache(maxsize=4096)
def normalised(text: str) -> str:
    """The text in one spelling: no dollars, sizes or spacing, one form of each command.

    A comma that may part two numbers or thousands stays: see `with_joined_thousands`.
    """
    if NUMBER.fullmatch(text):
        return text
    text = text.translate(UNICODE)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    if not ANGULAR.search(text):
        text = DEGREE.sub("", text)
    is_condition = INEQUALITY.search(text)
    both, either = (r" \land ", r" \lor ") if is_condition else (", ", ", ")
    text = CONJUNCTION.sub(lambda word: both if word[1] == "and" else either, text)
    if "=" in text and not is_condition:
        text = text.replace(r"\lor ", ",").replace(r"\land ", ",")
    text = re.sub(r",\s*,", ",", text).strip().rstrip(".,;:").strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if not BRACKETED.search(text):  # in a tuple a comma separates
        text = THOUSANDS.sub(
            lambda number: number[0] if ONE_COMMA.fullmatch(number[0]) else _joined_digits(number),
            text,
        )
        text = SPACED_THOUSANDS.sub(_joined_digits, text) if SPACED_THOUSANDS.match(text) else text
    return text


def with_joined_thousands(text: str) -> str:
    """The normalised text with 60,120 as one number, where it may be a list of two as well."""
    if BRACKETED.search(text):
        return text
    return THOUSANDS.sub(_joined_digits, text)


def key(text: str) -> str:
    """The text without spaces, but for those between two digits, nor marks of words."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return re.sub(r"(?<=[_^])\{(\w|')\}", r"\1", text)


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


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Parts between separators that stand outside of brackets, and the separators, in turn."""
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        found = separator.match(text, index) if depth == 0 else None
        if found and found.end() > index:
            parts += [text[start:index].strip(), found[0].strip()]
            start = index = found.end()
            continue
        depth += (text[index] in "([{") - (text[index] in ")]}")
        index += 1
    return [*parts, text[start:].strip()]
