"""Columns are found by name and by what a point reaches; templates are filled from them."""

import pytest

from treerpo_ray.prompts.columns import Template, cell_of, reach, top_level, unknown_column

ROW = {
    "question": "1+1=",
    "reward_model": {"style": "rule", "ground_truth": "2", "none": None},
    "messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
    "a.b": {"c.d": 5, "c": {"d": 6}},
    "my column": 7,
}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("question", "1+1="),
        ("reward_model.ground_truth", "2"),
        ("messages.0.content", "1+1="),
        ("messages.-1.content", "2"),
        ("a.b.c.d", 5),  # a name with points comes first
        ("my column", 7),
        ("reward_model.none", None),
    ],
)
def test_a_column_is_reached(column: str, expected: object) -> None:
    assert reach(ROW, column) == cell_of(ROW, column) == expected


@pytest.mark.parametrize(
    "column",
    ["", "gone", "reward_model.gone", "messages.2.content", "messages.content", "question.0",
     "reward_model.none.x", "messages.0x", "messages.99999999999999999999.role", "question."],
)  # fmt: skip
def test_what_is_not_there_is_an_error_or_none(column: str) -> None:
    with pytest.raises(LookupError):
        reach(ROW, column)
    assert cell_of(ROW, column) is None


def test_the_top_level_column_of_a_column_is_the_longest_name() -> None:
    assert top_level("a.b.c", ["a", "a.b"]) == "a.b"
    assert top_level("a.b.c", ["b"]) is None


def test_a_column_that_is_not_there_is_told_with_what_there_is() -> None:
    told = unknown_column("questoin", "question_column", "prompts", list(ROW), [ROW])
    assert told.startswith(
        "no column 'questoin' (question_column); did you mean prompts.question_column=question? "
    )
    taken = unknown_column(
        "questoin", "question_column", "prompts", list(ROW), [ROW], taken=["question"]
    )
    assert "did you mean" not in taken
    assert told.endswith("prompts.question_column=messages reads the chats that are there")
    told = unknown_column("answer", "answer_column", "evaluate.data", list(ROW), [ROW])
    assert "in them: reward_model.style, reward_model.ground_truth, " in told
    assert "evaluate.data.answer_column=null takes the assistant's message that ends" in told
    assert "prompts.answer_column holds" in told
    many = [f"c{number}" for number in range(40)]
    assert unknown_column("x", "id_column", "prompts", many, []).endswith("c11 and 28 more")


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{question}", "Q {x}"),
        ("{my column}: {question}!", "7: Q {x}!"),
        ("{reward_model.style} {question} {question}", "rule Q {x} Q {x}"),
        (r"{question} in \boxed{}", r"Q {x} in \boxed{}"),
        (r"{question} in \boxed{{}}", r"Q {x} in \boxed{}"),
        (r"\frac{{1}}{{2}} { {question} }", r"\frac{1}{2} { Q {x} }"),
    ],
)
def test_a_template_is_filled_once(text: str, filled: str) -> None:
    template = Template(text)
    template.check("question")
    assert template.fill("Q {x}", ROW) == filled


def test_a_template_names_its_columns_and_must_ask_the_question() -> None:
    assert Template("{a} {question} {b.c} {a} {{d}}").columns == ("a", "b.c")
    Template("{problem}").check("problem")
    for text in ("", "Solve.", "{answer}", "{{question}}"):
        with pytest.raises(ValueError, match=r"has no \{question\}"):
            Template(text).check("problem")
    for column in ("messages", "gone", "reward_model.none"):
        with pytest.raises(ValueError, match=f"neither text nor a number in '{column}'"):
            Template(f"{{question}} {{{column}}}").fill("q", ROW)


def test_what_data_sets_usually_call_a_column_is_proposed_and_not_what_only_sounds_alike() -> None:
    row = {"solution": "We add. \\boxed{15}", "problem": "12+3="}
    told = unknown_column("question", "question_column", "prompts", list(row), [row])
    assert "did you mean prompts.question_column=problem? " in told
    told = unknown_column("answer", "answer_column", "prompts", list(row), [row])
    assert "did you mean prompts.answer_column=solution? " in told
    told = unknown_column("id", "id_column", "prompts", list(row), [row])
    assert "did you mean" not in told
