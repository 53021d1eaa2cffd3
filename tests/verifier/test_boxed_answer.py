import pytest

from tests.support.answers.verdicts import verdicts_of
from treerpo_ray.verifier.boxed_answer import SELF_TEST, check_answer, find_answer
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{4} and so \boxed{5}", "5"),
        (r"\boxed{4} and so \boxed{}", None),
        (r"\boxed{4} and so \boxed{5", None),
        (r"\boxed{4} and so \boxed 5", None),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and #### 3", r"\frac{1}{\sqrt{2}}"),
        (r"a { that stays open \boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{ }", None),
        ("So we get 3 and then 7", None),
        ("#### 7", None),
        ("The answer is $7$.", None),
        ("", None),
    ],
)
def test_only_the_last_box_is_an_answer(text: str, answer: str | None) -> None:
    assert find_answer(text) == find_answer(text, is_cut_off=True) == answer
    assert check_answer(text, ("7", "3")) is (None if answer is None else False)


def test_any_of_several_references_makes_a_box_correct() -> None:
    assert check_answer(r"\boxed{\frac12}", ("6", "0.5")) is True
    assert check_answer(r"\boxed{\frac12}", ()) is False


def test_the_verifier_grades_and_groups_by_boxes() -> None:
    texts = [r"\boxed{\frac12}", "1/2", r"\boxed{0.5}", r"It is \boxed{0.5"]
    answers = [Answer(text=text, references=("0.5",), is_cut_off=True) for text in texts]
    with Verifier(
        check="treerpo_ray.verifier.boxed_answer", num_workers=1, timeout_s=600.0, memory_mib=512
    ) as verifier:
        verifier.self_test()
        verdicts = verdicts_of(verifier, answers)
        assert verifier.group([answers]) == [[0, -1, 0, -1]]
    assert verdicts == [Verdict.CORRECT, Verdict.CUT_OFF, Verdict.CORRECT, Verdict.CUT_OFF]
    assert {expected for _, _, expected in SELF_TEST} == {True, False, None}
