"""Shares of a learner step: whole trees, equal counts, about the same to train."""

import numpy as np
import pytest

from treerpo_ray.algo.shares import balanced_shares


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
def test_workers_are_busy_for_95_percent_of_an_update(mean: float, num_workers: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sizes = [trained_tokens(rng, mean) for _ in range(128)]
        shares = balanced_shares(sizes, num_workers)
        assert sorted(place for share in shares for place in share) == list(range(128)), (
            "each tree once"
        )
        assert {len(share) for share in shares} == {128 // num_workers}
        totals = [sum(sizes[place] for place in share) for share in shares]
        assert np.mean(totals) / max(totals) >= 0.95


def test_equal_trees_and_trees_with_nothing_to_train_are_dealt_by_count() -> None:
    for size in (0, 7):
        assert [len(share) for share in balanced_shares([size] * 6, 3)] == [2, 2, 2]
