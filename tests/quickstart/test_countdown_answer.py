from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.answers.verdicts import verdicts_of
from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.preflight.inputs import load_inputs
from treerpo_ray.quickstart import exercises
from treerpo_ray.quickstart.countdown_answer import SELF_TEST, check_answer, evaluate, find_answer
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier

FILE = PROJECT / "conf/countdown.yaml"
REFERENCE = ("12 3 25=40",)


@pytest.mark.parametrize(("text", "references", "expected"), SELF_TEST)
def test_the_self_test_holds(text, references, expected):
    assert check_answer(text, references) is expected


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "()", "(", ")", "+", "12 3 25", "12+3+", "*12+3+25", "12++3+25", "(12)(3)+25"),
        *("+12+3+25", "12+3+25=40", "12+3+25;", "12.0+3+25", "12e0+3+25", "0x0C+3+25", "1_2+3+25"),
        *("12\u00d73+25", "\u0661\u0662+3+25", "\uff11\uff12+3+25", "12+3+25\u00b2", "12+\t3+25"),
        *("12//3+25", "12**3**25", "12%3+25", "12^3^25", "__import__('os')", "12+3+25#", "x"),
        *("(" * 100 + "12+3+25" + ")" * 100, "9" * 10**6, "(" * 10**6, "12+" * 10**5 + "3"),
        *("25+12/(3-3)", "12/0+3+25", "1/0"),
    ],
)
def test_what_is_no_expression_of_the_numbers_is_wrong_and_not_an_error(expression):
    assert check_answer(f"#### {expression}", REFERENCE) is False


@pytest.mark.parametrize(
    ("text", "is_cut_off", "expected"),
    [
        ("25+12=37\n#### 25+12+3", False, True),
        ("25+12=37\n#### 25+12+3", True, None),
        ("#### 25+12+3\nand so on", True, True),
        ("#### 25-12-3\n#### 25+12+3", False, True),
        ("#### 25+12+3\n#### 25-12-3", False, False),
        ("it is #### 25+12+3", False, None),
        ("####25+12+3", False, True),
        ("#### ((((25)))+(12+3))", False, True),
        ("", False, None),
        ("", True, None),
    ],
)
def test_the_answer_is_the_last_finished_line_with_the_mark(text, is_cut_off, expected):
    assert check_answer(text, REFERENCE, is_cut_off) is expected


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("25+12+3", "40 of [3, 12, 25]"),
        (" 3 + (25 + 12)", "40 of [3, 12, 25]"),
        ("20+20", "40 of [20, 20]"),
        ("3*25-12", "63 of [3, 12, 25]"),
        ("3/12", "1/4 of [3, 12]"),
        ("12/(3-3)", "12/(3-3)"),
        ("40 of [3, 12, 25]", "40of[3,12,25]"),
        ("", ""),
    ],
)
def test_votes_are_for_a_value_and_the_numbers_that_make_it(expression, answer):
    assert find_answer(f"12+3=15\n####{expression}") == answer


@given(st.text("0123456789+-*/() #\n", max_size=40), st.booleans())
def test_any_text_with_a_verdict_has_an_answer_to_vote_for(text, is_cut_off):
    has_answer = find_answer(text, is_cut_off) is not None
    assert has_answer is (check_answer(text, REFERENCE, is_cut_off) is not None)


def test_any_of_several_references_makes_an_answer_right():
    assert check_answer("#### 4*2", ("1 2=3", "2 4=8")) is True
    assert check_answer("#### 4+2", ("1 2=3", "2 4=8")) is False


@pytest.mark.parametrize("reference", ["", "40", "12 3=", "12  3=40", "a b=3", "1 2=3=4", "-1 2=3"])
def test_a_corrupt_reference_is_an_error_and_not_a_wrong_answer(reference):
    with pytest.raises(ValueError, match="reference"):
        check_answer("#### 1+2", (reference,))


def expressions() -> st.SearchStrategy[tuple[str, Fraction | None]]:
    """Expressions with their value, worked out as they are put together; none divides by zero."""
    numbers = st.integers(0, 12).map(lambda number: (str(number), Fraction(number)))

    def join(parts):
        (left, a), sign, (right, b) = parts
        if a is None or b is None or (sign == "/" and b == 0):
            value = None
        else:
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[sign]
        return f"({left}) {sign} ({right})", value

    return st.recursive(
        numbers,
        lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(join),
        max_leaves=6,
    )


@given(expressions())
def test_expressions_have_their_value(expression_and_value):
    expression, value = expression_and_value
    if value is None:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression)
    else:
        assert evaluate(expression)[0] == value


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2+3*4", 14), ("20-5-3", 12), ("24/4/2", 3), ("2*3+4*5", 26), ("8-6/2+1", 6), ("1/3", None)],
)
def test_products_bind_tighter_and_operators_of_one_rank_go_from_left_to_right(expression, value):
    assert evaluate(expression)[0] == (Fraction(1, 3) if value is None else value)


@given(st.text("0123456789+-*/() #\n", max_size=40), st.booleans())
def test_any_text_gets_a_verdict(text, is_cut_off):
    assert check_answer(text, REFERENCE, is_cut_off) in (True, False, None)


def test_a_run_of_the_domain_has_its_problems_and_its_verifier_by_configuration_alone():
    config = load([str(FILE), "prompts.num_problems=40", "model.path=treerpo_ray/quickstart/model"])
    inputs = load_inputs(config)
    rows = exercises.problems("countdown", "train", 40, 0)
    assert len(inputs.delimiters) == 1
    assert [problem.question for problem in inputs.prompts.problems] == [r.question for r in rows]
    answers = [
        Answer(text=row.solution, references=problem.answers, is_cut_off=False)
        for row, problem in zip(rows, inputs.prompts.problems, strict=True)
    ]
    other = Answer(text="#### 1+2", references=(), is_cut_off=False)
    swapped = [
        Answer(text=row.solution, references=answer.references, is_cut_off=False)
        for row, answer in zip(rows[1:], answers, strict=False)
    ]
    half = Answer(text=rows[0].solution[:-1], references=answers[0].references, is_cut_off=True)
    corrupt = Answer(text=rows[0].solution, references=("40",), is_cut_off=False)
    settings = config.verifier
    with Verifier(
        check=settings.check,
        num_workers=1,
        timeout_s=settings.timeout_s,
        memory_mib=settings.memory_mib,
    ) as verifier:
        verifier.self_test()
        assert set(verdicts_of(verifier, answers)) == {Verdict.CORRECT}
        assert set(verdicts_of(verifier, swapped)) == {Verdict.WRONG}
        assert verdicts_of(verifier, [half, corrupt]) == [Verdict.CUT_OFF, Verdict.ERRORED]
        assert verifier.group([[answers[0], half, other, answers[0]]]) == [[0, -1, 1, 0]]
