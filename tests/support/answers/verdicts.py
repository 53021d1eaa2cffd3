"""Verdicts alone of what a verifier grades, for checks that know right and wrong only."""

from collections.abc import Sequence

from treerpo_ray.verifier.verdict import Answer, Verdict
from treerpo_ray.verifier.verifier import Verifier


def verdicts_of(verifier: Verifier, answers: Sequence[Answer]) -> list[Verdict]:
    """Verdict of each answer; each must have the reward that the verdict says."""
    grades = verifier.grade(answers)
    for verdict, reward in grades:
        assert reward == verdict.reward if verdict.is_reward else reward != reward
    return [grade.verdict for grade in grades]
