"""Examples: a right and a wrong answer, each on lines that fit a terminal."""

from pathlib import Path

import pyarrow as pa
from rich.cells import cell_len

from treerpo_ray.evaluate.evaluation import SAMPLES
from treerpo_ray.evaluate.examples import Example, examples
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.verifier.verdict import Verdict


def write(folder: Path, rows: list[tuple[str, str, str]]) -> RunFolder:
    """A run folder with an evaluation of these questions, answers and verdicts."""
    columns = [
        {"question": question, "text": text, "verdict": verdict, "references": ["7", "seven"]}
        for question, text, verdict in rows
    ]
    run = RunFolder(str(folder))
    run.publish_table("eval/step=000000.parquet", pa.Table.from_pylist(columns, schema=SAMPLES))
    return run


def test_one_right_and_one_wrong_answer_are_of_different_questions_where_there_are_such(
    tmp_path: Path,
) -> None:
    cases = [
        ([("a", "1", "wrong"), ("b", "2", "correct"), ("b", "3", "wrong")], ["b2", "a1"]),
        ([("b", "3", "unanswered"), ("b", "2", "correct")], ["b2", "b3"]),
        ([("b", "2", "correct")], ["b2"]),
        ([("a", "1", "errored"), ("a", "2", "cut_off")], ["a2"]),  # an error is no wrong answer
        ([("a", "1", "timed_out")], []),
    ]
    for number, (rows, expected) in enumerate(cases):
        run = write(tmp_path / f"{number}", rows)
        found = examples(run, "step=000000")
        assert [each.question + each.text for each in found] == expected


def test_an_evaluation_that_is_not_there_or_torn_has_no_examples(tmp_path: Path) -> None:
    run = write(tmp_path, [("a", "1", "wrong")])
    assert examples(run, "step=000001") == []
    (tmp_path / "eval/step=000000.parquet").write_bytes(b"PAR1 torn")
    assert examples(run, "step=000000") == []


def test_an_example_is_three_lines() -> None:
    example = Example(
        question="1+2+4=?",
        text="1+2=3\n\n3+4=7\n#### 7\n",
        references=("7",),
        verdict=Verdict.CORRECT,
    )
    assert example.lines(80) == [
        "correct     1+2+4=?",
        "  answer    1+2=3 / 3+4=7 / #### 7",
        "  reference 7",
    ]


def test_whatever_a_model_writes_fits_the_width_and_moves_no_cursor() -> None:
    texts = [
        "step\n" * 400 + "#### 7",
        "\x1b[2J\x1b]0;title\x07\r\b#### 7",
        "答" * 300 + "#### 7",
        "\ud800 \u202e #### 7",
        "",
    ]
    for text in texts:
        for width in (20, 80, 160):
            example = Example(
                question=text, text=text, references=(text, "7"), verdict=Verdict.CUT_OFF
            )
            lines = example.lines(width)
            assert len(lines) == 3
            for line in lines:
                assert cell_len(line) <= width
                assert line.isprintable()
            assert not text or lines[1].endswith("7")  # where the result stands
