"""Files of weights are read by other processes, are written again when nobody reads them, and never
before."""

import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from treerpo_ray.weights.files import (
    FileMaps,
    FilePlace,
    HeldFile,
    WeightFile,
    WeightFiles,
    WeightsLost,
)

CHUNKS = (np.arange(5000).astype(np.uint8), np.full(64, 9, np.uint8))


def written(file: WeightFile, *chunks: np.ndarray) -> FilePlace:
    for chunk in chunks:
        file.part(len(chunk))[:] = chunk
    return file.seal()


def read(place: FilePlace) -> list[bytes]:
    maps = FileMaps()
    return [maps.read(place.path, *part).tobytes() for part in place.parts]


def inode(place: FilePlace) -> int:
    return os.stat(place.path).st_ino


def test_another_process_finds_the_chunks_for_as_long_as_it_has_the_file_open() -> None:
    files = WeightFiles()
    place = written(files.begin(), *CHUNKS)
    look = (
        "import sys; from treerpo_ray.weights.files import *; path, stamp, *numbers = sys.argv[1:];"
        "parts = tuple(tuple(map(int, n.split(','))) for n in numbers);"
        "held = HeldFile(FilePlace(path=path, stamp=bytes.fromhex(stamp), parts=parts));"
        "print('held', flush=True); sys.stdin.readline();"
        "print([FileMaps().read(held.place.path, *part).tobytes().hex() for part in parts])"
    )
    numbers = [f"{offset},{size}" for offset, size in place.parts]
    with subprocess.Popen(
        [sys.executable, "-c", look, place.path, place.stamp.hex(), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        del files  # the maker's own
        assert not Path(place.path).exists()
        found, _ = process.communicate("\n", timeout=600)
    assert found == f"{[chunk.tobytes().hex() for chunk in CHUNKS]}\n"


def test_a_file_is_written_again_once_nobody_reads_it_or_is_to_read_it() -> None:
    files = WeightFiles()
    file = files.begin()
    first = written(file, *CHUNKS)
    with closing(HeldFile(first)) as held:
        file.release()
        second_file = files.begin()
        second = written(second_file, CHUNKS[1])
        assert inode(second) != inode(first)
        assert read(held.place) == [chunk.tobytes() for chunk in CHUNKS]
        third = written(files.begin(), CHUNKS[1])
        assert len({inode(each) for each in (first, second, third)}) == 3, "second is not released"
    second_file.release()
    assert inode(written(files.begin(), CHUNKS[1])) == inode(second)


def test_a_reader_that_was_killed_reads_no_more() -> None:
    files = WeightFiles()
    file = files.begin()
    place = written(file, *CHUNKS)
    hold = (
        "import sys; from treerpo_ray.weights.files import *;"
        "held = HeldFile(FilePlace(path=sys.argv[1], stamp=bytes.fromhex(sys.argv[2]), parts=()));"
        "print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, place.path, place.stamp.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        file.release()
        assert not file.begin()
        process.kill()
    assert file.begin()


def test_a_file_that_is_gone_or_written_or_of_another_version_is_told_as_lost() -> None:
    file = WeightFile()
    assert file.begin()
    place = written(file, *CHUNKS)
    with pytest.raises(WeightsLost, match=r"^weights are gone: No such file or directory$"):
        HeldFile(replace(place, path=f"/proc/{os.getpid()}/fd/99999"))
    with pytest.raises(WeightsLost, match=r"^weights are gone: others lie in their file$"):
        HeldFile(replace(place, stamp=bytes(16)))
    reading, writing = os.pipe()
    with pytest.raises(WeightsLost):  # what has the file's number by now
        HeldFile(replace(place, path=f"/proc/{os.getpid()}/fd/{reading}"))
    for end in (reading, writing):
        os.close(end)
    file.release()
    assert file.begin()
    with pytest.raises(WeightsLost, match=r"^weights are gone: Resource temporarily unavailable$"):
        HeldFile(place)


def test_a_version_that_is_larger_than_the_one_before_has_room() -> None:
    file = WeightFile()
    for size in (10, 10_000, 5_000_000, 7):
        chunks = [np.full(size, size % 251, np.uint8)] * 3
        assert file.begin()
        assert read(written(file, *chunks)) == [chunk.tobytes() for chunk in chunks]
        file.release()


def test_kept_maps_show_what_lies_in_the_file_now_and_let_old_files_go() -> None:
    maps, file = FileMaps(), WeightFile()
    for value in (1, 2):
        assert file.begin()
        place = written(file, np.full(9, value, np.uint8))
        assert maps.read(place.path, *place.parts[0]).tolist() == [value] * 9
        file.release()
    others = [WeightFile() for _ in range(3)]
    for other in others:
        assert other.begin()
        other_place = written(other, CHUNKS[1])
        maps.read(other_place.path, *other_place.parts[0])
    assert len(maps._maps) == 2


def test_who_writes_in_a_map_changes_nothing_for_others() -> None:
    file = WeightFile()
    assert file.begin()
    place = written(file, *CHUNKS)
    FileMaps().read(place.path, *place.parts[0])[:] = 0
    assert read(place) == [chunk.tobytes() for chunk in CHUNKS]
