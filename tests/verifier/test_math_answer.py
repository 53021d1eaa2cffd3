import gzip
import json
import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.answers.verdicts import verdicts_of
from tests.support.project import PROJECT
from treerpo_ray.verifier._math.equality import RULES, is_equal, is_same_structure
from treerpo_ray.verifier._math.expression import read
from treerpo_ray.verifier._math.notation import normalised
from treerpo_ray.verifier._math.regions import condition
from treerpo_ray.verifier._math.units import in_one_unit, without_unit
from treerpo_ray.verifier.math_answer import SELF_TEST, check_answer, find_answer
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier

DATA = PROJECT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the shared data folder is not beside this checkout"
)

# ruff: noqa: RUF001 - a model writes such signs, too
EQUAL = r"""
1/2|0.5
\frac12|\frac{1}{2}
\dfrac 3 8|3/8
\frac{29}4|7.25
-\frac{1}{2}|\frac{-1}{2}
\frac{-1}{-2}|0.5
1\frac{2}{3}|\frac{5}{3}
1 2/3|5/3
48.0|48
.5|0.5
1,234|1234
34,\!560|34560
20{,}000|20000
12\,650|12650
\$3.60|3.60
\$1,012.50|1012.5
27\%|27
27\%|0.27
50\%|\frac{1}{2}
150^\circ|150
150^{\circ}|150°
18 \text{ degrees}|18
147\text{ cm}|147
147 cm|147\text{ cm}
6\text{ cm}^2|6
\sqrt{12}|2\sqrt{3}
2\sqrt3|\sqrt{12}
\frac{1}{\sqrt{3}}|\frac{\sqrt3}{3}
√2|\sqrt{2}
2π|2\pi
−5|-5
\frac{1+\sqrt{5}}{2}|\frac{1}{2}+\frac{\sqrt{5}}{2}
(x+1)(x-1)|x^2-1
x(x+1)|x^2+x
30w+12|6(5w+2)
x=3|3
3|x=3
x = 3|x=3.0
y=2x+1|2x+1
y = 1+2x|y=2x+1
x \in [1,2]|[1,2]
(1, 2)|\left(1,2\right)
(\frac12, 1)|(0.5,1)
[1,\infty)|\left[1,\infty\right)
(-\infty,-2)\cup(3,\infty)|(3,\infty) \cup (-\infty,-2)
\{1,2,3\}|\{3,2,1\}
1,2,3|3, 2, 1
\{1,2\}|1,2
2, 3, \text{ and } 4|2,3,4
1 \text{ or } 2|2,1
1+\sqrt2, 1-\sqrt2|1\pm\sqrt{2}
(1,2),(3,4)|(3,4),(1,2)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}|\begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}|\begin{pmatrix} -\frac13 \\ 2 \end{pmatrix}
\text{Odd}|odd
\text{(A)}|A
\textbf{(B)}|\text{B}
\text{B,C}|\text{C, B}
Tuesday|\text{Tuesday}
2104_5|2104_{5}
2104|2104_5
3-2i|-2i+3
3:4|\frac{3}{4}
2^{10}|1024
10^{-3}|0.001
2\times 10^5|200000
2+4=6|6
0.5=50\%|.5 = 50\%
\frac23 \approx 0.67|\frac{2}{3}
12x - 4y + 3z - 169 = 0|12x-4y+3z=169
x+y=3|y+x=3
\mathbf{2340}|2340
{5}|5
\frac{x+2}{7}|(x+2)/7
\log_2 8|3
x^2=4|4
\alpha+\beta=3|3
1e5|100000
5!|120
\frac{18+3c}{7}|\frac{3(c+6)}{7}
\dfrac{2469}{20,\!000}|\frac{2469}{20000}
AB=12+12\sqrt{3}|12+12\sqrt3
\emptyset|\varnothing
x \ge 3|x\geq 3
-7 < x < 3|-7<x<3
\infty|+\infty
5 \text{ apples}|5
i|i
\frac{3\pi}{4}|0.75\pi
e^2|e^{2}
9^{9^{9}}|9^{9^{9}}
10 000 apples|10 000 apples
\sqrt[3]{8}|2
0.\overline{3}|0.\overline{3}
\frac{-3}{4}x|-\frac{3x}{4}
(3,-2),(1,0)|(1,0), (3,-2)
\left\{\frac12,3\right\}|\{3,0.5\}
x<1, x>2|x>2, x<1
5 cm|5
25\text{ percent}|25\%
f(x) = x^2+1|1+x^2
x+2y=3|2x+4y=6
y=2x-13|2x-y-13=0
\$5|5\text{ dollars}
20\text{ sq units}|20\text{ square units}
5\text{ sq. cm}|5\text{ cm}^2
5\text{ in}|5\text{ inches}
18 eggs per day|18
10-2t|-2t+10
\frac{1}{2}h|\frac{h}{2}
\sin^2 t|1-\cos^2 t
a + b + c|c+b+a
2007+\frac{\pi}{2}|2007 + \frac\pi 2
\frac{x}y|x/y
2(1+i)|2+2i
2\sqrt{3} i - 1|-1+2i\sqrt3
-37_{8}|-37_8
8.24|\approx 8.24 \text{ mph}
\begin{pmatrix}1 & \phantom -1\end{pmatrix}|\begin{pmatrix}1&1\end{pmatrix}
"""

DIFFERENT = r"""
1/2|0.25
0.333333|1/3
1.414|\sqrt{2}
1.41421356|\sqrt{2}
1,2|1.2
1,2|12
(1,2)|(2,1)
(1,2)|1,2
(1,2)|\{1,2\}
(1,2)|[1,2]
[1,2)|[1,2]
\{1,2\}|\{1,2,2\}
1,2|1,2,3
x=3|y=3
2x=6|6
10_2|10
10_2|10_3
10_2|2
27\%|2.7
5\text{ cm}|5\text{ m}
\text{odd}|\text{even}
\text{A}|\text{B}
A|a
N|n
xy|xz
\sqrt{3}|3
-5|5
x+1|x-1
\begin{pmatrix}1&2\end{pmatrix}|\begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix}|\begin{pmatrix}2\\1\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix}|\begin{pmatrix}1&2\\3&4\end{pmatrix}
\frac{1}{10^{7}}|0
\frac{1}{0}|\frac{2}{0}
9^{9^{9^{9}}}|9
10^{10^{10}}|10
2^{100!}|2
(9^9)!|3
1000000!|3
((((((((((((((((((1))))))))))))))))))|2
2**3|23
1 2|12
3 4|34
x<3|x>3
x \le 3|x<3
\pm 2|2
\infty|-\infty
\text{5 or 6}|5
e|2.718281828
\sin x|\cos x
\{1\}|2
(-\infty,1)|(-\infty,1]
\text{abc}|\text{cab}
LQSX|XSQL
0.1|0.10000001
2^{3|8
\frac{1}{|1
100\%|10
\binom{99999}{50000}|1
x_1|x_2
(1,2)\cup(3,4)|(1,2),(3,4)
3\frac{1}{2}|\frac{3}{2}
5 000|5
2 300|2, 300
\text{Monday}|\text{Sunday}
\frac{2}{3}\text{ cup}|\frac{3}{2}\text{ cup}
3\%|0.3
\sqrt[3]{8}|\sqrt{8}
90^\circ|9
1,000|1
2x|2y
\frac12,1|\frac12
(1,2,3)|(1,2)
x^2+1=0|x^2+2=0
\sin x=2|\sin x=3
a^2+b^2=-1|a^2+b^2=-2
x=x|2x=2x
\csc 0|\csc 10
\cot 0|5
5 million|5
3\text{ and a half}|3
2 thirds|2
5 or more|5
5 less than x|5
3 squared|3
2 xy|2
5\text{ cents}|\$5
t+2t|2+t
h^{2}h|h^{2}
e^{t}t|e^{t}
37_8|-37_8
"""

# Every answer of MATH train that is correct for the next row's different reference, looked at by
# hand: the same value, where one of the two names the unit or is a percentage.
EQUAL_NEIGHBOURS = {
    (r"10\text{ cm}", "10"),
    ("2", r"2 \text{ pieces}"),
    (r"\frac{2}{5}", r"40\%"),
    ("50", r"50^{\circ}"),
    ("18", r"18^\circ"),
}

# All that cannot be read as an expression in the answers of MATH train: \box is no command.
UNREADABLE = {r"\box{four}", r"\text{October 30}"}

# Answers of MATH train that name only the last of several boxes that together are the answer.
OF_SEVERAL_BOXES = {1648, 1821, 6545, 5790, 4095, 3199, 3706, 7015, 1694, 1332}

FOUND = [
    (r"\boxed{4} and so \boxed{5}", "5"),
    (r"\boxed{4} and so \boxed{5", "4"),
    (r"a { that stays open \boxed{5}", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}} } stray", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\fbox{7}", "7"),
    (r"\boxed 5", "5"),
    (r"\boxed{3} #### 4", "3"),
    ("5 + 5\n#### 1,000", "1,000"),
    ("#### 4\n#### 5\nThe answer is 6", "5"),
    ("The answer is: **12**.", "12"),
    (r"The final answer is $\frac{1}{2}$, as seen", r"\frac{1}{2}"),
    ("Answer: 42", "42"),
    ("The answer is 3.5. It was hard.", "3.5"),
    ("the answer is 42, so we stop", "42"),
    ("10-4=6.", "6"),
    ("The answer is 5.</s>", "5"),
    (r"\boxed{5}<|eot_id|> 7", "5"),
    (r"$x = \boxed{4}$, $y = \boxed{-1}$", "x = 4, y = -1"),
    (r"\boxed{4} or $\boxed{9}$", "4, 9"),
    (r"\boxed{4}, that is \boxed{9}", "9"),
    ("<answer>12</answer> I am done with 7", "12"),
    ("Answer:\n\n12", "12"),
    ("**Answer**: 12", "12"),
    (r"Final Answer: The final answer is $\pi$. I hope it is correct.", r"\pi"),
    ("The correct option is (D).", "(D)"),
    ("So it must be (D).", "D"),
    ("The answer is 12 since 3 times 4 is that.", "12"),
    ("The answers are 7, 8 and 9.", "7, 8 and 9"),
    (r"the answers are $x=4$ and $x=9$", "x=4, x=9"),
    (r"the answer is $\$5$", r"\$5"),
    (r"so that it comes to \frac{7}{9}.", r"\frac{7}{9}"),
    (r"it comes to $\frac{7}{9}$ of all", r"\frac{7}{9}"),
    ("that makes 3^{12} ways", "3^{12}"),
    ("the point is (3, 12)", "(3, 12)"),
    ("between them lie 7-12", "7-12"),
    ("hence x=4 or x=12", "4 or x=12"),
    ("hence 2x+3=12", "2x+3=12"),
    ("They pay $5 and $12", "$5 and $12"),
    ("#### The answer is 12", "12"),
    ("first 3, then -3", "-3"),
    ("about 1,234 or 7/8", "1,234 or 7/8"),
    ("the roots are -3 and 12", "-3 and 12"),
    ("so $x=4$ or $x=12$.", "x=4, x=12"),
    ("the answer is approximately 3.5", "3.5"),
    ("the answer is that there are $12$ of them", "12"),
    ("the answer is not 12", "not 12"),
    (r"the answer is $\boxed{}$", None),
    ("", None),
    ("no number", None),
]


def pairs(block: str) -> list[list[str]]:
    return [line.split("|") for line in block.strip().split("\n")]


def problems(name: str) -> list[dict[str, str]]:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


def train_problems() -> list[dict[str, str]]:
    """MATH train but for two problems whose answer and box are empty."""
    return [row for row in problems("math_train.jsonl.gz") if row["answer"]]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(
        check="treerpo_ray.verifier.math_answer", num_workers=2, timeout_s=60.0, memory_mib=512
    ) as verifier:
        yield verifier


def grade(verifier: Verifier, texts: list[str], references: list[str]) -> list[Verdict]:
    return verdicts_of(
        verifier,
        [
            Answer(text=text, references=(reference,), is_cut_off=False)
            for text, reference in zip(texts, references, strict=True)
        ],
    )


@pytest.mark.parametrize(("answer", "reference"), pairs(EQUAL))
def test_equal_answers_are_correct(answer, reference):
    assert is_equal(answer, reference)
    assert check_answer(rf"So \boxed{{{answer}}}.", (reference,)) is True


@pytest.mark.parametrize(("answer", "reference"), pairs(DIFFERENT))
def test_different_answers_are_wrong(answer, reference):
    assert not is_equal(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), [("", "5"), ("5", ""), ("", ""), ("$$", "$$")])
def test_nothing_equals_nothing(answer, reference):
    assert not is_equal(answer, reference)


@pytest.mark.parametrize(("text", "answer"), FOUND)
def test_the_last_answer_of_a_text_is_found(text, answer):
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 2 = 5, so that we go on to", None),
        ("The answer is 12", None),
        ("#### 12", None),
        ("#### 12\nNow I che", "12"),
        (r"It is \boxed{5}. Now I che", "5"),
        (r"It is \boxed{5}. No, \boxed{6", "5"),
    ],
)
def test_a_cut_off_text_answers_only_where_the_answer_is_whole(text, answer):
    assert find_answer(text, is_cut_off=True) == answer


def test_any_of_several_references_makes_an_answer_correct():
    assert check_answer(r"\boxed{7}", ("6", "7")) is True
    assert check_answer(r"\boxed{8}", ("6", "7")) is False
    assert check_answer(r"\boxed{8}", ()) is False


def test_the_self_test_holds_in_the_workers(verifier):
    verifier.self_test()
    assert {expected for _, _, expected in SELF_TEST} == {True, False, None}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {canary}')",
        "$(touch {canary})",
        "`touch {canary}`",
        "exec(\"open('{canary}','w')\")",
        "().__class__.__bases__[0].__subclasses__()",
        "lambda: open('{canary}', 'w')",
        r"\text{{open('{canary}','w')}}",
        r"\frac{{open('{canary}','w')}}{{1}}",
        r"\operatorname{{exec}}(open('{canary}','w'))",
        "open('{canary}','w') < 3 < x",
        "f\"{{open('{canary}','w')}}\"",
    ],
)
def test_hostile_text_never_runs(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    hostile = text.format(canary=canary)
    # A reference of the same letters gets past the cheap comparisons, to the parser.
    same_letters = "+".join(sorted(set(re.sub("[^A-Za-z]", "", hostile))))
    for wrapped in (
        hostile,
        rf"\boxed{{{hostile}}}",
        f"#### {hostile}",
        f"the answer is {hostile}",
    ):
        assert not check_answer(wrapped, ("5", same_letters))
        check_answer(r"\boxed{5}", (hostile,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "((9^{9999})^{9999})^{9999}",
        "2^(9^(9^9))",
        "99999999999!",
        "((100!)!)!",
        r"\binom{999999999}{499999999}",
        r"\binom{10^8}{10^7}",
        r"\Gamma(9999999)",
        r"\exp(9^{999999})",
        r"\sum_{n=1}^{999999999} n^n",
        r"\int_0^1 x^x dx",
        "{" * 400 + "1" + "}" * 400,
        r"\frac{1}{" * 100 + "1" + "}" * 100,
        r"\sqrt{" * 40 + "x" + "}" * 40,
        "x^{x^{x^{x^{x^{x}}}}}",
        "9" * 900,
        "-" * 900,
        ",".join("12345" * 80),
    ],
)
def test_a_costly_answer_is_wrong_and_quick(answer):
    start = time.process_time()
    assert check_answer(rf"\boxed{{{answer}}}", ("5", "x", r"\frac{1}{3}", "(1,2)")) is False
    assert time.process_time() - start < 20, "CPU time; worked out, each takes minutes or for ever"


PIECES = st.sampled_from(
    r"""
    \boxed{ \frac \sqrt \left( \right) \text{ \{ \} { } ( ) [ ] ^ _ , = < > + - ! % $ # | & \\
    \begin{pmatrix} \end{pmatrix} \cup \in \pi \pm \infty \circ \approx x y i e 0 1 2 37 1,000 0.5
    ° π √ answer is or and
    """.split()  # noqa: SIM905
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=14).map(" ".join))


@settings(max_examples=300)
@given(answer=TEXTS, reference=TEXTS)
def test_no_text_makes_the_check_raise(answer, reference):
    assert check_answer(answer, (reference,)) in (True, False, None)
    assert check_answer(rf"\boxed{{{answer}}}", (reference, "5")) in (True, False, None)


@given(number=st.integers(-(10**9), 10**9))
def test_a_number_equals_itself_in_every_spelling_and_no_other(number):
    for spelling in (f"{number:,}", f"{number}.0", rf"\frac{{{2 * number}}}{{2}}", f"x={number}"):
        assert is_equal(spelling, str(number))
        assert not is_equal(spelling, str(number + 1))


@needs_data
@pytest.mark.parametrize(
    ("check", "without_braces"),
    [("math_answer", set()), ("boxed_answer", {"math-train-6344", "math-train-6448"})],
)
def test_solutions_of_math_train_are_correct(check, without_braces):
    rows = train_problems()
    assert len(rows) == 7498
    with Verifier(
        check=f"treerpo_ray.verifier.{check}", num_workers=2, timeout_s=60.0, memory_mib=512
    ) as verifier:
        verdicts = grade(verifier, [r["solution"] for r in rows], [r["answer"] for r in rows])
    failed = {r["id"] for r, v in zip(rows, verdicts, strict=True) if v is not Verdict.CORRECT}
    several = {f"math-train-{number}" for number in OF_SEVERAL_BOXES}
    # 44: \box{four}, where it is \mbox{four}
    assert failed == {"math-train-44"} | (several if check == "math_answer" else without_braces)


@needs_data
def test_solutions_of_gsm8k_are_correct(verifier):
    rows = problems("gsm8k_test.jsonl")
    assert sum("####" in row["solution"] for row in rows) == 1319
    verdicts = grade(verifier, [r["solution"] for r in rows], [r["answer"] for r in rows])
    assert set(verdicts) == {Verdict.CORRECT}


@needs_data
def test_solutions_of_math_train_are_wrong_for_the_next_different_answer(verifier):
    rows = train_problems()
    others = []
    for index, row in enumerate(rows):
        after = rows[index + 1 :] + rows[:index]
        plain = re.sub(r"\s", "", row["answer"])
        others.append(next(r["answer"] for r in after if re.sub(r"\s", "", r["answer"]) != plain))
    verdicts = grade(verifier, [row["solution"] for row in rows], others)
    hits = {
        (row["answer"], other)
        for row, other, verdict in zip(rows, others, verdicts, strict=True)
        if verdict is Verdict.CORRECT
    }
    assert hits == EQUAL_NEIGHBOURS
    assert {Verdict.TIMED_OUT, Verdict.ERRORED}.isdisjoint(verdicts)


@needs_data
def test_a_reference_with_its_last_number_raised_by_one_is_another_answer(verifier):
    gold = [row["answer"] for row in train_problems() if re.search(r"\d", row["answer"])]
    raised = [
        re.sub(r"\d+(?=\D*$)", lambda digits: str(int(digits[0]) + 1), answer) for answer in gold
    ]
    verdicts = grade(verifier, [rf"\boxed{{{answer}}}" for answer in raised], gold)
    hits = [pair for *pair, v in zip(gold, raised, verdicts, strict=True) if v is Verdict.CORRECT]
    assert hits == []
    assert {Verdict.TIMED_OUT, Verdict.ERRORED}.isdisjoint(verdicts)


@needs_data
@pytest.mark.parametrize("name", ["math_train.jsonl.gz", "math500.jsonl", "gsm8k_test.jsonl"])
def test_every_reference_answer_equals_itself(verifier, name):
    gold = [row["answer"] for row in problems(name) if row["answer"]]
    verdicts = grade(verifier, [rf"\boxed{{{answer}}}" for answer in gold], gold)
    assert set(verdicts) == {Verdict.CORRECT}


@needs_data
@pytest.mark.parametrize(
    ("name", "num_answers", "unreadable"),
    [
        ("math_train.jsonl.gz", 2754, UNREADABLE),
        ("math500.jsonl", 295, set()),
        ("gsm8k_test.jsonl", 351, set()),
    ],
)
def test_every_reference_answer_equals_itself_in_value(name, num_answers, unreadable):
    """Without the look at the spelling that settles these pairs before anything is read."""
    gold = {normalised(row["answer"]) for row in problems(name) if row["answer"]}
    assert len(gold) == num_answers
    assert all(is_same_structure(answer, answer) for answer in gold)
    values = {
        without_unit(text)[0]
        for text in (in_one_unit(condition(answer) or answer) for answer in gold)
        if all(rule(text, text) is None for rule in RULES)
    }
    assert {text for text in values if read(text) is None} == unreadable


def test_equal_answers_are_one_group_in_the_workers(verifier):
    texts = [r"\boxed{\frac12}", "I do not know.", "#### 0.5", r"\boxed{3}", "The answer is 1/2."]
    answers = [Answer(text=text, references=(), is_cut_off=False) for text in texts]
    assert verifier.group([answers, answers[3:], []]) == [[0, -1, 0, 1, 0], [0, 1], []]


def test_a_domain_that_finds_no_answers_groups_none():
    answers = [Answer(text="one", references=("1",), is_cut_off=False)] * 2
    with Verifier(
        check="tests.support.answers.false_self_test", num_workers=1, timeout_s=60.0, memory_mib=512
    ) as domain:
        assert domain.group([answers]) == [None]
