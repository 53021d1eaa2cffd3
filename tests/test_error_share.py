"""A verifier that fails on too many answers ends the run, and says on which."""

import pytest

from treerpo_ray.scoring import MIN_ANSWERS, WINDOW, ErrorShare, VerifierFailing
from treerpo_ray.verifier.verdict import Answer, Verdict

GOOD = Answer(text="4", references=("4",), is_cut_off=False)
BAD = Answer(text="long " * 100 + "\x1b[2J\nend", references=("4", "5"), is_cut_off=False)


def add(share: ErrorShare, *verdicts: Verdict) -> None:
    for verdict in verdicts:
        share.add("2+2?", GOOD if verdict.is_reward else BAD, verdict)


def test_a_few_errors_at_the_start_do_not_end_a_run() -> None:
    share = ErrorShare(0.1)
    add(share, *[Verdict.TIMED_OUT] * 20)  # 0.1 of MIN_ANSWERS
    with pytest.raises(VerifierFailing):
        add(share, Verdict.ERRORED)


def test_errors_are_counted_over_the_newest_answers_only() -> None:
    share = ErrorShare(0.1)
    for _ in range(3):
        add(share, *[Verdict.ERRORED] * 20, *[Verdict.WRONG] * 980)
    add(share, *[Verdict.ERRORED] * 20, *[Verdict.UNANSWERED] * (WINDOW - 20))
    add(share, *[Verdict.ERRORED] * 100)  # 100 of 1000 by now: the 20 have left the window
    with pytest.raises(VerifierFailing, match="101 of the last 1000 answers"):
        add(share, Verdict.ERRORED)


def test_what_is_no_error_of_the_verifier_does_not_count() -> None:
    share = ErrorShare(0.0)
    add(share, *[verdict for verdict in Verdict if verdict.is_reward] * 500)
    with pytest.raises(VerifierFailing):
        add(share, Verdict.TIMED_OUT)


def test_the_message_is_one_printable_line_with_count_share_key_and_examples() -> None:
    share = ErrorShare(0.5)
    add(share, *[Verdict.TIMED_OUT] * (MIN_ANSWERS // 2))
    with pytest.raises(VerifierFailing) as caught:
        add(share, Verdict.TIMED_OUT)
    message = str(caught.value)
    assert message.startswith(
        "the verifier failed on 101 of the last 101 answers (100%), more than "
        "verifier.max_error_share=0.5 allows; timed_out: answer '..."
    )
    assert r"\x1b[2J\nend' to question '2+2?' with reference '4, 5'" in message
    assert message.isprintable() and len(message) < 1500
