"""What a run came to is told by the name of what was measured."""

import json
from dataclasses import replace

from tests.support.answers.evaluations import EVALUATION
from treerpo_ray.config import Config
from treerpo_ray.driver.result import RunResult, describe_result, summary_json


def result(**fields: float | None) -> RunResult:
    before = replace(EVALUATION, pass_at_1=0.25, reward=fields["before"])
    after = replace(EVALUATION, pass_at_1=0.5, reward=fields["after"])
    return RunResult(
        before=before, after=after, sampled_tokens=9, seconds=1.0, num_updates=3, is_complete=True
    )


def test_with_partial_credit_the_mean_reward_stands_before_the_share_of_whole_rewards() -> None:
    plain = result(before=None, after=None)
    assert describe_result(Config(), plain).startswith("Pass@1 went from 25.0% to 50.0%")
    assert "reward_before" not in json.loads(summary_json(Config(), plain))
    # Before, each reward was 0 or 1: then their mean is Pass@1.
    part = result(before=None, after=0.625)
    assert describe_result(Config(), part).startswith(
        "the mean reward went from 0.250 to 0.625, Pass@1 went from 25.0% to 50.0%"
    )
    told = json.loads(summary_json(Config(), part))
    assert (told["reward_before"], told["reward_after"]) == (0.25, 0.625)
    assert (told["pass_at_1_before"], told["pass_at_1_after"]) == (0.25, 0.5)


def test_what_was_evaluated_has_its_name_and_a_run_without_an_update_says_so() -> None:
    plain = result(before=None, after=None)
    assert " on 1 problems of held.jsonl (" in describe_result(Config(), plain)
    told = describe_result(Config(), replace(plain, num_updates=0))
    assert told.startswith("nothing was learned, with 9 sampled tokens and ") and "Pass" not in told
