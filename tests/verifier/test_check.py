"""What a check may ask for and return, and what its self-test may expect."""

from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest

from treerpo_ray.verifier.check import Check, SelfTest, WrongReturn, as_reward
from treerpo_ray.verifier.verdict import Answer, Grade, Verdict, weighted


def module(function, self_test=(("a", ("a",), True),)) -> ModuleType:
    made = ModuleType("made")
    made.check_answer, made.SELF_TEST = function, self_test
    return made


@pytest.mark.parametrize(
    ("returned", "reward"),
    [
        (True, True),
        (False, False),
        (None, None),
        (1, 1.0),
        (0, 0.0),
        (0.25, 0.25),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (0.1 + 0.2 + 0.7, 1.0),  # 1.0000000000000002 or so, as sums of parts are
        (sum([0.1] * 10), 1.0),  # 0.9999999999999999
        (-1e-17, 0.0),
    ],
)
def test_a_reward_is_true_false_none_or_a_number_from_0_to_1(returned, reward) -> None:
    assert as_reward(returned) == reward and type(as_reward(returned)) is type(reward)


@pytest.mark.parametrize(
    "returned",
    [float("nan"), float("inf"), 1.001, -0.5, 2, "1", [1.0], {}, 1j, np.array([1.0]), object()],
)
def test_all_else_is_none(returned) -> None:
    with pytest.raises(WrongReturn, match="True, False, None or a number from 0 to 1"):
        as_reward(returned)


def test_a_check_gets_what_its_parameters_are_called() -> None:
    answer = Answer(text="t", references=("r",), is_cut_off=True, question="q", row='{"a": [1]}')
    seen = []

    def old_form(text, references, is_cut_off):
        seen.append((text, references, is_cut_off))
        return True

    def by_row(row, *, question, tolerance=0.5):
        seen.append((row, question, tolerance))
        return tolerance

    assert Check(module(old_form))(answer) is True
    assert Check(module(by_row))(answer) == 0.5
    assert seen == [("t", ("r",), True), ({"a": [1]}, "q", 0.5)]


def test_a_self_test_expects_a_reward_or_two_ends() -> None:
    entries = (
        ("a", ["b"], 0.25),
        {"text": "a", "expected": (0.5, 1)},
        {"text": "a", "row": {"k": 1}, "question": "q", "is_cut_off": True, "expected": None},
    )
    found = Check(module(lambda text: 1, entries)).self_test
    assert [test.expected for test in found] == [(0.25, 0.25), (0.5, 1.0), None]
    assert [test.shown for test in found] == ["0.25", "from 0.5 to 1", "unanswered"]
    assert found[2].answer.row == '{"k": 1}' and found[2].answer.question == "q"
    assert [SelfTest.from_json(test.to_json()) for test in found] == list(found)
    met = [[test.is_met(reward) for reward in (0.25, 0.75, None)] for test in found]
    assert met == [[True, False, False], [False, True, False], [False, False, True]]


def test_a_number_is_a_verdict_with_its_reward() -> None:
    def verdict(reward, is_cut_off=False) -> Verdict:
        return Grade.of(reward, is_cut_off=is_cut_off).verdict

    assert [verdict(reward) for reward in (True, 1.0, False, 0.0, 0.3, None)] == [
        *(Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG),
        *(Verdict.PARTIAL, Verdict.UNANSWERED),
    ]
    assert verdict(None, is_cut_off=True) is Verdict.CUT_OFF
    assert Grade.of(0.3, is_cut_off=True) == (Verdict.PARTIAL, 0.3)


def test_several_checks_are_weighed_by_hand() -> None:
    right, half = Grade(Verdict.CORRECT, 1.0), Grade(Verdict.PARTIAL, 0.5)
    wrong, none = Grade(Verdict.WRONG, 0.0), Grade(Verdict.UNANSWERED, 0.0)
    lost = Grade.without_reward(Verdict.TIMED_OUT)
    assert weighted([right, half], [3, 1]) == (Verdict.PARTIAL, 0.875)
    assert weighted([none, right], [0.8, 0.2]) == (Verdict.PARTIAL, pytest.approx(0.2))
    assert weighted([none, wrong], [1, 1]) is none
    assert weighted([right, lost, wrong], [1, 1, 1]) is lost
    for weights in ([0.7, 0.2, 0.1], [1e-9, 3, 1e9], [0.1, 0.1, 0.1]):
        assert weighted([right] * 3, weights) == (Verdict.CORRECT, 1.0)
