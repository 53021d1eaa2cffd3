"""Hostile texts: what a model under training, or an attacker, may hand the verifier."""

import random

from treerpo_ray.verifier.verdict import Answer

TOKENS = (
    *("0", "1", "-1", "7", "12", "1/2", "0.5", ".1", "1e9", "1,000", "10_2", "9" * 50, "9" * 5000),
    *("x", "y", "e", "i", "E", "f(x)", "xy", "abc", "and", "percent", " cm", " dollars", "mod"),
    *("{", "}", "(", ")", "[", "]", r"\{", r"\}", r"\left(", r"\right)", "|", r"\lfloor", "$"),
    *("+", "-", "*", "**", "/", "//", "%", r"\%", "=", "<", ">", r"\le ", r"\ne ", r"\in ", "!"),
    *("^", "_", "^{", "_{", "^{-", ",", ";", ":", ".", "&", r"\\", " ", "\n", "\t", "~", r"\,"),
    *(r"\frac", r"\frac{1}{", r"\dfrac{", r"\sqrt", r"\sqrt{", r"\sqrt[3]{", r"\binom{9}{", r"\pm"),
    *(r"\log", r"\log_", r"\ln ", r"\sin", r"\arctan", r"\exp(", r"\max(", r"\gcd(", r"\Gamma("),
    *(r"\sum_{k=1}^{9}", r"\prod_{k=1}^", r"\int_0^1", r"\lim_{x\to 0}", r"\frac{d}{dx}"),
    *(r"\pi", r"\infty", r"\circ", r"^\circ", r"\cdot ", r"\times ", r"\div ", r"\cup ", r"\cap "),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
    *(r"\text{", r"\mathrm{", r"\operatorname{", r"\overline{", r"\hat", r"\boxed{", r"\fbox{"),
    *("####", "The answer is ", "answer: ", "**", r"\boxed", r"\(", r"\)", r"\[", r"\]", "```"),
    *(
        "\u2212",
        "√",
        "½",
        "²",
        "π",
        "∞",
        "≤",
        "٣",
        "\U0001d7d9",
        "\u200b",
        "\u202e",
        "\0",
        "\ufeff",
    ),
    *(
        "e\u0301",
        "\U0001f4a9",
        "\u0130",
        "ß",
        "\u2028",
        "\x1b[2J",
        "Ⅷ",
        "一",
        "\uff0b",
        "\ud800",
        "\x85",
    ),
)
CANARY = "CANARY"
CODE = (
    "__import__('os').system('touch CANARY')",
    "open('CANARY', 'w')",
    "exec(\"open('CANARY', 'w')\")",
    "eval(compile('open(\"CANARY\", \"w\")', 'a', 'exec'))",
    "(lambda: ().__class__.__bases__[0].__subclasses__())()",
    "x.__class__.__init__.__globals__",
    "Symbol('x').func('CANARY')",
    'sympify(\'open("CANARY", "w")\')',
    "{0.__class__.__mro__}%s%n%(x)s",
    "$(touch CANARY)`touch CANARY`; touch CANARY | touch CANARY",
    r"\write18{touch CANARY}",
    r"\input{/etc/passwd}\openout\file=CANARY",
    "!!python/object/apply:os.system ['touch CANARY']",
    "cos\nsystem\n(S'touch CANARY'\ntR.",
    "import os; os.mkdir('CANARY')",
)
OPENERS = (
    *(r"\frac{1}{", r"\frac{", r"\sqrt{", r"\sqrt[9]{", r"\boxed{", r"\text{", r"\left(", "9^{"),
    *("(", "[", "{", r"\{", "-", "!", "x^{", "2^", "a_{", "1+(", "f(", r"\log(", "=", "$"),
    *("1,", "(1,", r"\\", "&", r"\begin{pmatrix}", r"\sum_{i}", "#### ", "answer is ", ".1", "1/"),
)
CLOSERS = ("}", ")", "]", r"\}", "", "}{2}", r"\right)", r"\end{pmatrix}")

ATOMS = ("1", "2", "-3", "10", "0", "0.5", "x", "y", r"\pi", "e", "99999", "123456")
FORMS = (
    *("A+B", "A-B", "A B", "A/B", "(A)^{B}", "A^B", "A^{B}", "(A,B)", "[A,B)", "A,B"),
    *(r"\frac{A}{B}", r"\sqrt{A}", r"\sqrt[B]{A}", r"\log_{A}(B)", r"\binom{A}{B}"),
    *("A=B", r"\{A,B\}", r"\sin(A)", r"\ln(A)", "|A|", "A!", "(A)!", r"e^{A}", r"A\%"),
    *(r"\begin{pmatrix}A\\B\end{pmatrix}", r"A\cup B", r"\lfloor A\rfloor", "A_{B}"),
    *(r"A\pm B", r"\text{A}", r"A \text{ cm}", r"(A)(B)", "-A", r"A\cdot B", "A<B"),
)
FRAMES = (
    "A",
    r"\boxed{A}",
    r"\boxed{A}",
    r"so $\boxed{A}$.",
    "#### A",
    "The answer is A.",
    "A = A",
)
CHANGES = (
    *("A", "A+0", "1A", "(A)", "-A", "A=A", "0+A", "{A}", "A,1", r"\frac{A}{1}", "x=A", r"A\%"),
)


def soup(rng: random.Random) -> str:
    """Tokens in any order."""
    return "".join(rng.choices(TOKENS, k=rng.randrange(15)))


def expression(rng: random.Random, num_leaves: int = 6) -> str:
    """What reads like mathematics, of at most so many atoms."""
    if num_leaves == 1 or rng.random() < 0.25:
        return rng.choice(ATOMS)
    left = rng.randrange(1, num_leaves)
    first, second = expression(rng, left), expression(rng, num_leaves - left)
    return rng.choice(FORMS).replace("A", first).replace("B", second)


def nest(rng: random.Random) -> str:
    """Up to 300 of something that opens, around a token."""
    depth = rng.randint(1, 300)
    closer = rng.choice(CLOSERS) * (depth * rng.randrange(2))
    return rng.choice(OPENERS) * depth + rng.choice(TOKENS) + closer


def code(rng: random.Random) -> str:
    """A command among tokens."""
    return rng.choice(TOKENS) + rng.choice(CODE) + soup(rng)


def repeat(rng: random.Random) -> str:
    """A soup over and over, up to 8 KiB of it."""
    unit, size = soup(rng), 2 ** rng.randint(8, 13)
    return (unit * (size // max(1, len(unit)) + 1))[:size]


KINDS = (expression, expression, soup, soup, nest, code, repeat)


def hostile_answer(rng: random.Random) -> Answer:
    """An answer of any kind, with a reference that is like it often enough to be compared."""
    fragment = rng.choice(KINDS)(rng)
    is_like_it = rng.randrange(2)
    reference = rng.choice(CHANGES).replace("A", fragment) if is_like_it else rng.choice(KINDS)(rng)
    return Answer(
        text=rng.choice(FRAMES).replace("A", fragment),
        references=(reference,),
        is_cut_off=bool(rng.randrange(2)),
    )


def drawn_answers(number: int) -> list[Answer]:
    """A thousand hostile answers, the same for the same number."""
    rng = random.Random(number)
    return [hostile_answer(rng) for _ in range(1000)]
