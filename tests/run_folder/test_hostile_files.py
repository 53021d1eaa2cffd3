"""Any data file, configuration or checkpoint is read, or refused in one line."""

import gzip
import json
import random
from io import BytesIO
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treerpo_ray.config import Config, load
from treerpo_ray.config.data import PromptsConfig
from treerpo_ray.prompts.problems import load_problems
from treerpo_ray.run_folder.checkpoints import LIST_FILE, Checkpoints
from treerpo_ray.run_folder.files import RunFolder

ROWS = [{"question": f"what is {n}?", "answer": [str(n), "7.5"]} for n in range(20)]


def parquet() -> bytes:
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


WHOLE = {
    "jsonl": jsonl(),
    "json": json.dumps(ROWS).encode(),
    "parquet": parquet(),
    "jsonl.gz": gzip.compress(jsonl()),
    "parquet.gz": gzip.compress(parquet()),
}


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few flipped, cut, doubled or replaced."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 8, 100)))
        piece = data[start:end]
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in piece)
        replaced = rng.randbytes(len(piece))
        data = data[:start] + rng.choice((flipped, flipped, replaced, b"", piece * 2)) + data[end:]
        if rng.random() < 0.1:
            data = data[:start]
    return data


@pytest.mark.parametrize("suffix", WHOLE)
def test_a_spoiled_data_file_loads_or_is_one_line(suffix: str) -> None:
    rng = random.Random(suffix)
    fs = fsspec.filesystem("memory")
    for _ in range(400):
        fs.pipe_file(f"/spoiled.{suffix}", spoiled(WHOLE[suffix], rng))
        try:
            problems, _ = load_problems(PromptsConfig(path=f"memory://spoiled.{suffix}"))
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(problem.answers and problem.question for problem in problems)


PIECES = (
    *("run", "seed", "tree", "num_children", "engine", "resources", "evaluate", "data", "name"),
    *(".", ".", "=", "=", ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "'", '"', "#", "|"),
    *("null", "true", "1", "-1", "1e400", ".inf", ".nan", "0x10", "1_0", "9" * 400, "???", "~"),
    *("${run.seed}", "${", "${oc.env:HOME}", "${oc.decode:'[1]'}", "&a ", "*a", "<<: *a", "? "),
    *("!!python/object/apply:os.system ['touch CANARY']", "!!binary a", "!!int x", "2026-01-01"),
    *("%YAML 9", "---", "...", "\t", "\0", "\ud800", "\u2028", "é", "[" * 2000, "{a: " * 500, "\\"),
)
KEYS = ("", "run.seed=", "tree.step_tokens=", "run=", "engine.resources.GPU=")
pieces = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


@settings(max_examples=300)
@given(keys=st.sampled_from(KEYS), rest=pieces)
def test_any_override_is_a_configuration_or_one_line(keys: str, rest: str) -> None:
    assert_loads_or_is_one_line(keys + rest)


@settings(max_examples=300)
@given(text=pieces.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40))
def test_any_file_is_a_configuration_or_one_line(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text)
    assert_loads_or_is_one_line(str(path))


def assert_loads_or_is_one_line(argument: str) -> None:
    try:
        config = load([argument])
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, Config)
    assert not Path("CANARY").exists()


CONTENT = {"state.pt": b"state of step %d " * 40, "model/0.safetensors": b"weights %d " * 90}


def save(checkpoints: Checkpoints, step: int) -> None:
    def write(folder: Path) -> None:
        for name, content in CONTENT.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content.replace(b"%d", str(step).encode()))

    checkpoints.save(step, write)


def test_any_spoiled_file_of_a_checkpoint_passes_it_over_for_the_one_before(tmp_path) -> None:
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=2)
    save(checkpoints, 1)
    rng = random.Random(0)
    for _ in range(60):
        save(checkpoints, 2)
        files = [*CONTENT, LIST_FILE]
        path = tmp_path / "checkpoints/step=000002" / rng.choice(files)
        before = path.read_bytes()
        after = spoiled(before, rng)
        if rng.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(after)
        with checkpoints.newest() as found:
            assert found is not None
            step, folder = found
            for name, content in CONTENT.items():
                whole = content.replace(b"%d", str(step).encode())
                assert (folder / name).read_bytes() == whole


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b"null", b'{"state.pt": 7}', b"{}"])
def test_a_list_of_files_that_is_none_passes_its_checkpoint_over(tmp_path, content: bytes) -> None:
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "checkpoints/step=000002" / LIST_FILE).write_bytes(content)
    with checkpoints.newest() as found:
        assert found is not None and found[0] == 1


def test_a_folder_that_is_no_checkpoint_is_not_taken_for_one(tmp_path) -> None:
    checkpoints = Checkpoints(RunFolder(str(tmp_path)), keep=2)
    save(checkpoints, 1)
    other = tmp_path / "checkpoints/step=old"
    other.mkdir()
    (other / LIST_FILE).write_text("{}")
    assert checkpoints.steps() == [1]
