"""Keys: their kinds, and texts on the command line."""

from pathlib import Path

import pytest

from treerpo_ray.config.config import Config
from treerpo_ray.config.files import load, to_yaml
from treerpo_ray.config.keys import (
    is_optional,
    is_text,
    kind_in_words,
    kind_of,
    known_keys,
    text_of,
)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{question} Think.",
            "Q: {question}",
            "{question}",
            "* {question}\n#",
            "yes",
            "12",
            "1e3",
        ),
        *("[INST] {question}", "# {question}", "\"a\" or 'b'", "It's {question}", "{question}\\n"),
        *("Solve ${question}$.", "costs ${5}, \\${x}", "%{question} é 🙂", "- a", " {question} "),
    ],
)
def test_a_text_on_the_command_line_is_itself(text: str, tmp_path: Path) -> None:
    """Whatever YAML or OmegaConf would make of it, and again from the `config.yaml` of its run."""
    found = load([f"prompts.system_prompt={text}"])
    assert found.prompts.system_prompt == text == found.evaluate.data.system_prompt
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(found), encoding="utf-8")
    assert load([str(file)]) == found
    mixed = load([f"prompts.mix.a.system_prompt={text}", "prompts.mix.a.path=x"])
    assert mixed.prompts.mix["a"].system_prompt == text


def test_quotes_around_all_of_a_text_are_not_of_it_and_null_is_none() -> None:
    def of(value: str) -> str | None:
        return load([f"prompts.system_prompt={value}"]).prompts.system_prompt

    assert of('"{question}\\n!"') == "{question}\n!"
    assert of("'null'") == "null"
    assert of("null") is None and of("") is None
    assert load(["prompts.path=[a.csv, b.csv]"]).prompts.paths == ("a.csv", "b.csv")


def test_every_section_and_setting_is_known_by_its_whole_key_and_has_a_kind() -> None:
    keys = known_keys(Config)
    assert {"run", "run.name", "evaluate.data", "evaluate.data.path"} <= set(keys)
    assert len(keys) == len(set(keys)) > 100
    assert [key for key in keys if kind_of(key) is None] == []


def test_the_kind_of_what_is_below_a_name_of_the_users_own_is_that_of_all_such() -> None:
    assert kind_of("prompts.mix.any.max_prompt_tokens") is int
    assert kind_of("engine.resources.GPU") is float
    for key in ("", "run.nothing", "nothing.at.all", "run.name.length", "engine.resources.GPU.x"):
        assert kind_of(key) is None


def test_a_text_may_be_null_where_it_is_optional() -> None:
    for key, text, optional in (
        ("run.name", True, False),
        ("prompts.system_prompt", True, True),
        ("prompts.mix.a.id_column", True, True),
        ("run.num_steps", False, False),
        ("run.max_sampled_tokens", False, True),
        ("tree.num_children", False, False),
    ):
        assert (is_text(key), is_optional(kind_of(key))) == (text, optional), key


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("prompts.system_prompt", "", None),
        ("run.name", "", ""),
        ("run.name", "null", None),
        ("run.name", "'12'", "12"),
        ("run.name", "'a' or 'b'", "'a' or 'b'"),
        ("run.name", '"not closed', '"not closed'),
        ("run.name", "[a, b]", "[a, b]"),
        ("prompts.mix.a.path", "[a, b]", None),
    ],
)
def test_what_stands_on_the_command_line_is_a_text_but_for_null_and_lists_of_paths(
    key: str, given: str, meant: str | None
) -> None:
    assert text_of(key, given) == meant


def test_what_a_setting_takes_is_told_by_an_example() -> None:
    for key, words in (
        ("engine.resources", "a mapping such as '{a: 1, b: 2}'"),
        ("tree.num_children", "a list such as '[4, 2]'"),
        ("run.seed", "a YAML value"),
    ):
        assert kind_in_words(key) == words
