"""No text hangs the verifier, breaks it, fills its memory or gets anything run.

The long form (`-m slow`) draws more than 30,000 different answers, the short one the first few
thousand of them.
"""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.answers.hostile_texts import CODE, OPENERS, TOKENS, drawn_answers
from tests.support.answers.verdicts import verdicts_of
from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier

MEMORY_MIB = 512
TIMEOUT_S = 60.0
"""Generous, for a machine that does other work as well; an answer takes half a millisecond, and the
costliest that is known 3 s of CPU: sixty factors f(x) in brackets."""
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def audited():
    with Verifier(
        check="tests.support.answers.audited_math",
        num_workers=2,
        timeout_s=TIMEOUT_S,
        memory_mib=MEMORY_MIB,
    ) as verifier:
        verifier.self_test()
        yield verifier


@pytest.fixture
def no_canary(monkeypatch):
    """The folder of the workers and of this process stays without a canary."""
    folder = Path.cwd()
    yield
    assert not (folder / "CANARY").exists()


def assert_all_graded(verifier: Verifier, answers: list[Answer]) -> None:
    verdicts = verdicts_of(verifier, answers)
    pairs = zip(verdicts, answers, strict=True)
    faults = [(v, a.text[:200], a.references[0][:200]) for v, a in pairs if not v.is_reward]
    assert not faults


def grade_drawn(verifier: Verifier, num_thousands: int) -> int:
    """Draw and grade; returns how many different answers there were."""
    drawn = dict.fromkeys(a for number in range(num_thousands) for a in drawn_answers(number))
    assert_all_graded(verifier, list(drawn))
    return len(drawn)


def test_the_audit_ends_a_worker_that_runs_code(audited):
    texts = ["run code", r"\boxed{4}"]
    answers = [Answer(text=text, references=("4",), is_cut_off=False) for text in texts]
    assert verdicts_of(audited, answers) == [Verdict.ERRORED, Verdict.CORRECT]


def test_drawn_texts_are_graded(audited, no_canary):
    assert grade_drawn(audited, 3) > 2000


@pytest.mark.slow
def test_thirty_thousand_drawn_texts_are_graded(audited, no_canary):
    assert grade_drawn(audited, 36) > 30_000


def test_code_is_text(audited, no_canary):
    forms = ("A", r"\boxed{A}", "#### A", "The answer is A", "$A$")
    answers = [
        Answer(text=form.replace("A", code, 1), references=(reference,), is_cut_off=False)
        for code in CODE
        for form in forms
        for reference in (code, f"{code}+0", "1", f"x={code}")
    ]
    assert_all_graded(audited, answers)


@pytest.mark.slow
def test_anything_over_and_over_is_graded(audited):
    """At a quarter of a megabyte: what takes the square of its length takes minutes. Every other
    one is in a box."""
    for number, token in enumerate(dict.fromkeys((*TOKENS, *OPENERS))):
        pieces = (token, f"{token} ", f"{token}1", f"answer is {token}\n")
        texts = [piece * (MEGABYTE // 4 // len(piece)) for piece in pieces]
        shown = [rf"\boxed{{{t}}}" if (number + i) % 2 else t for i, t in enumerate(texts)]
        assert_all_graded(
            audited, [Answer(text=t, references=("12", texts[0]), is_cut_off=False) for t in shown]
        )


@pytest.mark.parametrize(
    ("text", "reference", "verdict"),
    [
        (r"\boxed{0.5\cdot 0.5}", r"0.5\cdot 0.5+0", Verdict.CORRECT),  # ran `eval` on numbers
        (rf"\boxed{{{'1/2' * 60}}}", f"{'1/2' * 60}+0", None),  # took time that doubles a factor
        (r"\boxed{" + r"2 \cdot " * 30 + "x}", f"{2**30}x", Verdict.CORRECT),
        (r"\boxed{e^{1}}", "9" * 200_000, Verdict.WRONG),  # took the square of its length
        (r"-\sin(-3)", r"\pi^123456", Verdict.WRONG),  # the parser reads all digits: took any time
        (r"\boxed{\sqrt{-3}=99999^{x} y}", r"\sqrt{-3}=99999^{x} y+0", Verdict.CORRECT),
        # Took 36 seconds, and with a longer number any time.
        (r"\boxed{\sin((123456)^{123456})}", r"-\sin((123456)^{123456})", Verdict.WRONG),
        (rf"\boxed{{\cos({'9' * 120}^{{300}})}}", rf"-\cos({'9' * 120}^{{300}})", Verdict.WRONG),
    ],
)
def test_what_once_broke_is_graded(audited, text, reference, verdict):
    answer = Answer(text=text, references=(reference,), is_cut_off=False)
    assert_all_graded(audited, [answer])
    assert verdict in (None, *verdicts_of(audited, [answer]))


def test_megabytes_are_graded(audited):
    texts = [unit * (MEGABYTE // len(unit)) for unit in ("1,", r"\boxed{", "9", " answer is ", "(")]
    answers = [Answer(text=text, references=("1", text), is_cut_off=False) for text in texts]
    verdicts = Counter(verdicts_of(audited, answers))
    assert set(verdicts) <= {Verdict.WRONG, Verdict.UNANSWERED, Verdict.CORRECT}
