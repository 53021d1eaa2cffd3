"""A verifier that fails too often ends the run, and noise turns verdicts over at its rates."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from tests.support.learning.records import make_record
from tests.support.learning.trees import make_tree
from tests.support.project import PROJECT
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.config import load
from treerpo_ray.prompts.prompt_set import load_tokenizer
from treerpo_ray.scoring import (
    MIN_ANSWERS,
    WINDOW,
    ErrorShare,
    Scorer,
    VerifierFailing,
    add_noise,
)
from treerpo_ray.verifier.verdict import Answer, Verdict

GOOD = Answer(text="4", references=("4",), is_cut_off=False)
BAD = Answer(text="long " * 100 + "\x1b[2J\nend", references=("4", "5"), is_cut_off=False)


def add(share: ErrorShare, *verdicts: Verdict) -> None:
    for verdict in verdicts:
        share.add("2+2?", GOOD if verdict.is_reward else BAD, verdict)


def test_a_few_errors_at_the_start_do_not_end_a_run() -> None:
    share = ErrorShare(max_share=0.1)
    add(share, *[Verdict.TIMED_OUT] * 20)  # 0.1 of MIN_ANSWERS
    with pytest.raises(VerifierFailing):
        add(share, Verdict.ERRORED)


def test_errors_are_counted_over_the_newest_answers_only() -> None:
    share = ErrorShare(max_share=0.1)
    for _ in range(3):
        add(share, *[Verdict.ERRORED] * 20, *[Verdict.WRONG] * 980)
    add(share, *[Verdict.ERRORED] * 20, *[Verdict.UNANSWERED] * (WINDOW - 20))
    add(share, *[Verdict.ERRORED] * 100)  # 100 of 1000 by now: the 20 have left the window
    with pytest.raises(VerifierFailing, match="101 of the last 1000 answers"):
        add(share, Verdict.ERRORED)


def test_what_is_no_error_of_the_verifier_does_not_count() -> None:
    share = ErrorShare(max_share=0.0)
    add(share, *[verdict for verdict in Verdict if verdict.is_reward] * 500)
    with pytest.raises(VerifierFailing):
        add(share, Verdict.TIMED_OUT)


def test_the_message_is_one_printable_line_with_count_share_key_and_examples() -> None:
    share = ErrorShare(max_share=0.5)
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


def test_what_a_check_raised_is_told_with_the_end_of_the_run(tmp_path) -> None:
    check = tmp_path / "my_reward.py"
    check.write_text(
        "def check_answer(text, references):\n"
        "    if text != '4':\n"
        "        raise KeyError('nope')\n"
        "    return 1\n\n\n"
        "SELF_TEST = [('4', ['4'], 1)]\n"
    )
    config = load([f"verifier.check={check}", "verifier.max_error_share=0.1"])
    tokenizer = load_tokenizer(str(PROJECT / "treerpo_ray/quickstart/model"), False)
    many = MIN_ANSWERS // 10 + 5
    record = make_record(make_tree([ROOT] * many, lengths=[1] * many), ())
    told: list[str] = []
    with closing(
        Scorer(settings=config.verifier, tokenizer=tokenizer, on_fault=told.append)
    ) as scorer:
        failing = r"allows; a check raised \"KeyError: 'nope'\"; errored: answer "
        with pytest.raises(VerifierFailing, match=failing):
            scorer.score([record])
    assert len(told) == 1 and told[0].strip().endswith("KeyError: 'nope'")


RIGHT, WRONG, CUT_OFF, ERRORED = Verdict.CORRECT, Verdict.WRONG, Verdict.CUT_OFF, Verdict.ERRORED


def noisy(verdict, false_positive_rate, false_negative_rate, seed=0, count=4000, **fields):
    record = make_record(make_tree([ROOT] * count), (verdict,) * count)
    return add_noise(
        replace(record, **{"ticket": 0} | fields),
        false_positive_rate=false_positive_rate,
        false_negative_rate=false_negative_rate,
        seed=seed,
    ).verdicts


def test_partial_credit_is_neither_right_nor_wrong_to_noise() -> None:
    tree = make_tree([ROOT] * 4)
    record = make_record(tree, (Verdict.PARTIAL, RIGHT, WRONG, ERRORED))
    turned = add_noise(record, false_positive_rate=1.0, false_negative_rate=1.0, seed=0)
    assert turned.verdicts == (Verdict.PARTIAL, WRONG, RIGHT, ERRORED)
    np.testing.assert_array_equal(turned.rewards, [0.25, 0.0, 1.0, np.nan])


@pytest.mark.parametrize("verdict", [WRONG, CUT_OFF])
def test_wrong_answers_become_right_at_the_rate_of_false_positives(verdict: Verdict) -> None:
    # 4 standard deviations of a share of 4000 at 0.2
    assert noisy(verdict, 0.2, 0.9).count(RIGHT) / 4000 == pytest.approx(0.2, abs=0.026)


def test_right_answers_become_wrong_at_the_rate_of_false_negatives() -> None:
    assert noisy(RIGHT, 0.9, 0.1).count(WRONG) / 4000 == pytest.approx(0.1, abs=0.019)


def test_what_errored_stays_errored() -> None:
    assert set(noisy(ERRORED, 1, 1)) == {ERRORED}


def test_the_same_seed_and_ticket_draw_the_same_and_others_do_not() -> None:
    first = noisy(WRONG, 0.5, 0.5, ticket=3, seed=1)
    assert first == noisy(WRONG, 0.5, 0.5, ticket=3, seed=1)
    assert first != noisy(WRONG, 0.5, 0.5, ticket=4, seed=1)
    assert first != noisy(WRONG, 0.5, 0.5, ticket=3, seed=2)


def test_another_tree_of_a_ticket_has_draws_of_its_own() -> None:
    first, *others = (noisy(WRONG, 0.5, 0.5, ticket=3, seed=1, num_redraws=n) for n in range(4))
    assert len({first, *others}) == 4
    draws = np.random.default_rng((1, 3)).random(4000)  # numpy takes no notice of a last 0
    assert first == tuple(RIGHT if draw < 0.5 else WRONG for draw in draws)
