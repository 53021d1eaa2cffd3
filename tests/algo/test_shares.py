"""Shares of a learner step: whole trees, equal counts, about the same to train."""

import numpy as np
import pytest

from treerpo_ray.algo.shares import step_shares


def trained_tokens(rng: np.random.Generator, mean: float) -> int:
    """Of a tree of [8, 8, 8] steps of 384 tokens with answers of lognormal length, whose groups
    train where their values differ."""
    sigma = 0.6
    difficulty = rng.lognormal(0, 0.4)
    answers = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, (8, 8, 8)) * difficulty
    chance = rng.random() + rng.normal(0, 0.25, (8, 8, 1)) + rng.normal(0, 0.2, (8, 1, 1))
    values = (rng.random((8, 8, 8)) < chance).astype(float)
    lengths, total = answers, 0.0
    for before in (768, 384, 0):  # tokens of the steps above
        spread = values.max(-1) - values.min(-1)
        total += (np.clip(lengths - before, 0, 384) * (spread > 0.1)[..., None]).sum()
        values, lengths = values.mean(-1), lengths.max(-1)
    return int(total)


@pytest.mark.parametrize("mean", [450, 900])
@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_workers_are_busy_for_95_percent_of_an_update(
    mean: float, num_workers: int, num_minibatches: int
) -> None:
    """They wait for each other at the end of each minibatch."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sizes = [trained_tokens(rng, mean) for _ in range(128)]
        shares = step_shares(sizes, num_workers, num_minibatches)
        assert {len(share) for share in shares} == {128 // num_workers}
        minibatches = np.array(shares).reshape(num_workers, num_minibatches, -1)
        assert sorted(minibatches.flat) == list(range(128)), "each tree once"
        totals = np.array(sizes)[minibatches].sum(-1)
        assert totals.mean(0).sum() / totals.max(0).sum() >= 0.95


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_minibatch_has_the_same_trees_whatever_the_number_of_workers(num_workers: int) -> None:
    sizes = np.random.default_rng(0).integers(0, 100, 12).tolist()
    shares = np.array(step_shares(sizes, num_workers, 2)).reshape(num_workers, 2, -1)
    assert [sorted(shares[:, k].flat) for k in range(2)] == [[*range(6)], [*range(6, 12)]]


def test_equal_trees_and_trees_with_nothing_to_train_are_dealt_by_count() -> None:
    for size in (0, 7):
        assert [len(share) for share in step_shares([size] * 6, 3, 1)] == [2, 2, 2]
