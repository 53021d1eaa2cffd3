"""A store keeps the newest version of its node, fetches what it lacks, and says what is lost."""

import asyncio
from collections.abc import Awaitable

import numpy as np
import pytest
from ray.exceptions import OwnerDiedError

from treerpo_ray.weights.files import FileMaps, FilePlace, WeightFile, WeightsLost
from treerpo_ray.weights.store import WeightStore

STAMP = b"a" * 16


def written(file: WeightFile, value: int) -> FilePlace:
    assert file.begin()
    file.part(5)[:] = value
    return file.seal()


def read(place: FilePlace) -> list[list[int]]:
    maps = FileMaps()
    return [maps.read(place.path, *part).tolist() for part in place.parts]


async def arrived(value: int) -> np.ndarray:
    return np.full(5, value, np.uint8)


async def lost() -> np.ndarray:
    raise OwnerDiedError("00", None, "")


def fetched(store: WeightStore, *chunks: Awaitable[np.ndarray], stamp: bytes = STAMP) -> FilePlace:
    async def fetch() -> FilePlace:
        return await store.place(stamp, list(chunks))

    return asyncio.run(fetch())


def test_what_is_kept_is_there_when_its_maker_is_gone_until_the_next_version() -> None:
    async def scenario() -> None:
        store, first, second = WeightStore(), WeightFile(), WeightFile()
        place = written(first, 1)
        assert (await store.hold(place)).stamp == place.stamp
        first.release()
        assert not first.begin()
        assert read(await store.place(place.stamp, [])) == [[1] * 5]
        next_place = written(second, 2)
        await store.hold(next_place)
        assert first.begin(), "nobody has it open any more"
        assert read(await store.place(next_place.stamp, [])) == [[2] * 5]
        for ask in (store.place(place.stamp, []), store.put(place.stamp, 0), store.hold(place)):
            with pytest.raises(WeightsLost, match=r"^weights are gone"):
                await ask

    asyncio.run(scenario())


def test_chunks_are_fetched_into_one_file_for_all_who_ask() -> None:
    store = WeightStore()
    place = fetched(store, arrived(1), arrived(2))
    assert place.stamp == STAMP and read(place) == [[1] * 5, [2] * 5]
    again = lost()
    assert fetched(store, again) == place, "they are there"
    again.close()


def test_chunks_that_are_lost_on_their_way_are_told_as_such_and_leave_what_was_there() -> None:
    store = WeightStore()
    place = fetched(store, arrived(1))
    with pytest.raises(WeightsLost, match=r"^weights are gone: OwnerDiedError$"):
        fetched(store, arrived(2), lost(), stamp=b"b" * 16)
    assert read(fetched(store)) == read(place) == [[1] * 5]
    newer = fetched(store, arrived(3), stamp=b"b" * 16)
    assert read(newer) == [[3] * 5]
