"""Reward noise: verdicts of training trees that are turned over on purpose.

A study of how a method bears a verifier that errs; evaluation never sees it.
"""

from dataclasses import replace

import numpy as np

from treerpo_ray.records import TreeRecord
from treerpo_ray.verifier import Verdict


def add_noise(
    record: TreeRecord, *, false_positive_rate: float, false_negative_rate: float, seed: int
) -> TreeRecord:
    """The tree with verdicts turned over, each leaf by its own draw.

    A reward of 0 becomes correct with probability `false_positive_rate`, one of 1 becomes wrong
    with `false_negative_rate`; what errored stays. The same seed, ticket and number of redraws
    draw the same.
    """
    rng = np.random.default_rng((seed, record.ticket, record.num_redraws))
    draws = rng.random(len(record.verdicts))

    def noisy(verdict: Verdict, draw: float) -> Verdict:
        if verdict is Verdict.CORRECT:
            return Verdict.WRONG if draw < false_negative_rate else verdict
        return Verdict.CORRECT if verdict.is_reward and draw < false_positive_rate else verdict

    verdicts = map(noisy, record.verdicts, draws)
    return replace(record, verdicts=tuple(verdicts))
