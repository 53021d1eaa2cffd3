"""Problems: questions with their accepted answers, from files, the Hub or an embedded task.

Whether a path is a file is told from its form: a URI, a known suffix or an existing file is one,
an existing folder is a Hugging Face data set on this disk, `name` or `org/name` is one on the Hub.
"""

import codecs
import difflib
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from io import BytesIO
from math import isfinite
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet

from treerpo_ray.config.sections import PromptsConfig
from treerpo_ray.errors import one_line
from treerpo_ray.prompts.hub import HUB_ID, Unreachable, is_unreachable
from treerpo_ray.quickstart import task

QUICKSTART = "quickstart:"
DEFAULT_TASK = "chains4"
QUICKSTART_SEED = 0
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and the answers that count as correct, as the data set writes them."""

    id: str
    question: str
    answers: tuple[str, ...]
    row: str = "{}"
    """The whole row of the data set as JSON, without what is binary; for checks that ask for it."""

    def without_row(self) -> "Problem":
        """The problem where nobody asks for its row, which may be large."""
        return replace(self, row="{}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows of a data set."""

    path: str
    num_rows: int
    num_empty_answers: int
    """Rows left out because nothing could be graded."""
    num_duplicates: int
    """Rows left out because an earlier row asks the same."""
    num_problems: int
    """Problems in use, at most `num_problems` of the configuration."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.num_rows} rows, {self.num_problems} problems in use; left out: "
            f"{self.num_empty_answers} without an answer, {self.num_duplicates} duplicates"
        )


def load_problems(
    config: PromptsConfig, section: str = "prompts"
) -> tuple[list[Problem], DataReport]:
    """Load a data set; rows without an answer and repeated questions are left out and counted.

    Args:
        config: The data set; see the keys of `PromptsConfig`.
        section: Where `config` stands in the configuration, for messages.

    Raises:
        ValueError: nothing to read, a corrupt row, an unknown column or an empty data set; one
            line with the key, the file, the row and what to do. `Unreachable` if a Hugging Face
            id could not be looked up.
    """
    if not config.path:
        raise ValueError(f"{section}.path is empty: give a file, a URI or a Hugging Face id")
    if config.num_problems is not None and config.num_problems < 1:
        raise ValueError(f"{section}.num_problems={config.num_problems} must be at least 1")
    try:
        rows = _read(config)
        answered = [row for row in rows if row.answers]
        different = _drop_duplicates(answered)
        _check_problems(rows, different, config)
    except ValueError as error:
        if is_unreachable(error):
            raise Unreachable(f"{section}.path={config.path}") from error
        raise ValueError(f"{section}.path={config.path}: {one_line(error)}") from error
    used = different[: config.num_problems]
    return used, DataReport(
        path=config.path,
        num_rows=len(rows),
        num_empty_answers=len(rows) - len(answered),
        num_duplicates=len(answered) - len(different),
        num_problems=len(used),
    )


def _drop_duplicates(rows: list[Problem]) -> list[Problem]:
    first: dict[str, Problem] = {}
    for row in rows:
        first.setdefault(row.question.strip(), row)
    return list(first.values())


def _check_problems(rows: list[Problem], kept: list[Problem], config: PromptsConfig) -> None:
    if not rows:
        raise ValueError("the data set is empty")
    if not kept:
        raise ValueError(f"no row has an answer in its column '{config.answer_column}'")
    name, times = Counter(row.id for row in kept).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"'{name}' names {times} rows in column '{config.id_column}' (id_column); "
            "null names rows by their number"
        )


def _read(config: PromptsConfig) -> list[Problem]:
    """All rows in order; their answers may be empty."""
    path, local = config.path, Path(config.path).expanduser()
    if path.startswith(QUICKSTART):
        return _draw_quickstart(config)
    if local.is_dir():
        return _from_table(_load_hub(str(local), config), config)
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if "://" in path or suffix in SUFFIXES or local.is_file():
        if suffix not in SUFFIXES:
            raise ValueError(f"the name must end in {', '.join(SUFFIXES)} (or these with .gz)")
        data = _read_bytes(path if "://" in path else str(local.absolute()))
        return _from_parquet(data, config) if suffix == ".parquet" else _from_json(data, config)
    if HUB_ID.fullmatch(path):
        return _from_table(_load_hub(path, config), config)
    raise ValueError(f"no such file ({local.absolute()})")


def _draw_quickstart(config: PromptsConfig) -> list[Problem]:
    if config.num_problems is None:
        raise ValueError("an embedded task has no end; set num_problems")
    name, _, split = config.path.removeprefix(QUICKSTART).rpartition("/")
    rows = task.problems(name or DEFAULT_TASK, split, config.num_problems, QUICKSTART_SEED)
    return [
        Problem(id=r.id, question=r.question, answers=(r.answer,), row=_to_json(asdict(r)))
        for r in rows
    ]


def _load_hub(path: str, config: PromptsConfig) -> pa.Table:
    import datasets  # takes a second, and most runs read a file

    try:
        loaded = datasets.load_dataset(path, name=config.subset, split=config.split)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"not a file, and as a Hugging Face data set (split={config.split}, "
            f"subset={config.subset}) it cannot be loaded: {one_line(error.__cause__ or error)}"
        ) from error
    return loaded.with_format("arrow")[:]


def _read_bytes(path: str) -> bytes:
    try:
        compression = "gzip" if path.lower().endswith(".gz") else None
        with fsspec.open(path, "rb", compression=compression) as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(f"no such file ({path})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"corrupt gzip file ({one_line(error)})") from error
    except (ImportError, PermissionError) as error:
        raise ValueError(f"cannot be read: {one_line(error)}") from error


def _from_parquet(data: bytes, config: PromptsConfig) -> list[Problem]:
    try:
        table = pyarrow.parquet.read_table(BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file ({one_line(error)})") from error
    return _from_table(table, config)


def _from_table(table: pa.Table, config: PromptsConfig) -> list[Problem]:
    _check_columns(table.column_names, config)
    wanted = [field.name for field in table.schema if not _is_binary(field.type)]
    rows = table.select(list(dict.fromkeys([*_column_keys(config), *wanted]))).to_pylist()
    return [_to_problem(row, "row", number, config) for number, row in enumerate(rows, start=1)]


def _from_json(data: bytes, config: PromptsConfig) -> list[Problem]:
    """Rows of one JSON list, or of JSON lines: the first character tells, whatever the suffix."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 ({error.reason}); convert the file") from error
    whole = _parse_json(text, 1) if text.lstrip().startswith("[") else None
    if isinstance(whole, list):
        unit, values = "row", dict(enumerate(whole, start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        unit, values = "line", {n: _parse_json(line, n) for n, line in lines if line.strip()}
    rows = {number: value for number, value in values.items() if isinstance(value, dict)}
    if len(rows) < len(values):
        wrong = min(values.keys() - rows.keys())
        raise ValueError(f"{unit} {wrong} is not a JSON object: write one with named columns")
    if rows:
        _check_columns(dict.fromkeys(name for row in rows.values() for name in row), config)
    return [_to_problem(row, unit, number, config) for number, row in rows.items()]


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


def _column_keys(config: PromptsConfig) -> dict[str, str]:
    """Columns in use, each with its key of the configuration."""
    keys = {config.question_column: "question_column", config.answer_column: "answer_column"}
    return keys if config.id_column is None else keys | {config.id_column: "id_column"}


def _check_columns(found: Iterable[str], config: PromptsConfig) -> None:
    names = list(found)
    for column, key in _column_keys(config).items():
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(f"no column '{column}' ({key}); {hint}columns: {', '.join(names)}")


def _to_problem(row: dict[str, object], unit: str, number: int, config: PromptsConfig) -> Problem:
    where = f"{unit} {number}"
    question = row.get(config.question_column)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f"{where} has no text in its question column '{config.question_column}'; "
            "fill it or take the row out"
        )
    answer = row.get(config.answer_column)
    name = None if config.id_column is None else row.get(config.id_column)
    problem = Problem(
        id=str(number if name is None else name),
        question=question,
        answers=_to_answers(answer, config, where),
        row=_to_json(row),
    )
    try:
        "".join([problem.id, question, *problem.answers]).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{where} holds text that is not Unicode ({error.reason})") from error
    return problem


def _is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, such as pictures, at any depth."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_is_binary(kind.field(place).type) for place in range(kind.num_fields))


def _to_json(row: dict[str, object]) -> str:
    """A row as JSON; what JSON does not have, such as dates, as text."""
    return json.dumps(row, default=str)


def _to_answers(value: object, config: PromptsConfig, where: str) -> tuple[str, ...]:
    """Accepted answers of one cell, without empty and repeated ones."""
    values = value if isinstance(value, list) else [value]
    texts = [_to_text(item, config, where) for item in values]
    return tuple(dict.fromkeys(text for text in texts if text))


def _without_commas(answer: str) -> str:
    """A number without the commas of its thousands; behind a mark stands one answer, no list."""
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer


def _to_text(value: object, config: PromptsConfig, where: str) -> str:
    """Text of one answer; a number is written as a person would, what is missing as ''."""
    match value:
        case None:
            return ""
        case str():
            if not config.answer_mark or config.answer_mark not in value:
                return value.strip()
            return _without_commas(value.rpartition(config.answer_mark)[2].strip())
        case bool():
            pass
        case int():
            return str(value)
        case Decimal() | float() if not isfinite(value):
            return ""
        case Decimal() | float():
            digits = f"{Decimal(str(value)):f}"
            return digits.rstrip("0").rstrip(".") if "." in digits else digits
    raise ValueError(
        f"{where}, answer column '{config.answer_column}' holds neither text, a number nor a list "
        f"of these: {value!r}"
    )
