r"""Math final answer: finds in a text what it says that its answer is.

A text says so by \boxed{}, <answer>, `#### x` or "answer is x", the first of these that it has; the
last such place counts. A text without any of them is taken to end in its answer.
"""

import re

from treerpo_ray.verifier._math.notation import with_joined_thousands
from treerpo_ray.verifier._math.units import NOT_A_UNIT

MAX_ANSWER_CHARS = 1000


MAX_TAIL_CHARS = 4000  # in which a text that doesn't state its answer must have it


END_TOKEN = re.compile(
    r"<\|[\w \u2581]{1,30}\|>|<\uff5c[^<>\uff5c]{1,30}\uff5c>|</?s>"
    r"|<(?:pad|eos|bos|unk|end_of_turn|start_of_turn)>"
    r"|\[(?:PAD|EOS)\]"
)


TOKEN = re.compile(r"(\\(?:boxed|fbox|framebox)\s*\{)|\\.|[{}]", re.DOTALL)


BOX_NAME = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?\s*=)\s*\\?[,;]?\s*$")


BETWEEN_BOXES = re.compile(
    r"(?=.*(?:,|;|\band\b|\bor\b))(?:[\s$,;&]|\\[()\[\],;: ]|\\q?quad|\b(?:and|or)\b"
    r"|\\text\{\s*,?\s*(?:and|or)?\s*,?\s*\})*(?:[A-Za-z](?:_\{?\w+\}?)?\s*=\s*)?[\s$]*"
)


BARE_BOX = re.compile(r"\\boxed\s*(-?\d+)")


TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)


HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")


CLAIM = re.compile(
    r"\b(?:answers?|(?:correct|right|best|final) (?:option|choice|result|value))\b[*_]*"
    r"(?:\s*\([^()\n]{1,30}\))?\s*(?:\b(?:is|are|would be|must be|equals)\b|:|=)[\s:*_]*"
    r"(?:(?:therefore|thus|simply|(?:the )?(?:option|choice))\s+[*_]*)?",
    re.IGNORECASE,
)


INSIDE = r"(?:\\.|[^$\\\n])"  # of a formula in single dollars


FIRST_MATH = re.compile(
    rf"\$\$([^$]+?)\$\$|(?<!\\)\$({INSIDE}{{1,1000}})\$"
    r"|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]",
    re.DOTALL,
)


NEXT_MATH = re.compile(r"\s*(,\s*and|,\s*or|,|;|and\b|or\b)\s*(?=\$|\\[(\[])")


LISTED = re.compile(r"\s*(?:,\s*and|,\s*or|,|;|and|or)\s*")


EMPTY = re.compile(r"\\(?:boxed|fbox|framebox)|[{}\s$*]")


SENTENCE_END = re.compile(
    r"(?:[.?]|(?<![^\W\d_])!|(?<=[a-z]{2})!)(?:\s|\*|$)|,\s+(?!and\b|or\b)(?=[a-z]{2})"
    r"|\s+(?:because|since)\b|\n"
)


FILLER = re.compile(  # words before an answer that change nothing about it
    r"^(?:(?:approximately|about|roughly|exactly|precisely|then|thus|therefore|hence|simply|just"
    r"|indeed|actually|clearly|that|there|are|is|the|value|result|total|a|of)\s+)+"
    r"(?=[-+\d$\\(\[{*])",
    re.IGNORECASE,
)


RIGHT_OPTION = re.compile(
    r"\b(?:option|choice)\s+[*_]*\(?([A-J])\)?[*_]*\s+is\s+(?:the\s+)?(?:correct|right|best)",
    re.IGNORECASE,
)


LAST_CHOICE = re.compile(
    r"(?:^|[\s:,*])\(([A-J])\)[\s.*]*$|\b(?:option|choice)\s+\(?([A-J])\)?[\s.*]*$"
)


NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?"
)


LAST_MATH = re.compile(  # a dollar before a digit is money, and one behind a space opens
    rf"\$\$([^$]+?)\$\$|(?<!\\)\$(?=\S)({INSIDE}{{0,1000}}?\S)(?<!\\)\$(?!\d)"
    r"|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]",
    re.DOTALL,
)


TEXT = re.compile(r"\\(?:text|mathrm|mbox)[a-z]*\s*\{[^{}]*\}")


MAX_FORMULA_WORDS = 2  # more of them stand between two amounts of money


PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")


MAX_WORDS = 12  # of an answer that is no worked solution


WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")


MATH_COMMAND = re.compile(r"\\[A-Za-z]+")


NEXT_SENTENCE = re.compile(r"[a-z][.!?]\s+[A-Z]|[A-Za-z]{2}.*\n.*[A-Za-z]{2}")


MAX_LOOK_BACK = 200  # characters in which the value before an "or" must begin


ALTERNATIVE = re.compile(r"(?<!\S)([^\sA-Za-z]*\d[^\sA-Za-z,.;]*),?\s+(?:or|and)$")


OPERATORS = "+-*/^=<>_({[|"


def stated_answer(text: str, is_cut_off: bool = False) -> str | None:
    """What the text says that its answer is, in so many words; None if it says nothing like it.

    Where the length limit cut the text, its last line may be half an answer, so that only a box in
    it counts.
    """
    text = _without_end_tokens(text)
    box = boxes(text)
    if box is not None:
        return box
    if is_cut_off:
        text = text.rpartition("\n")[0]
    for pattern in (BARE_BOX, TAG, HASHES):
        found = [each.strip() for each in pattern.findall(text) if each.strip()]
        if found:
            return _said(found[-1]) or found[-1]
    return _said(text)


def reference_answer(reference: str) -> str:
    """The answer that a worked solution states; another reference is its own answer.

    Behind `####` stands one number, whose commas part thousands.
    """
    stated = stated_answer(reference)
    if stated is None:
        return reference
    return with_joined_thousands(stated) if HASHES.search(reference) else stated


def is_sentence(text: str) -> bool:
    """Whether the text is prose that no answer would be spelt like."""
    words = WORD.findall(MATH_COMMAND.sub(" ", text))
    return len(words) > MAX_WORDS or bool(words and NEXT_SENTENCE.search(text))


def last_expression(text: str) -> str | None:
    """The last formula, option or number of a text that doesn't state its answer."""
    text = _without_end_tokens(text).rstrip()[-MAX_TAIL_CHARS:]
    if choice := LAST_CHOICE.search(text):
        return choice[1] or choice[2]
    numbers = list(NUMBER.finditer(text))
    formulas = [
        each
        for each in LAST_MATH.finditer(text)
        if EMPTY.sub("", _content(each))
        and len(PROSE.findall(TEXT.sub("", _content(each)))) <= MAX_FORMULA_WORDS
    ]
    if formulas:
        formula, tail = formulas[-1], text[formulas[-1].end() :]
        is_last = not numbers or numbers[-1].start() < formula.end()
        if is_last and (re.search(r"\d", formula[0]) or not numbers or len(tail.split()) <= 3):
            start = len(formulas) - 1
            while start and LISTED.fullmatch(
                text[formulas[start - 1].end() : formulas[start].start()]
            ):
                start -= 1
            return ", ".join(_content(each).strip().rstrip(".,;") for each in formulas[start:])
    return _whole_expression(text, numbers[-1]) if numbers else None


def last_box(text: str) -> str | None:
    r"""Content of the last balanced \boxed{} or \fbox{} that is not empty, and of a box in it."""
    found = _boxes(text)
    return _inner(text[slice(*found[-1])]) if found else None


def boxes(text: str) -> str | None:
    r"""Content of the last box, or of the last few if nothing but "and" or a comma parts them."""
    found = _boxes(text)
    if not found:
        return None
    start = len(found) - 1
    while start and _is_listed(text, found[start - 1], found[start]):
        start -= 1
    together = [(_box_name(text, place), _inner(text[slice(*place)])) for place in found[start:]]
    if len(together) == 1:
        return together[0][1]
    has_names = all(name for name, _ in together)
    parts = [f"{name} {content}" if has_names else content for name, content in together]
    return ", ".join(dict.fromkeys(parts))


def _without_end_tokens(text: str) -> str:
    has_any = "<" in text or "[PAD]" in text or "[EOS]" in text
    return END_TOKEN.sub("\n", text) if has_any else text


def _boxes(text: str) -> list[tuple[int, int]]:
    """Where the content of each balanced box that is not empty starts and ends; outer ones only."""
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # start of a box's content, none for another brace
    for token in TOKEN.finditer(text):
        if token[1]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and text[start : token.start()].strip():
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, token.start()))
    return found


def _inner(content: str) -> str:
    content = content.strip()
    if len(content) > MAX_ANSWER_CHARS:
        return content
    return last_box(content) or content


def _is_listed(text: str, box: tuple[int, int], after: tuple[int, int]) -> bool:
    opener = text.rfind("\\", box[1], after[0])
    between = text[box[1] + 1 : opener]
    return len(between) < MAX_ANSWER_CHARS and bool(BETWEEN_BOXES.fullmatch(between))


def _box_name(text: str, place: tuple[int, int]) -> str:
    before = text[max(0, place[0] - 40) : place[0]].rpartition("\\")[0]
    name = BOX_NAME.search(before)
    return name[1] if name else ""


def _said(text: str) -> str | None:
    """What stands behind the last "answer is" or its like."""
    claims, options = list(CLAIM.finditer(text)), list(RIGHT_OPTION.finditer(text))
    if options and not (claims and claims[-1].start() > options[-1].start()):
        return options[-1][1]
    if not claims:
        return None
    last = claims[-1]
    claim = text[last.end() : last.end() + 2 * MAX_ANSWER_CHARS]
    if tag := TAG.match(claim):
        claim = tag[1].strip()
    claim = FILLER.sub("", claim)
    said = _formulas(claim) or SENTENCE_END.split(claim)[0].strip(" *`_")
    return said if EMPTY.sub("", said) else None


def _formulas(claim: str) -> str | None:
    """The formula that the claim starts with, and others that are listed behind it."""
    parts, end = [], 0
    while found := FIRST_MATH.match(claim, end):
        formula = found
        parts.append(_content(formula).strip())
        listed = NEXT_MATH.match(claim, formula.end())
        if listed is None:
            break
        end = listed.end()
    if parts and _goes_on(claim[formula.end() :].lstrip()):
        return None
    return ", ".join(parts) or None


def _goes_on(text: str) -> bool:
    """Whether the text makes another number of the one before it, as in 5 million or 5 of 7."""
    word = NOT_A_UNIT.match(text)
    if word is None or word[0].lower() not in ("and", "or", "of", "to"):
        return word is not None
    return bool(re.match(r"\s*(?:[\d$(]|\\|an?\b|half)", text[word.end() :]))


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None)


def _whole_expression(text: str, number: re.Match[str]) -> str:
    """The number with all that belongs to it: 2^{10}, (2, 5) or 3-5, not their last number.

    Of a statement such as x = 5 or 2 + 3 = 5 it is what stands behind the last equals sign, unless
    there is something to solve, or another value before it.
    """
    start, end = _word(text, number.start(), number.end())
    word = text[start:end]
    if PROSE.search(word):
        return number[0]
    while True:
        before = text[:start].rstrip()
        if not before or "\n" in text[len(before) : start]:
            break
        if alternative := ALTERNATIVE.search(before, max(0, len(before) - MAX_LOOK_BACK)):
            start = alternative.start(1)
            continue
        if not _belongs(before, text[start:end]):
            break
        start = _word(text, len(before) - 1, len(before))[0]
        if PROSE.search(text[start : len(before)]):
            start = len(before) + 1
            break
    whole = text[start:end].strip().strip("*").rstrip(".,;:!?").lstrip("=,:; ")
    return _value_of_statement(text[:start], whole)


def _word(text: str, start: int, end: int) -> tuple[int, int]:
    """The ends of what stands around it without a space."""
    while start and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    return start, end


def _belongs(before: str, after: str) -> bool:
    """Whether an operator or an open bracket ties two words together."""
    opened = sum(after.count(closer) for closer in ")]}") - sum(map(after.count, "([{"))
    if opened > 0:
        return True
    if before[-1] in OPERATORS or re.search(r"\\[A-Za-z]+$", before):
        return True
    is_mixed = re.fullmatch(r"\d+/\d+\W*", after) and re.search(r"(?<![\w.])\d+$", before)
    return bool(is_mixed) or after[0] in "+*/^=<>" or after.startswith(("- ", "\\"))


def _value_of_statement(before: str, statement: str) -> str:
    left, equals, right = statement.rpartition("=")
    if not equals or not right.strip():
        return statement
    has_other = re.search(r"=\s*[^\s=]+,?\s+(?:or|and)\s*$", before.rstrip())
    if has_other:
        return f"{before.rstrip()[has_other.start() :].lstrip('= ')} {statement}"
    is_to_solve = re.search("[A-Za-z]", left) and re.search(r"[\d+*/^-]", left)
    return statement if is_to_solve else right.strip()
