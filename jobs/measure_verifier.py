"""Measure verifier: how many wrong neighbours and how many rewritings of references it accepts.

python jobs/measure_verifier.py math500.jsonl gsm8k_test.jsonl math_train.jsonl.gz
python jobs/measure_verifier.py --judged answers_misjudged.jsonl --show math500.jsonl

A neighbour has one digit, sign, bracket, root or the like changed; one that SymPy has for the same
value counts apart. --judged takes answers with `answer`, `reference`, `right` and `kind`.
"""

import argparse
import gzip
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job has only a working folder

from treerpo_ray.verifier.math_answer import check_answer

Change = Callable[[str], Iterator[str]]

Form = Callable[[re.Match[str]], str]

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NUMERIC = re.compile(r"-?(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}|\d*\\pi)")
LIST = re.compile(r"[^,()\[\]{}]+(?:,(?!\\[!,])[^,()\[\]{}]+)+")
PAIR = re.compile(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])")
WORD = re.compile(r"\\text\{([A-Za-z]{2,})\}")
MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def each(pattern: str, *replacements: str) -> Change:
    """A change of one place at a time."""

    def change(text: str) -> Iterator[str]:
        for found in re.finditer(pattern, text):
            for replacement in replacements:
                yield text[: found.start()] + found.expand(replacement) + text[found.end() :]

    return change


def digits(text: str) -> Iterator[str]:
    """Another digit for each that counts: not in the index of a name, nor before a command."""
    for found in re.finditer(r"(?<!\\phantom )(?<!\\hspace\{)\d", text):
        for step in (1, 4):
            yield text[: found.start()] + str((int(found[0]) + step) % 10) + text[found.end() :]


def elements(text: str) -> Iterator[str]:
    """A list or tuple with an element less, one more, or two in turn."""
    if LIST.fullmatch(text) and not re.search(r"\d{3}|text", text):
        parts = text.split(",")
        yield ",".join(parts[1:])
        yield ",".join([*parts, "97"])
    elif pair := PAIR.fullmatch(text):
        opener, left, right, closer = pair.groups()
        if left.strip() != right.strip():
            yield f"{opener}{right},{left}{closer}"
        yield f"{opener}{left},{right},97{closer}"
        yield f"{'[' if opener == '(' else '('}{left},{right}{closer}"
        yield f"{opener}{left},{right}{']' if closer == ')' else ')'}"


def larger(text: str) -> Iterator[str]:
    """A number or expression with something more."""
    if NUMERIC.fullmatch(text) and text.strip("-") not in ("0", "97", "097"):
        yield from (f"{text}+1", rf"{text}\pi", rf"\sqrt{{{text}}}+2", f"2({text})", f"{text}x")
        yield from (f"({text})^2+97", f"{text}, 97", f"x={text}+1", f"{text}e^{{97}}", f"-({text})")
        yield from (rf"{text} or 97", rf"97\cdot {text}", f"{text}=97", f"97={text}", f"97:{text}")
        yield from (rf"97 \approx {text}", f"{text}_3", f"[{text}, 97)", rf"{text} \ne x")


NEIGHBOURS: dict[str, Change] = {
    "digit": digits,
    "sign": each(r"(?<!\\phantom )(?<=[\w})\s])([+-])(?=[\s\w\\(])", "*", "+97"),
    "plus or minus": each(r"\+", "-"),
    "minus": each(r"(?<=[\w})] )-(?= )", "+"),
    "first sign": each(r"^-(?=[\d\\])(?!0$)", ""),
    "root": each(r"\\sqrt(?=\{(?!1\}))", "", r"\\sqrt[3]"),
    "upside down": each(r"\\frac\{(\w+)\}\{(?!\1\})(\w+)\}", r"\\frac{\2}{\1}"),
    "power": each(r"(?<=[a-z)])\^\{?[2-9]\}?", "", "^{11}"),
    "constant": each(r"\\pi(?![a-z])", "", "e"),
    "unknown": each(r"(?<![\\A-Za-z{])[xyabnt](?![A-Za-z}])", "q"),
    "function": each(r"\\(?:sin|tan)", r"\\cos "),
    "relation": each(r"<|\\le(?:q)?(?![a-z])", ">", r"\\ge "),
    "strict": each(r"<|>", r"\\ne "),
    "point": each(r"(?<=\d)\.(?=\d)", "", ".0"),
    "elements": elements,
    "union": each(r"\\cup", r"\\cap", ","),
    "infinite": each(r"-\\infty", r"\\infty"),
    "unit": each(r"\\text\{\s*(?:cm|inches|feet|meters|dollars|hours)\s*\}", r"\\text{ parsecs}"),
    "word": each(r"(?<=\\text\{)[A-Za-z]{2,}(?=\})", "zebra"),
    "larger": larger,
}


def answers(*templates: str) -> Change:
    """Whole responses that state the reference X."""

    def change(text: str) -> Iterator[str]:
        yield from (template.replace("X", text) for template in templates)

    return change


def whole(pattern: re.Pattern[str] | str, *forms: str | Form) -> Change:
    """Other forms of a reference that is the pattern."""

    def change(text: str) -> Iterator[str]:
        if found := re.fullmatch(pattern, text):
            for form in forms:
                yield form(found) if callable(form) else found.expand(form)

    return change


def within(pattern: str, replacement: str | Form) -> Change:
    """The reference with every place of a kind in another form."""

    def change(text: str) -> Iterator[str]:
        changed = re.sub(pattern, replacement, text)
        if changed != text:
            yield changed

    return change


def in_code(text: str) -> Iterator[str]:
    """The reference as a program would have it."""
    if re.match(r"-?\d+\s*\\frac", text):
        return  # a mixed number
    changed = re.sub(r"(?<=\d)\s*(?=\\sqrt|\\pi|[a-z(])", "*", text)
    changed = re.sub(r"\\sqrt\{(\w+)\}", r"sqrt(\1)", changed).replace(r"\pi", "pi")
    changed = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", changed)
    changed = re.sub(r"\^\{?(\d+)\}?", r"**\1", changed)
    if changed != text and not re.search(r"[\\{}=,_]|[a-z]\d|[a-z]{2}(?<!rt|pi)", changed):
        yield changed


def thousands_parted_by(separator: str) -> Form:
    """A whole number with something between its thousands."""
    return lambda found: f"{int(found[0]):,}".replace(",", separator)


def parted_by(separator: str) -> Form:
    """A list with something else between its elements."""
    return lambda found: found[0].replace(",", separator)


def decimal(found: re.Match[str]) -> str:
    value = Fraction(found[0])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


RESPONSES: dict[str, Change] = {
    "boxed": answers(r"So it is $\boxed{X}$.", r"\[\boxed{X}\]"),
    "sentence": answers("The answer is $X$.", r"Hence the final answer is \(X\)."),
    "minerva": answers("So.\nFinal Answer: The final answer is $X$. I hope it is correct."),
    "tag": answers("<think>It is 7.</think><answer>X</answer>", "<answer> $X$ </answer>"),
    "new line": answers("ANSWER:\nX", "**Answer:**\n\n$X$"),
    "hashes": answers("1 + 1 = 2\n#### X"),
    "end token": answers("The answer is $X$.</s>", "#### X<|im_end|>", r"\boxed{X}<|endoftext|>"),
    "last formula": answers("We had 7 of them, so in the end it comes to $X$."),
}

SPELLINGS: dict[str, Change] = {
    "dfrac": within(r"\\frac", r"\\dfrac"),
    "slash": whole(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", r"\1\2/\3"),
    "slash before": within(r"(?<![\d\w ])\\frac\{(\d+)\}\{(\d+)\}(?=\s*\\?[a-z])", r"\1/\2 "),
    "spaces": within(r"(?<=[\d})])([+=,-])(?!\\!)(?=[\d\\({])", r" \1 "),
    "thin spaces": within(r"(?<=[\d})])([+-])(?=[\d\\({])", r"\\,\1\\,"),
    "size": within(r"\((.*)\)", r"\\left(\1\\right)"),
    "unit": whole(r"\d+", r"\g<0> \\text{ cm}", r"\g<0> apples", r"\g<0>\\mathrm{~km}", r"\g<0>cm"),
    "unit after": whole(
        r"[^,=<>]*(?:\\sqrt\{\d+\}|\\pi|\\frac\{\d+\}\{\d+\})",
        *(r"\g<0> cm", r"\g<0>\\text{ units}"),
    ),
    "degrees": whole(r"(\d+)\s*\^\{?\\circ\}?", r"\1", r"\1°", r"\1 degrees", r"\1^{\\circ}"),
    "thousands": whole(
        r"-?\d{4,}",
        *map(thousands_parted_by, (",", "{,}", r"\,", " ", r",\!")),
    ),
    "name": whole(
        NUMERIC,
        *(r"x = \g<0>", r"m+n=\g<0>", r"P(A)=\g<0>", r"\\text{Area} = \g<0>", r"AB=\g<0>"),
        *(r"\\angle ABC=\g<0>", r"\g<0> = x"),
    ),
    "code": in_code,
    "zeros": whole(r"-?\d+", r"\g<0>.0", r"\\mathbf{\g<0>}", r"{\g<0>}", r"(\g<0>)"),
    "fraction of a decimal": whole(r"-?\d*\.\d+", decimal),
    "scientific": whole(
        r"([1-9])000", r"\1e3", r"\1 \\times 10^3", r"\1*10^{3}", r"\1 \\cdot 10^3"
    ),
    "power of ten": whole(r"\d+", lambda found: f"{int(found[0])}0 / 10"),
    "list": whole(LIST, *map(parted_by, (" and ", " or ", ";")), lambda f: rf"\{{{f[0]}\}}"),
    "system": whole(r"\(([^,()]+),([^,()]+)\)", r"x = \1, y = \2", r"(x,y)=(\1,\2)"),
    "matrix": whole(
        MATRIX,
        r"\\begin{bmatrix}\1\\end{bmatrix}",
        r"\\left[\\begin{array}{cc}\1\\end{array}\\right]",
    ),
    "interval": whole(r"\(([^,()]+),\s*\\infty\)", r"x > \1", r"\1 < x", r"\\{x \\mid x > \1\\}"),
    "closed": whole(
        r"\[([^,()\[\]]+),([^,()\[\]]+)\]",
        *(r"\1 \\le x \\le \2", r"x \\in [\1,\2]", r"[\1;\2]"),
    ),
    "word": whole(WORD, r"\1", r"\\mathrm{\1}", r"\\textbf{\1}", lambda f: f[1].upper(), r"\1."),
    "choice": whole(
        r"\\text\{\(?([A-F])\)?\}",
        *(r"\1", r"(\1)", r"\\textbf{(\1)}\\ 12", r"(\1) Plane", r"\1: 12"),
    ),
    "percent": whole(r"(\d+)\\%", r"\1", r"\1 percent", lambda f: str(int(f[1]) / 100)),
    "upright": within(r"(?<![\\A-Za-z{])([ei])(?![A-Za-z])", r"\\mathrm{\1}"),
    "mixed sides": whole(r"([^+=,(){}<>-]+)\+([^+=,(){}<>-]+)", r"\2 + \1"),
    "equation": whole(r"([^=,<>]+)=([^=,<>]+)", r"\2 = \1"),
    "markup": answers(r"\large X", "**X**", r"X \\", "<b>X</b>", r"\displaystyle X", "X."),
    "dollars": whole(
        r"\\\$(\d+(?:\.\d+)?)", r"\1", r"\1 \\text{ dollars}", r"$\1", r"\\text{\\$\1}"
    ),
}


def references(paths: list[str]) -> list[str]:
    """The different answers of the files, in order."""
    found: dict[str, None] = {}
    for path in paths:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt") as file:
            found.update((json.loads(line)["answer"].strip(), None) for line in file)
    return [each for each in found if each]


def is_independently_equal(a: str, b: str) -> bool:
    """Whether SymPy has both for the same value, so that a change was none."""
    from latex2sympy2_extended import latex2sympy

    try:
        difference = latex2sympy(a) - latex2sympy(b)
        return bool(abs(difference.evalf(60)) < 1e-40)
    except Exception:
        return False


class Tally:
    """Grades pairs and counts, by kind, how many are accepted."""

    def __init__(self) -> None:
        self.graded: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.seconds = 0.0

    def add(self, kind: str, text: str, reference: str, *, is_right: bool) -> None:
        start = time.process_time()
        try:
            is_accepted = check_answer(text, (reference,)) is True
        except Exception:
            is_accepted = False
        self.seconds += time.process_time() - start
        self.graded[kind] += 1
        self.accepted[kind] += is_accepted
        if is_accepted is not is_right:
            self.examples[kind].append((text, reference))

    def summary(self) -> dict[str, float]:
        total, accepted = self.graded.total(), self.accepted.total()
        share = accepted / max(1, total)
        return {"pairs": total, "accepted": accepted, "share": share, "seconds": self.seconds}

    def table(self) -> str:
        return "\n".join(
            f"  {kind:24}{self.accepted[kind]:7} of {self.graded[kind]:7}  "
            f"{self.accepted[kind] / self.graded[kind]:7.2%}"
            for kind in self.graded
        )


def measure_neighbours(golds: list[str]) -> Tally:
    """Grade references with one thing changed, in a box and in a sentence in turn."""
    tally = Tally()
    for kind, change in NEIGHBOURS.items():
        for gold in golds:
            for wrong in dict.fromkeys(change(gold)):
                if wrong.replace(" ", "") == gold.replace(" ", ""):
                    continue
                is_boxed = tally.graded[kind] % 2
                text = rf"It is \boxed{{{wrong}}}." if is_boxed else f"The answer is ${wrong}$."
                tally.add(kind, text, gold, is_right=False)
    return tally


def measure_rewrites(golds: list[str], per_kind: int) -> Tally:
    """Grade references as other people write them."""
    tally, draw = Tally(), random.Random(0)
    for kind, change in {**RESPONSES, **SPELLINGS}.items():
        texts = [(text, gold) for gold in golds for text in change(gold)]
        for text, gold in draw.sample(texts, min(per_kind, len(texts))):
            response = text if kind in RESPONSES else rf"\boxed{{{text}}}"
            tally.add(kind, response, gold, is_right=True)
    return tally


def measure_judged(path: str) -> tuple[int, int]:
    """How many answers of the file are judged as it says, and how many it has."""
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    is_text = re.compile("extraction|math-verify")
    right = 0
    for row in rows:
        text = row["answer"] if is_text.search(row["kind"]) else rf"\boxed{{{row['answer']}}}"
        try:
            right += (check_answer(text, (row["reference"],)) is True) is row["right"]
        except Exception:  # an error is no verdict
            continue
    return right, len(rows)


def main() -> None:
    """Print a table of shares and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", help="problems, with the references as `answer`")
    parser.add_argument("--per-kind", type=int, default=400, help="rewritings of each kind")
    parser.add_argument("--judged", help="answers with references and what is right")
    parser.add_argument("--show", action="store_true", help="print the pairs that are misjudged")
    settings = parser.parse_args()
    golds = references(settings.paths)
    wrong, right = measure_neighbours(golds), measure_rewrites(golds, settings.per_kind)
    same = {
        pair
        for pairs in wrong.examples.values()
        for pair in pairs
        if is_independently_equal(re.split(r"\\boxed\{|\$", pair[0])[1].removesuffix("}."), pair[1])
    }
    for title, tally in (("wrong neighbours", wrong), ("rewritings", right)):
        print(f"{title} accepted\n{tally.table()}")
        if settings.show:
            for kind, pairs in tally.examples.items():
                for text, gold in pairs[:40]:
                    note = "  (the same value)" if (text, gold) in same else ""
                    print(f"    {kind}: {text!r} for {gold!r}{note}")
    result = {"neighbours": wrong.summary(), "rewrites": right.summary(), "same_value": len(same)}
    if settings.judged:
        result["judged"] = dict(zip(("right", "of"), measure_judged(settings.judged), strict=True))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
