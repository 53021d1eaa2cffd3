import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.project import PROJECT
from treerpo_ray.config import load
from treerpo_ray.quickstart import exercises
from treerpo_ray.quickstart.items_answer import SELF_TEST, check_answer, find_answer
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier

FILES = [str(PROJECT / "conf" / name) for name in ("quickstart.yaml", "tasks/items6.yaml")]
REFERENCE = ("38+47=85 52-27=25 31&58=38",)


@pytest.mark.parametrize(("text", "references", "expected"), SELF_TEST)
def test_the_self_test_holds(text, references, expected):
    assert check_answer(text, references) == expected


@pytest.mark.parametrize(
    ("text", "is_cut_off", "expected"),
    [
        ("38+47=85\n52-27=25\n31&58=38", False, 1),
        ("38+47=85\n52-27=25\n31&58=38", True, 2 / 3),
        ("38+47=85\n52-27=25\n31&58=3", False, 2 / 3),
        ("38+47=85\n52-27=25\n31&58=38\n", False, 1),
        ("38+47=85\n52-27=25\n31&58=38\n52-27=25", False, 1),
        ("\n38+47=85\n52-27=25\n31&58=38", False, 0),
        ("38+47=85\n31&58=38\n52-27=25", False, 1 / 3),
        ("38+47=85 52-27=25 31&58=38", False, 0),
        ("38+47=85", True, None),
        ("", False, None),
    ],
)
def test_a_line_counts_at_its_own_place_when_it_is_finished(text, is_cut_off, expected):
    assert check_answer(text, REFERENCE, is_cut_off) == expected


@given(st.text("0123456789+-&=\n ", max_size=40), st.booleans())
def test_any_text_with_a_reward_has_an_answer_to_vote_for(text, is_cut_off):
    reward = check_answer(text, REFERENCE, is_cut_off)
    assert (find_answer(text, is_cut_off) is None) is (reward is None)


def test_the_best_of_several_references_counts():
    assert check_answer("1+1=2\n2+2=4", ("1+1=2 2+2=5", "1+1=3 2+2=5")) == 0.5


@pytest.mark.parametrize("reference", ["", "85", "38+47=85  52-27=25", "38+47= 85", "38+47=85\n"])
def test_a_corrupt_reference_is_an_error_and_not_a_wrong_answer(reference):
    with pytest.raises(ValueError, match="reference"):
        check_answer("38+47=85", (reference,))


def test_the_verifier_of_the_task_gives_partial_credit_by_configuration_alone():
    settings = load(FILES).verifier
    [row] = exercises.problems("items6", "train", 1, 0)
    lines = row.solution.split("\n")
    answers = [
        Answer(text="\n".join(text), references=(row.answer,), is_cut_off=False)
        for text in (lines, lines[:3], lines[1:2])
    ]
    with Verifier(
        check=settings.check,
        num_workers=1,
        timeout_s=settings.timeout_s,
        memory_mib=settings.memory_mib,
    ) as verifier:
        verifier.self_test()
        expected = [(Verdict.CORRECT, 1.0), (Verdict.PARTIAL, 0.5), (Verdict.WRONG, 0.0)]
        assert list(map(tuple, verifier.grade(answers))) == expected
