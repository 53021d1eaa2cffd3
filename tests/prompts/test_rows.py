"""Files of every kind become the same problems; what cannot be read is one line."""

import codecs
import csv
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treerpo_ray.config.data import DataConfig
from treerpo_ray.prompts.chats import Message
from treerpo_ray.prompts.problems import Problem, load_problems, load_together

USER, TOLD = Message("user", "1+1="), Message("system", "Be brief.")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1="}]
ANSWER = {"role": "assistant", "content": "So 1+1=2.\n#### 2"}


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        path.write_text("".join(f"{row}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems_of(path: str, **keys: object) -> list[Problem]:
    return load_problems(replace(DataConfig(path=path), **keys))[0]


def error_of(path: str, **keys: object) -> str:
    with pytest.raises(ValueError) as caught:
        problems_of(path, **keys)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("prompts.")
    return message


ASKED_AND_TOLD = [
    ({"question": "1+1=", "answer": 2}, {}, ()),
    ({"prompt": "1+1=", "completion": "2"}, {"answer_column": "completion"}, ()),
    ({"prompt": CHAT, "completion": [ANSWER]}, {"answer_column": "completion"}, (TOLD, USER)),
    ({"messages": [*CHAT, ANSWER]}, {}, (TOLD, USER)),
    ({"messages": [*CHAT, ANSWER]}, {"answer_column": None}, (TOLD, USER)),
    ({"messages": [*CHAT, ANSWER | {"content": "3"}], "answer": "2"}, {}, (TOLD, USER)),
    ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "2"}]}, {}, (TOLD, USER)),
    ({"prompt": CHAT[1:], "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 4}},
     {"answer_column": "reward_model.ground_truth", "id_column": "extra_info.index"}, ()),
    ({"body": {"messages": CHAT}, "answer": ["2", "2.0"]}, {}, (TOLD, USER)),
    ({"x": {"q": "1+1="}, "y": [{"a": 2}]}, {"question_column": "x.q", "answer_column": "y.0.a"},
     ()),
]  # fmt: skip
COLUMN = {"prompt": "prompt", "messages": "messages", "conversations": "conversations"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "keys", "messages"), ASKED_AND_TOLD)
def test_the_spellings_of_other_projects_are_read(row, keys, messages, suffix, tmp_path) -> None:
    path = write(tmp_path / f"rows.{suffix}", row)
    first = next(iter(row))
    column = "body.messages" if first == "body" else COLUMN.get(first, "question")
    [found] = problems_of(path, **({"question_column": column} | keys))
    assert (found.question, found.answers[0], found.messages) == ("1+1=", "2", messages)
    assert found.id == ("4" if "extra_info" in row else "1")


@pytest.mark.parametrize(
    ("row", "keys", "told"),
    [
        ({"messages": CHAT, "answer": 2}, {},
         "prompts.question_column=messages reads the chats that are there"),
        ({"body": {"messages": CHAT}, "answer": 2}, {}, "prompts.question_column=body.messages"),
        ({"body": {"messages": CHAT}, "answer": 2}, {"question_column": "body"},
         "line 1 has no text in its question column 'body'; it has body.messages"),
        ({"question": "q", "reward_model": {"ground_truth": 2}}, {},
         "no column 'answer' (answer_column); columns: question, reward_model; in them: "
         "reward_model.ground_truth"),
        ({"question": "q", "reward_model": {"ground_truth": 2}},
         {"answer_column": "reward_model.truth"}, "no column 'reward_model.truth' (answer_column)"),
        ({"question": "q", "reward_model": {"ground_truth": 2}}, {"answer_column": "reward_model"},
         "answer column 'reward_model' holds neither text, a number nor a list of these: "
         "{'ground_truth': 2}; it has reward_model.ground_truth"),
        ({"messages": CHAT}, {"question_column": "messages"}, "no column 'answer' (answer_column)"),
        ({"messages": CHAT}, {"question_column": "messages", "answer_column": None},
         "no chat ends with an answer; name the column of the answers (answer_column)"),
        ({"messages": [CHAT[0], ANSWER]}, {"question_column": "messages"},
         "line 1 has a chat without a message of a user before the answer"),
        ({"messages": [{"role": "bot", "content": "x"}], "answer": 2},
         {"question_column": "messages"}, "line 1 has a chat whose message 1 is of 'bot'"),
        ({"messages": [], "answer": 2}, {"question_column": "messages"},
         "line 1 has no text in its question column 'messages'"),
        ({"question": "q", "answer": 2}, {"answer_column": None},
         "line 1 has no chat in its question column 'question' that could hold the answer"),
        ({"question": "q", "answer": 2}, {"prompt_template": "Solve."},
         "prompts.prompt_template='Solve.' has no {question}, where the question goes"),
        ({"question": "q", "answer": 2}, {"prompt_template": "{question} {topic}"},
         "no column 'topic' (prompt_template); columns: question, answer"),
        ({"question": "q", "answer": 2, "topic": None}, {"prompt_template": "{question} {topic}"},
         "line 1 has neither text nor a number in 'topic' of prompt_template"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_told_with_the_setting_that_would(
    row, keys, told, tmp_path
) -> None:
    assert told in error_of(write(tmp_path / "rows.jsonl", row), **keys)


def test_a_template_makes_the_users_message_and_the_question_stays(tmp_path) -> None:
    rows = ({"problem": "1+1=", "topic": "sums", "answer": 2},)
    path = write(tmp_path / "rows.jsonl", *rows)
    template = r"{topic}: {question} in \boxed{}"
    [found] = problems_of(path, question_column="problem", prompt_template=template)
    asked = Message("user", r"sums: 1+1= in \boxed{}")
    assert (found.question, found.messages) == ("1+1=", (asked,))
    path = write(tmp_path / "chats.jsonl", {"m": [*CHAT, ANSWER], "topic": "sums"})
    [found] = problems_of(path, question_column="m", prompt_template=template)
    assert found.messages == (TOLD, asked)
    [found] = problems_of("quickstart:train", num_problems=1, prompt_template="Go: {question}")
    assert found.messages == (Message("user", f"Go: {found.question}"),)


def test_chats_that_differ_before_the_last_question_are_no_duplicates(tmp_path) -> None:
    short = [{"role": "user", "content": " 1+1= "}]
    rows = ({"m": CHAT, "answer": 2}, {"m": short, "answer": 2}, {"m": short, "answer": 3})
    path = write(tmp_path / "rows.jsonl", *rows)
    found, report = load_problems(DataConfig(path=path, question_column="m"))
    assert [problem.id for problem in found] == ["1", "2"] and report.num_duplicates == 1


TEXT = 'question,answer\n"1,000+1=\nsay ""it""",1001\n2+2=, 4\n\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", TEXT.encode()),
        ("B.CSV.GZ", gzip.compress(TEXT.encode(), mtime=0)),
        ("bom.csv", codecs.BOM_UTF8 + TEXT.replace("\n2", "\r\n2").encode()),
        ("my data.csv", TEXT.replace("question,", "question, ").encode()),
    ],
)
def test_csv_is_read_with_its_quotes_and_new_lines(name, data, tmp_path) -> None:
    (tmp_path / name).write_bytes(data)
    for path in (str(tmp_path / name), f"file://{tmp_path}/{name}"):
        found = problems_of(path)
        assert [(p.id, p.question, p.answers) for p in found] == [
            ("1", '1,000+1=\nsay "it"', ("1001",)),
            ("2", "2+2=", ("4",)),
        ]


def test_a_chat_and_fields_in_csv_are_json(tmp_path) -> None:
    with open(tmp_path / "a.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["messages", "reward", "note"])
        rows.writerow([json.dumps([*CHAT, ANSWER]), json.dumps({"gt": "2"}), '{"broken'])
    for answer_column in ("reward.gt", None):
        keys = {"question_column": "messages", "answer_column": answer_column}
        [found] = problems_of(str(tmp_path / "a.csv"), **keys, prompt_template="{question}{note}")
        assert found.messages == (TOLD, Message("user", '1+1={"broken'))
        assert found.answers == ("2",)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (TEXT.encode("utf-16"), "it is UTF-16 or no text; save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "it is UTF-16 or no text; save it as UTF-8"),
        ("question,answer\n\u00e9,2\n".encode("latin-1"), "line 2 is not UTF-8"),
        (b"question,answer\n1,2\n1,2,3\n", "row 2 has 3 fields, the first line 2"),
        (b'question,answer\n"1,2\n', "line 2 is not CSV"),
        (b"question,question,answer\n1,1,2\n", "its first line names the column 'question' twice"),
        (b"question;answer\n1;2\n", "no column 'question' (question_column); "),
        (b"question,answer\n,2\n", "row 1 has no text in its question column"),
        (b"question,answer\n1,\n", "no row has an answer in its column 'answer'"),
        (b"question,answer\n", "the data set is empty"),
        (b"", "the data set is empty"),
    ],
)
def test_a_file_that_is_no_csv_is_one_line(data, told, tmp_path) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert told in error_of(str(tmp_path / "a.csv"))


def test_utf_16_is_told_of_json_too(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"question": "q", "answer": 1}'.encode("utf-16"))
    assert "it is UTF-16" in error_of(str(tmp_path / "a.jsonl"))


@pytest.fixture
def many(tmp_path) -> Path:
    """Files of three formats, with what is no data beside them."""
    for number in range(3):
        row = {"question": f"{number}+1=", "answer": str(number + 1)}
        write(tmp_path / f"shards/part-{number:05d}.parquet", row)
    write(tmp_path / "a.csv", "question,answer", "5+5=,10")
    write(
        tmp_path / "b.jsonl", {"question": "6+6=", "answer": 12}, {"question": "5+5=", "answer": 0}
    )
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def test_patterns_and_lists_are_read_in_order_and_rows_named_after_their_files(
    many, monkeypatch
) -> None:
    monkeypatch.chdir(many)
    shards = [f"part-{number:05d}.parquet:1" for number in range(3)]
    for path in ("shards/*.parquet", f"file://{many}/shards/*.parquet", f"{many}/**/*.parquet"):
        assert [p.id for p in problems_of(path)] == shards
    config = DataConfig(path='["b.jsonl", "shards/*0.parquet", "a.csv"]')
    found, report = load_problems(config)
    assert [p.id for p in found] == ["b.jsonl:1", "b.jsonl:2", f"shards/{shards[0]}"]
    assert (report.num_files, report.num_rows, report.num_duplicates) == (3, 4, 1)
    assert "(3 files): 3 problems in use of 4 rows" in report.told(None)
    assert [p.id for p in problems_of("[ab].*")] == ["a.csv:1", "b.jsonl:1"]
    shutil.copy("b.jsonl", "b[1].jsonl")  # a file of that name is no pattern
    assert len(problems_of("b[1].jsonl")) == len(problems_of(f"file://{many}/b[[]1].jsonl")) == 2


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("none/*.jsonl", "/none/*.jsonl: no file matches this pattern"),
        ("memory://none/*.jsonl", "no file matches this pattern"),
        ("*.*", "notes.txt: the name must end in .jsonl, .json, .csv, .parquet"),
        ('["a.csv", "gone.csv"]', "gone.csv: no such file"),
        ('["a.csv", "quickstart:train"]', "an embedded task stands alone"),
        ('["a.csv"', "Expecting ',' delimiter"),
        (".", "the folder has files of .csv, .jsonl, .parquet; say which by a pattern such as "),
        ("x" * 5000, "File name too long"),
    ],
)
def test_a_path_of_several_that_leads_nowhere_is_one_line(many, path, told, monkeypatch) -> None:
    monkeypatch.chdir(many)
    assert told in error_of(path)


def test_a_row_is_told_with_its_file_among_several(many) -> None:
    write(many / "c.jsonl", {"question": "q", "answer": 1}, {"question": None, "answer": 1})
    told = error_of(f'["{many}/a.csv", "{many}/c.jsonl"]')
    assert "]: c.jsonl: line 2 has no text in its question column" in told
    write(many / "d.csv", "question,gold", "1+1=,2")
    told = error_of(f"{many}/[ad].csv")
    assert "[ad].csv: d.csv: no column 'answer' (answer_column); columns: question, gold" in told


def saved(folder: Path) -> tuple[str, str]:
    """A data set and one with splits, as `save_to_disk` writes them."""
    sets = {
        name: datasets.Dataset.from_list([{"prompt": CHAT, "r": {"gt": text}}])
        for name, text in (("train", "2"), ("test", "3"))
    }
    datasets.DatasetDict(sets).save_to_disk(folder / "several")
    sets["test"].save_to_disk(folder / "one")
    return str(folder / "one"), str(folder / "several")


def test_data_sets_saved_to_disk_are_read_with_their_splits(tmp_path) -> None:
    one, several = saved(tmp_path)
    keys = {"question_column": "prompt", "answer_column": "r.gt"}
    fsspec.filesystem("memory").put(several, "/kept", recursive=True)
    for path, split, answer in (
        (one, "train", "3"),  # it has no other
        (several, "train", "2"),
        (several, "test", "3"),
        (f"{several}/test", "train", "3"),
        (f"file://{several}", "test", "3"),
        ("memory://kept", "test", "3"),
    ):
        [found] = problems_of(path, split=split, **keys)
        assert (found.messages, found.answers) == ((TOLD, USER), (answer,))
    assert "no split 'dev' (split); splits: train, test" in error_of(several, split="dev", **keys)
    shutil.rmtree(f"{several}/test")
    assert problems_of(several, **keys)
    assert "the data set saved there cannot be loaded" in error_of(several, split="test", **keys)
    Path(one, "state.json").write_text("{}")
    assert "the data set saved there cannot be loaded" in error_of(one, **keys)


def test_a_folder_at_a_uri_gives_the_files_that_are_data(many) -> None:
    fsspec.filesystem("memory").put(str(many), "/many", recursive=True)
    assert len(problems_of("memory://many/shards")) == 3
    assert len(problems_of("memory://many/shards/*1.parquet")) == 1
    fsspec.filesystem("memory").pipe_file("/empty/notes.txt", b"x")
    assert "the folder has no file that ends in" in error_of("memory://empty")


def test_sets_that_are_trained_on_together_share_no_question(many) -> None:
    sections = {
        "prompts.mix.a": DataConfig(path=str(many / "a.csv")),
        "prompts.mix.b": DataConfig(path=str(many / "b.jsonl")),
    }
    loaded = load_together(sections)
    assert [[p.question for p in found] for found, _ in loaded.values()] == [["5+5="], ["6+6="]]
    assert [report.num_duplicates for _, report in loaded.values()] == [0, 1]
    sections["prompts.mix.c"] = sections["prompts.mix.a"]
    with pytest.raises(
        ValueError, match=r"^prompts\.mix\.c\.path=.*: the other data sets have all"
    ):
        load_together(sections)
    sections["prompts.mix.c"] = DataConfig()
    with pytest.raises(ValueError, match=r"^prompts\.mix\.c\.path is empty"):
        load_together(sections)
