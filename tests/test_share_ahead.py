"""The share ahead: the next one is asked for while the one before is trained on."""

import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest

from treerpo_ray.tree_stream import Prefetcher


class Shard:
    """Gives one table for each number; an exception among them is raised."""

    def __init__(self, *items: int | Exception) -> None:
        self.items, self.asked = items, threading.Semaphore(0)

    def iter_batches(
        self, *, batch_size: int, batch_format: str, prefetch_batches: int
    ) -> Iterator[pa.Table]:
        assert (batch_size, batch_format, prefetch_batches) == (1, "pyarrow", 0)
        for item in self.items:
            self.asked.release()
            if isinstance(item, Exception):
                raise item
            yield pa.table({"number": [item]})


def number(share: pa.Table | None) -> int:
    assert share is not None
    return share["number"][0].as_py()


def test_shares_come_in_order_and_none_follows_the_last() -> None:
    shares = Prefetcher(Shard(3, 1, 2))
    assert [number(shares.take()) for _ in range(3)] == [3, 1, 2]
    assert shares.take() is None


def test_the_next_share_is_asked_for_before_it_is_taken_and_no_further_one() -> None:
    shard = Shard(1, 2, 3)
    shares = Prefetcher(shard)
    assert number(shares.take()) == 1
    for _ in range(2):
        assert shard.asked.acquire(timeout=10)
    assert not shard.asked.acquire(timeout=0.1)


def test_what_goes_wrong_in_the_stream_is_raised_where_the_share_is_taken() -> None:
    shares = Prefetcher(Shard(1, RuntimeError("the stream broke")))
    assert number(shares.take()) == 1
    with pytest.raises(RuntimeError, match="the stream broke"):
        shares.take()
