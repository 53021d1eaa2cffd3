"""Data sets become problems; whatever a user can get wrong becomes one clear line."""

import gzip
import json
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.project import PROJECT
from treerpo_ray.config.data import PromptsConfig
from treerpo_ray.prompts.hub import Unreachable
from treerpo_ray.prompts.problems import DataReport, Problem, load_problems

DATA = PROJECT.parent / "shared" / "data"
ROWS = [
    {"question": "one and one?", "answer": "2", "name": "a"},
    {"question": "two and two?", "answer": 4, "name": "b"},
    {"question": "a half?", "answer": [0.5, "1/2"], "name": "c"},
]
ANSWERS = [("2",), ("4",), ("0.5", "1/2")]
TEXT_TABLE = pa.table({"question": ["one and one?", "a half?"], "answer": [["2"], ["0.5", "1/2"]]})


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def error_of(config: PromptsConfig) -> str:
    with pytest.raises(ValueError) as caught:
        load_problems(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", lines(*ROWS)),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("json_lines_under_another_name.json", lines(*ROWS)),
        ("rows.jsonl.gz", gzip.compress(lines(*ROWS))),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("windows.jsonl", b"\xef\xbb\xbf" + lines(*ROWS).replace(b"\n", b"\r\n") + b"\r\n"),
        ("UPPER.JSONL.GZ", gzip.compress(lines(*ROWS))),
    ],
)
def test_every_spelling_of_json_gives_the_same_problems(tmp_path, name, data):
    config = PromptsConfig(path=write(tmp_path, name, data), id_column="name")
    problems, _ = load_problems(config)
    assert [problem.id for problem in problems] == ["a", "b", "c"]
    assert [problem.question for problem in problems] == [row["question"] for row in ROWS]
    assert [problem.answers for problem in problems] == ANSWERS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.parquet.gz"])
def test_parquet_gives_problems_named_by_row_number(tmp_path, name):
    sink = pa.BufferOutputStream()
    pq.write_table(TEXT_TABLE, sink)
    data = sink.getvalue().to_pybytes()
    path = write(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
    problems, _ = load_problems(PromptsConfig(path=path))
    assert [(p.id, p.answers) for p in problems] == [("1", ("2",)), ("2", ("0.5", "1/2"))]


def test_a_relative_path_is_read_from_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path, "rows.jsonl", lines(*ROWS))
    monkeypatch.chdir(tmp_path)
    assert len(load_problems(PromptsConfig(path="rows.jsonl"))[0]) == 3


def test_a_uri_is_read_through_fsspec():
    fsspec.filesystem("memory").pipe_file("/set/rows.jsonl.gz", gzip.compress(lines(*ROWS)))
    problems, _ = load_problems(PromptsConfig(path="memory://set/rows.jsonl.gz"))
    assert [problem.answers for problem in problems] == ANSWERS


def test_a_folder_is_loaded_as_a_hugging_face_data_set_with_split_and_subset(tmp_path, without_hub):
    folder = tmp_path / "gsm"
    (folder / "main").mkdir(parents=True)
    worked = "1+1=2\n#### 2"
    for split, num in (("train", 2), ("test", 1)):
        table = pa.table({"question": [f"q{i}" for i in range(num)], "answer": [worked] * num})
        pq.write_table(table, folder / "main" / f"{split}-00000.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: main/train-*}\n  - {split: test, path: main/test-*}\n---\n"
    )
    config = PromptsConfig(path=str(folder), subset="main")
    assert [p.question for p in load_problems(config)[0]] == ["q0", "q1"]
    test_set, _ = load_problems(replace(config, split="test"))
    assert test_set == [Problem(id="1", question="q0", answers=("2",))]
    [whole], _ = load_problems(replace(config, split="test"), keeps_rows=True)
    assert json.loads(whole.row) == {"question": "q0", "answer": worked}
    assert "dev" in error_of(PromptsConfig(path=str(folder), split="dev"))
    assert "no_subset" in error_of(PromptsConfig(path=str(folder), subset="no_subset"))
    assert "'quest'" in error_of(PromptsConfig(path=str(folder), question_column="quest"))


def test_a_hugging_face_set_that_cannot_be_loaded_is_one_line(tmp_path, without_hub):
    write(tmp_path, "train.jsonl", lines(*ROWS) + b"{bad\n")
    message = error_of(PromptsConfig(path=str(tmp_path)))
    assert message.startswith(f"prompts.path={tmp_path}: not a file, and as a Hugging Face")


def test_an_id_that_cannot_be_looked_up_is_told_from_one_that_does_not_exist(
    without_hub, monkeypatch
):
    config = PromptsConfig(path="someone/some_set", split="test", subset="main")
    with pytest.raises(Unreachable, match=r"^prompts\.path=someone/some_set: HF_HUB_OFFLINE is"):
        load_problems(config)

    def not_found(*arguments, **keywords):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    told = "not a file, and as a Hugging Face data set (split=test, subset=main) it cannot be"
    assert error_of(config).startswith(f"prompts.path=someone/some_set: {told}")
    with pytest.raises(ValueError) as caught:
        load_problems(config)
    assert not isinstance(caught.value, Unreachable)


@pytest.mark.parametrize("task", ["", "chains10/", "countdown/"])
def test_an_embedded_task_gives_disjoint_splits_of_the_asked_size(task):
    paths = (f"quickstart:{task}train", f"quickstart:{task}test")
    train, test = (load_problems(PromptsConfig(path=p, num_problems=50))[0] for p in paths)
    assert len(train) == len(test) == 50
    assert not {p.question for p in train} & {p.question for p in test}
    assert "num_problems" in error_of(PromptsConfig(path=paths[0]))


@pytest.mark.parametrize("task", ["", "countdown/"])
def test_a_number_behind_a_split_draws_other_problems_of_it(task):
    def drawn(path: str) -> set[str]:
        config = PromptsConfig(path=f"quickstart:{task}{path}", num_problems=50)
        return {problem.question for problem in load_problems(config)[0]}

    assert drawn("test/0") == drawn("test")
    assert len(drawn("test/1")) == 50 and len(drawn("test/1") & drawn("test")) < 5
    assert not drawn("test/1") & drawn("train/1")
    assert "split: '' is not one of train, test" in error_of(
        PromptsConfig(path="quickstart:3", num_problems=1)
    )


def test_the_embedded_task_is_arithmetic_unless_another_is_named():
    first = load_problems(PromptsConfig(path="quickstart:train", num_problems=1))[0][0]
    assert first.answers == (str(sum(map(int, re.findall(r"[+-]?\d+", first.question)))),)
    assert "'tran'" in error_of(PromptsConfig(path="quickstart:tran", num_problems=5))
    assert "'sums'" in error_of(PromptsConfig(path="quickstart:sums/test", num_problems=5))


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("She has 3*4=12 eggs.\n#### 1,012 ", ("1012",)),
        ("#### -1,234,567.5", ("-1234567.5",)),
        ("#### 1,2", ("1,2",)),
        ("60,120", ("60,120",)),
        (r"so \boxed{\frac{1}{2}}", (r"so \boxed{\frac{1}{2}}",)),
        (["2", " 2 ", "", None, 2.0, "two"], ("2", "two")),
        (7, ("7",)),
        (100.0, ("100",)),
        (-0.25, ("-0.25",)),
        (1e-7, ("0.0000001",)),
    ],
)
def test_a_cell_becomes_accepted_answers(tmp_path, cell, answers):
    path = write(tmp_path, "rows.jsonl", lines({"question": "q", "answer": cell}))
    assert load_problems(PromptsConfig(path=path))[0][0].answers == answers


@pytest.mark.parametrize(
    ("mark", "answer"), [("####", "b"), ("A:", "x #### b"), (None, "A: x #### b"), ("", None)]
)
def test_the_mark_before_an_answer_is_the_data_sets_own(tmp_path, mark, answer):
    cell = " A: x #### b\n"
    path = write(tmp_path, "rows.jsonl", lines({"question": "q", "answer": cell}))
    [problem], _ = load_problems(PromptsConfig(path=path, answer_mark=mark))
    assert problem.answers == (answer or cell.strip(),)


def test_a_decimal_column_keeps_every_digit(tmp_path):
    value = Decimal("1234567890123456789012345678901.50")
    table = pa.table({"question": ["q"], "answer": pa.array([value])})
    pq.write_table(table, tmp_path / "rows.parquet")
    problems, _ = load_problems(PromptsConfig(path=str(tmp_path / "rows.parquet")))
    assert problems[0].answers == ("1234567890123456789012345678901.5",)


def test_rows_without_an_answer_and_repeated_questions_are_counted_and_left_out(tmp_path):
    empty = [{"question": f"e{i}", "answer": a} for i, a in enumerate([None, " ", [], "####"])]
    not_a_number = b'{"question": "n", "answer": NaN}\n{"question": "no answer column"}\n'
    again = {"question": " one and one?\n", "answer": "3"}
    path = write(tmp_path, "rows.jsonl", lines(*empty) + not_a_number + lines(*ROWS, again))
    problems, report = load_problems(PromptsConfig(path=path))
    assert [problem.answers for problem in problems] == ANSWERS
    assert [problem.id for problem in problems] == ["7", "8", "9"]
    assert report == DataReport(
        path=path, num_rows=10, num_empty_answers=6, num_duplicates=1, num_problems=3
    )
    told = "3 problems in use of 10 rows; left out: 6 without an answer, 1 asked by an earlier row"
    assert told in report.told(None)


def test_num_problems_takes_the_first_of_those_that_can_be_used(tmp_path):
    empty = {"question": "e", "answer": ""}
    path = write(tmp_path, "rows.jsonl", lines(empty, *ROWS))
    problems, report = load_problems(PromptsConfig(path=path, num_problems=2))
    assert [p.question for p in problems] == ["one and one?", "two and two?"]
    assert (report.num_rows, report.num_problems) == (4, 2)
    assert "prompts.num_problems=0" in error_of(PromptsConfig(path=path, num_problems=0))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (lines(ROWS[0]) + b"\n" + b'{"question": "q",\n', "line 3 is not JSON"),
        (lines(ROWS[0], 7), "line 2 is not a JSON object"),
        (lines(ROWS[0], [1]), "line 2 is not a JSON object"),
        (lines(ROWS[0]) + b'{"question": "\xff"}', "line 2 is not UTF-8"),
        (b'[{"question": "q",\n"answer": 2},\n{"question" 5}]', "line 3 is not JSON"),
        (b'[{"question": "q", "answer": 2}, 5]', "row 2 is not a JSON object"),
        (lines(ROWS[0]) + b"[" * 100_000, "line 2 cannot be read as JSON"),
        (lines(ROWS[0]) + b'{"question": "q", "answer": ' + b"1" * 5000 + b"}", "line 2 cannot"),
        (lines(ROWS[0]) + b'{"question": "\\ud800", "answer": 1}', "line 2 holds text that is not"),
        (lines(ROWS[0], {"answer": 1}), "line 2 has no text in its question column 'question'"),
        (lines(ROWS[0], {"question": " ", "answer": 1}), "line 2 has no text in its question"),
        (lines(ROWS[0], {"question": ["q"], "answer": 1}), "line 2 has no text in its question"),
        (lines(ROWS[0], {"question": "q", "answer": {"x": 1}}), "line 2, answer column 'answer'"),
        (lines(ROWS[0], {"question": "q", "answer": True}), "line 2, answer column 'answer'"),
        (b"", "the data set is empty"),
        (b"[]", "the data set is empty"),
        (lines({"question": "q", "answer": ""}), "no row has an answer"),
    ],
)
def test_a_corrupt_file_is_one_line_with_the_key_the_file_and_the_row(tmp_path, data, told):
    path = write(tmp_path, "rows.jsonl", data)
    message = error_of(PromptsConfig(path=path))
    assert message.startswith(f"prompts.path={path}: {told}")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"question_column": "questoin"},
            "no column 'questoin' (question_column); did you mean "
            "prompts.question_column=question? columns: question, answer, name",
        ),
        ({"answer_column": "zzz"}, "no column 'zzz' (answer_column); columns: question,"),
        (
            {"id_column": "nam"},
            "no column 'nam' (id_column); did you mean prompts.id_column=name? ",
        ),
        ({"question_column": "Answer"}, "no column 'Answer' (question_column); columns: question,"),
        ({"id_column": "answer"}, "'2' names 2 rows in column 'answer' (id_column)"),
    ],
)
def test_a_column_that_does_not_fit_is_told_with_its_key_and_the_fix(tmp_path, keys, told):
    path = write(tmp_path, "rows.jsonl", lines(*ROWS, ROWS[0] | {"question": "four less two?"}))
    assert told in error_of(PromptsConfig(path=path, **keys))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "prompts.path is empty"),
        ("no_such.jsonl", "no such file"),
        ("no/such/folder", "no such file"),
        ("memory://no/such.parquet", "no such file (memory://no/such.parquet)"),
        ("nowhere://rows.jsonl", "Protocol not known"),
        ("memory://rows.txt", "the name must end in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(path, told):
    assert told in error_of(PromptsConfig(path=path))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("rows.jsonl.gz", b"not gzip", "corrupt gzip file"),
        ("rows.jsonl.gz", gzip.compress(lines(*ROWS), mtime=0)[:-20], "corrupt gzip file"),
        ("rows.parquet", b"not parquet", "not a Parquet file"),
        ("rows.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "not a Parquet file"),
        ("rows.txt", b"question,answer\n", "the name must end in .jsonl"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_line(tmp_path, name, data, told):
    assert told in error_of(PromptsConfig(path=write(tmp_path, name, data)))


def test_messages_name_the_section_of_the_configuration():
    with pytest.raises(ValueError, match=r"^evaluate\.data\.path=rows\.jsonl: no such file"):
        load_problems(PromptsConfig(path="rows.jsonl"), section="evaluate.data")


texts = st.text("q1#. \n\u00e9\ud800", max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)
json_rows = st.fixed_dictionaries({"question": json_values, "answer": json_values}).map(json.dumps)
jsonl_bytes = st.binary(max_size=60) | st.lists(
    json_rows.map(str.encode) | st.binary(max_size=10), min_size=1, max_size=3
).map(b"\n".join)


@given(data=jsonl_bytes, suffix=st.sampled_from(["jsonl", "json", "parquet", "jsonl.gz"]))
def test_any_bytes_load_or_are_a_value_error(data, suffix):
    fsspec.filesystem("memory").pipe_file(f"/fuzz.{suffix}", data)
    try:
        problems, report = load_problems(PromptsConfig(path=f"memory://fuzz.{suffix}"))
    except ValueError as error:
        assert str(error).startswith("prompts.path=memory://fuzz.")
    else:
        left_out = report.num_empty_answers + report.num_duplicates
        assert len(problems) == report.num_problems == report.num_rows - left_out > 0
        assert all(problem.question.strip() and problem.answers for problem in problems)


@pytest.mark.parametrize(
    ("name", "num_rows", "num_empty"),
    [("math_train.jsonl.gz", 7500, 2), ("gsm8k_test.jsonl", 1319, 0), ("math500.jsonl", 500, 0)],
)
def test_the_real_data_sets_load_whole(name, num_rows, num_empty):
    if not (DATA / name).exists():
        pytest.skip(f"needs the data set {name} beside the repository, in shared/data")
    problems, report = load_problems(PromptsConfig(path=str(DATA / name), id_column="id"))
    assert (report.num_rows, report.num_empty_answers) == (num_rows, num_empty)
    assert len(problems) == num_rows - num_empty
