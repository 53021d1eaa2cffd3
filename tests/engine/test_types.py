"""What engines are counted to have done, whichever come and go."""

import pytest

from treerpo_ray.engine.types import EngineStats, EngineTotals


def stats(start: str, asked: int, cached: int, cpu_s: float, version: int = 1) -> EngineStats:
    return EngineStats(
        start=start,
        num_requests=0,
        num_prompt_tokens=asked,
        num_cached_tokens=cached,
        num_sampled_tokens=0,
        cpu_s=cpu_s,
        version=version,
    )


def test_each_engine_counts_from_the_last_row_or_from_its_own_start() -> None:
    totals = EngineTotals([stats("a", 100, 50, 10), stats("b", 100, 50, 10)])
    row = totals.since_last([stats("a", 200, 140, 15), stats("b", 100, 50, 11, version=0)])
    assert row["engine/prefix_hit_rate"] == 90 / 100
    assert row["time/cpu_s"] == pytest.approx(6, abs=1)
    assert (row["engine/oldest_version"], row["engine/newest_version"]) == (0, 1)
    # b was replaced by c; what it had done is neither taken off nor counted again.
    row = totals.since_last([stats("a", 210, 140, 16), stats("c", 30, 10, 2)])
    assert row["engine/prefix_hit_rate"] == 10 / 40
    assert row["time/cpu_s"] == pytest.approx(3, abs=1)
    # One that answers late, or not at all in a row, goes on where it was.
    assert totals.since_last([stats("c", 30, 10, 2)])["engine/prefix_hit_rate"] == 0
    row = totals.since_last([stats("a", 310, 215, 20), stats("c", 30, 10, 2)])
    assert row["engine/prefix_hit_rate"] == 75 / 100
    assert row["time/cpu_s"] == pytest.approx(4, abs=1)
