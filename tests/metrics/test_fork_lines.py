"""What a row tells of the fork rule, and how that reads."""

import json
from dataclasses import replace

import numpy as np
import pytest

from treerpo_ray.algo.forks.rule import CutSamples, ForkEstimate, fork_estimate
from treerpo_ray.metrics.fork_lines import fork_lines, fork_row


def estimate(depth: int, within: float, between: float) -> ForkEstimate:
    """Of 50 trees with 2 prefixes each, whose mean gradients are about 1; a is 16 and b 4."""
    rng = np.random.default_rng(depth)
    ones = np.ones(50)
    samples = CutSamples(
        square=(1 + between + within) * ones + rng.normal(0, 0.1, 50),
        product=(1 + between) * ones,
        others=49 * ones,
        num_others=49 * ones,
        before=16 * ones,
        after=4 * ones,
        num_prefixes=2 * ones,
    )
    found = fork_estimate(depth, [samples])
    assert found is not None
    return found


def test_a_row_has_what_was_measured_and_reads_as_a_sentence() -> None:
    """15 to 1: N* is sqrt(60), at 8 the share is 23/128 of the variance for 12/5 of the tokens."""
    own = estimate(1, 15.0, 1.0)
    row = fork_row(own, 16)
    [line] = fork_lines(json.loads(json.dumps({"step": 3.0, "reward/mean": 0.5} | row)))
    assert (line.depth, line.children, line.num_prefixes, line.num_trees) == (1, 8, 100, 50)
    assert (line.before, line.after) == (16, 4)
    assert line.best_children == pytest.approx(60**0.5, rel=0.01)
    assert line.gain == pytest.approx(2.32, abs=0.01)
    assert line.within == pytest.approx(15 / 16, rel=0.01)
    assert line.token_share == pytest.approx(23 / 128 * 12 / 5, rel=0.01)
    assert line.token_share_se == own.token_share_error(8) > 0
    assert str(replace(line, token_share=0.6, token_share_se=0.1)) == (
        "a tree of [1, 8] would need 0.60 ± 0.10 of the tokens of single answers (fork at depth 1, "
        "100 prefixes of 50 trees)"
    )


def test_a_row_has_finite_numbers_where_no_variance_lies_between_prefixes() -> None:
    [line] = fork_lines(fork_row(estimate(1, 5.0, -0.5), 16))
    assert (line.best_children, line.children) == (16, 16)
    assert line.gain == pytest.approx(5)
    assert line.within == pytest.approx(5 / 4.5, rel=0.02), "as it was measured"


def test_the_cuts_of_a_row_stand_in_order() -> None:
    row = fork_row(estimate(10, 1.0, 1.0), 16) | fork_row(estimate(2, 1.0, 1.0), 16)
    assert [line.depth for line in fork_lines(row)] == [2, 10]
    assert fork_lines({"step": 1.0}) == []
