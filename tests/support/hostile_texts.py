"""Hostile texts: what a model under training, or an attacker, may hand the verifier."""

import warnings

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

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

_soups = st.lists(st.sampled_from(TOKENS), max_size=14).map("".join)
_expressions = st.recursive(
    st.sampled_from(("1", "2", "-3", "10", "0", "0.5", "x", "y", r"\pi", "e", "99999", "123456")),
    lambda inner: st.builds(
        lambda form, a, b: form.replace("A", a).replace("B", b),
        st.sampled_from(
            (
                *("A+B", "A-B", "A B", "A/B", "(A)^{B}", "A^B", "A^{B}", "(A,B)", "[A,B)", "A,B"),
                *(r"\frac{A}{B}", r"\sqrt{A}", r"\sqrt[B]{A}", r"\log_{A}(B)", r"\binom{A}{B}"),
                *("A=B", r"\{A,B\}", r"\sin(A)", r"\ln(A)", "|A|", "A!", "(A)!", r"e^{A}", r"A\%"),
                *(r"\begin{pmatrix}A\\B\end{pmatrix}", r"A\cup B", r"\lfloor A\rfloor", "A_{B}"),
                *(r"A\pm B", r"\text{A}", r"A \text{ cm}", r"(A)(B)", "-A", r"A\cdot B", "A<B"),
            )
        ),
        inner,
        inner,
    ),
    max_leaves=6,
)
_nests = st.builds(
    lambda opener, middle, closer, depth, is_closed: (
        opener * depth + middle + closer * (depth * is_closed)
    ),
    st.sampled_from(OPENERS),
    st.sampled_from(TOKENS),
    st.sampled_from(CLOSERS),
    st.integers(1, 300),
    st.booleans(),
)
_codes = st.builds("".join, st.tuples(st.sampled_from(TOKENS), st.sampled_from(CODE), _soups))
_repeats = st.builds(
    lambda soup, exponent: (soup * (2**exponent // max(1, len(soup)) + 1))[: 2**exponent],
    _soups,
    st.integers(8, 13),
)
_fragments = st.one_of(_expressions, _expressions, _soups, _soups, _nests, _codes, _repeats)
_frames = st.sampled_from(
    ("A", r"\boxed{A}", r"\boxed{A}", r"so $\boxed{A}$.", "#### A", "The answer is A.", "A = A")
)
_changes = st.sampled_from(
    ("A", "A+0", "1A", "(A)", "-A", "A=A", "0+A", "{A}", "A,1", r"\frac{A}{1}", "x=A", r"A\%")
)


@st.composite
def hostile_answers(draw: st.DrawFn) -> Answer:
    """An answer of any kind, with a reference that is like it often enough to be compared."""
    fragment = draw(_fragments)
    reference = draw(st.one_of(_changes.map(lambda form: form.replace("A", fragment)), _fragments))
    return Answer(
        text=draw(_frames).replace("A", fragment),
        references=(reference,),
        is_cut_off=draw(st.booleans()),
    )


def drawn_answers(number: int) -> list[Answer]:
    """A thousand hostile answers, the same for the same number."""
    answers: list[Answer] = []

    @seed(number)
    @settings(
        max_examples=1000,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    @given(hostile_answers())
    def draw(answer: Answer) -> None:
        answers.append(answer)

    with warnings.catch_warnings():  # about the length of what it draws
        warnings.simplefilter("ignore", HypothesisWarning)
        draw()
    return answers
