"""Reward noise: verdicts are turned over at the given rates, the same for the same seed."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.records import make_record
from tests.support.trees import make_tree
from treerpo_ray.algo.tree import ROOT
from treerpo_ray.scoring import add_noise
from treerpo_ray.verifier.verdict import Verdict

RIGHT, WRONG, CUT_OFF, ERRORED = Verdict.CORRECT, Verdict.WRONG, Verdict.CUT_OFF, Verdict.ERRORED


def noisy(verdict, false_positive_rate, false_negative_rate, seed=0, count=4000, **fields):
    record = make_record(make_tree([ROOT] * count), (verdict,) * count)
    return add_noise(
        replace(record, **{"ticket": 0} | fields),
        false_positive_rate=false_positive_rate,
        false_negative_rate=false_negative_rate,
        seed=seed,
    ).verdicts


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
