"""Rows: what stands in files, folders and data sets of the Hub, with the columns asked for.

What a path is, is told from its form: a URI, a known suffix or an existing file is a file, what
has `*`, `?` or brackets is a pattern of files, an existing folder is a data set on this disk,
`name` or `org/name` is one on the Hub.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import fsspec
import pyarrow as pa
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from treerpo_ray.config.data import DataConfig
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.columns import Row, top_level
from treerpo_ray.prompts.hub import HUB_ID, offline_because

if TYPE_CHECKING:  # takes a second, and most runs read a file
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Columns = Sequence[str] | None
PATTERN = re.compile(r"[*?\[]")
MAX_FIELD = 2**31 - 1
"""Characters of one field of a CSV file."""
NUM_SAMPLED = 3
"""Rows of a file that are kept with all their columns, to tell what it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one file or data set."""

    name: str
    """What sets it apart from the other files of a data set; empty if there is but one."""
    unit: str
    """What the numbers of rows count: rows, or lines of a file."""
    names: tuple[str, ...]
    """All columns."""
    sample: tuple[Row, ...]
    """A few rows with all their columns."""
    by_number: dict[int, Row]
    """Every row, at least with the columns asked for."""

    def where(self, number: int) -> str:
        """A row's place, for messages."""
        place = f"{self.unit} {number}"
        return f"{self.name}: {place}" if self.name else place


def read_rows(config: DataConfig, columns: Columns) -> Iterator[Rows]:
    """Read a data set, a part for each of its files, one after the other.

    Args:
        config: The data set.
        columns: Those that are used, so that others may be left out; None: all but binary ones.

    Raises:
        ValueError: there is nothing to read, or a file is not what its name says.
    """
    sources = [source for path in config.paths for source in _sources(path, config, columns)]
    if len(sources) == 1:
        yield sources[0].read()
        return
    for name, source in zip(_apart([source.path for source in sources]), sources, strict=True):
        try:
            rows = source.read()
        except ValueError as error:
            raise ValueError(f"{name}: {one_line(error)}") from error
        yield replace(rows, name=name)


@dataclass(frozen=True, slots=True)
class _Source:
    """A file or data set, and what reads it."""

    path: str
    read: Callable[[], Rows]


def _apart(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    split = [path.split("/") for path in paths]
    depth = 0
    while len({parts[depth] for parts in split}) == 1 and min(map(len, split)) > depth + 1:
        depth += 1
    return ["/".join(parts[depth:]) for parts in split]


def _sources(path: str, config: DataConfig, columns: Columns) -> list[_Source]:
    """What a path stands for."""

    def of(files: Sequence[str]) -> list[_Source]:
        return [_Source(file, partial(_from_file, file, columns)) for file in files]

    is_uri, local = "://" in path, Path(path).expanduser()
    if not is_uri and local.is_dir():
        return [_Source(path, partial(_from_folder, str(local), config, columns))]
    if (is_uri or not local.is_file()) and PATTERN.search(path) and not _is_http(path):
        return of(_matches(path))
    if _suffix(path) in SUFFIXES or local.is_file():
        return of([path])
    if is_uri and (folder := _folder(path)) is not None:
        return [_Source(path, partial(_from_folder, folder, config, columns))]
    if is_uri:
        return of(_files_in(path))
    if HUB_ID.fullmatch(path):
        return [_Source(path, partial(_from_hub, path, config, columns))]
    raise ValueError(f"no such file ({local.absolute()})")


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _suffix(path: str) -> str:
    """Ending that tells the format, without that of compression and what a server is asked."""
    name = path.partition("?")[0] if _is_http(path) else path
    return Path(name.lower().removesuffix(".gz")).suffix


def _matches(pattern: str) -> list[str]:
    """Files that a pattern stands for, in the order of their names."""
    if "://" not in pattern:
        matched = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        found = [path for path in matched if os.path.isfile(path)]
    else:
        store, root = _store(pattern)
        found = [store.unstrip_protocol(path) for path in store.glob(root) if store.isfile(path)]
    if not found:
        raise ValueError("no file matches this pattern")
    return sorted(found)


def _store(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"cannot be read: {one_line(error)}") from error


def _folder(uri: str) -> str | None:
    """The folder at a URI, where it is on this machine or written by `save_to_disk`."""
    store, root = _store(uri)
    if _is_http(uri) or not store.isdir(root):
        return None
    if isinstance(store, LocalFileSystem):
        return root
    return uri if _is_saved(store, root) else None


def _files_in(uri: str) -> list[str]:
    """Files of the folder at a URI, in the order of their names."""
    store, root = _store(uri)
    if _is_http(uri) or not store.isdir(root):
        raise ValueError(f"the name must end in {', '.join(SUFFIXES)} (or these with .gz)")
    found = [store.unstrip_protocol(file) for file in sorted(store.find(root))]
    if not (files := [file for file in found if _suffix(file) in SUFFIXES]):
        raise ValueError(f"the folder has no file that ends in {', '.join(SUFFIXES)}")
    return files


# Files ------------------------------------------------------------------------------------------


def _from_file(path: str, columns: Columns) -> Rows:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"the name must end in {', '.join(SUFFIXES)} (or these with .gz)")
    data = _read_bytes(path if "://" in path else str(Path(path).expanduser().absolute()))
    if suffix == ".parquet":
        return _from_parquet(data, columns)
    return _from_csv(_decode(data)) if suffix == ".csv" else _from_json(_decode(data))


def _read_bytes(path: str) -> bytes:
    try:
        compression = "gzip" if path.lower().endswith(".gz") else None
        # `fsspec.open` would take brackets and the like in a name for a pattern.
        store, root = _store(path)
        with store.open(root, "rb") as file:
            data = file.read()
        return gzip.decompress(data) if compression else data
    except FileNotFoundError as error:
        raise ValueError(f"no such file ({path})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"corrupt gzip file ({one_line(error)})") from error
    except (ImportError, OSError) as error:
        raise ValueError(f"cannot be read: {one_line(error)}") from error


def _decode(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:64]:
        raise ValueError("it is UTF-16 or no text; save it as UTF-8, as `iconv -t UTF-8` does")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 ({error.reason}); convert the file") from error


def _from_csv(text: str) -> Rows:
    csv.field_size_limit(MAX_FIELD)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        records = [record for record in lines if record]
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num} is not CSV ({error})") from error
    names = [name.strip() for name in records[0]] if records else []
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"its first line names the column '{twice[0]}' twice")
    rows: dict[int, Row] = {}
    for number, record in enumerate(records[1:], start=1):
        if len(record) != len(names):
            raise ValueError(
                f"row {number} has {len(record)} fields, the first line {len(names)}; a field with "
                "a comma or a new line stands in double quotes"
            )
        rows[number] = dict(zip(names, map(_csv_cell, record), strict=True))
    return _rows("row", rows, names)


def _csv_cell(text: str) -> object:
    """A cell; chats and what has fields are written into one as JSON."""
    if not text.startswith(('{"', '[{"')):
        return text
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text


def _from_json(text: str) -> Rows:
    """Rows of one JSON list, or of JSON lines: the first character tells, whatever the suffix."""
    whole = _parse_json(text, 1) if text.lstrip().startswith("[") else None
    if isinstance(whole, list):
        unit, values = "row", dict(enumerate(whole, start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        unit, values = "line", {n: _parse_json(line, n) for n, line in lines if line.strip()}
    rows: dict[int, Row] = {n: value for n, value in values.items() if isinstance(value, dict)}
    if len(rows) < len(values):
        wrong = min(values.keys() - rows.keys())
        raise ValueError(f"{unit} {wrong} is not a JSON object: write one with named columns")
    return _rows(unit, rows, list(dict.fromkeys(name for row in rows.values() for name in row)))


def _rows(
    unit: str, rows: dict[int, Row], names: Sequence[str], sample: Sequence[Row] | None = None
) -> Rows:
    some = tuple(rows.values())[:NUM_SAMPLED] if sample is None else tuple(sample)
    return Rows(name="", unit=unit, names=tuple(names), sample=some, by_number=rows)


def _parse_json(text: str, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {line + error.lineno - 1} is not JSON ({error.msg} at column {error.colno}); "
            "write one object a line, or one list of objects"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"line {line} cannot be read as JSON ({one_line(error)})") from error


def _from_parquet(data: bytes, columns: Columns) -> Rows:
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        used = _used(file.schema_arrow, columns)
        first = next(file.iter_batches(batch_size=NUM_SAMPLED), None)
        # Arrow would take a point in a name for a way into a column.
        chosen = None if any("." in name for name in used) else used
        table = file.read(columns=chosen).select(used)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file ({one_line(error)})") from error
    sample = [] if first is None else first.to_pylist()
    return _rows("row", dict(enumerate(table.to_pylist(), start=1)), names, sample)


def _used(schema: pa.Schema, columns: Columns) -> list[str]:
    """Those of a table's columns that are asked for."""
    names = schema.names
    if columns is None:
        used = [field.name for field in schema if not _is_binary(field.type)]
    else:
        used = sorted({top for column in columns if (top := top_level(column, names)) is not None})
    if twice := [name for name in used if names.count(name) > 1]:
        raise ValueError(f"it has several columns '{twice[0]}'")
    return used


def _is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, such as pictures, at any depth."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_is_binary(kind.field(place).type) for place in range(kind.num_fields))


# Folders and the Hub ----------------------------------------------------------------------------


def _is_saved(store: fsspec.AbstractFileSystem, root: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""

    def has(name: str) -> bool:
        return store.exists(str(PurePosixPath(root) / name))

    return has("dataset_dict.json") or (has("state.json") and has("dataset_info.json"))


def _from_folder(path: str, config: DataConfig, columns: Columns) -> Rows:
    store, root = _store(path)
    if _is_saved(store, root):
        return _from_saved(path, config, columns)
    _check_one_format(Path(path))
    return _from_hub(path, config, columns)


def _check_one_format(folder: Path) -> None:
    """Refuse a folder of several formats, of which `datasets` would read one without a word.

    Raises:
        ValueError: it is such, and no card of its own says what belongs to what.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files" in card.read_text(errors="replace"):
        return
    files = (file for file in folder.rglob("*") if file.is_file())
    found = sorted({_suffix(str(file)) for file in files} & {".jsonl", ".csv", ".parquet"})
    if len(found) > 1:
        raise ValueError(
            f"the folder has files of {', '.join(found)}; say which by a pattern such as "
            f"{folder}/**/*{found[0]}, or by a list"
        )


def _from_saved(path: str, config: DataConfig, columns: Columns) -> Rows:
    """A data set of `save_to_disk`; one without splits is taken whole."""
    import datasets

    store, root = _store(path)
    several = str(PurePosixPath(root) / "dataset_dict.json")
    try:
        if store.exists(several):
            splits = json.loads(store.cat_file(several))["splits"]
            if config.split not in splits:
                raise ValueError(f"no split '{config.split}' (split); splits: {', '.join(splits)}")
            path = f"{path.rstrip('/')}/{config.split}"
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            raise ValueError("a split of it has splits again; give the folder of one")
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"the data set saved there cannot be loaded: {one_line(error)}") from error
    return _from_dataset(loaded, columns)


def _from_hub(path: str, config: DataConfig, columns: Columns) -> Rows:
    """A data set of the Hub, or of a folder in the form of one."""
    import datasets

    if not Path(path).is_dir():
        offline_because()
    try:
        loaded = datasets.load_dataset(path, name=config.subset, split=config.split)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"not a file, and as a Hugging Face data set (split={config.split}, "
            f"subset={config.subset}) it cannot be loaded: {one_line(error.__cause__ or error)}"
        ) from error
    return _from_dataset(loaded, columns)


def _from_dataset(loaded: "datasets.Dataset", columns: Columns) -> Rows:
    names, tables = loaded.column_names, loaded.with_format("arrow")
    used = _used(loaded.features.arrow_schema, columns)
    rows = tables.select_columns(used)[:].to_pylist()
    return _rows("row", dict(enumerate(rows, start=1)), names, tables[:NUM_SAMPLED].to_pylist())
