"""Problems become prompts by the tokenizer's own rules, and model paths are found."""

import json
import logging
import os
import re

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from tests.support.project import PROJECT
from treerpo_ray.config.data import DataConfig, PromptsConfig
from treerpo_ray.prompts.chats import Message
from treerpo_ray.prompts.hub import Unreachable
from treerpo_ray.prompts.problems import Problem
from treerpo_ray.prompts.prompt_set import (
    PromptSet,
    end_token_ids,
    load_tokenizer,
    one_token,
    resolve_model_path,
)
from treerpo_ray.quickstart.tokenizer import make_tokenizer

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"

THINKING = (  # with a tag of transformers' own and one of jinja's loop controls
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if not m.content %}{% break %}{% endif %}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{{ mark }}"
)


def problem(question: str) -> Problem:
    return Problem(id=question, question=question, answers=("1",))


def tokenizer_with(chat_template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("chat_template", "system_prompt", "text"),
    [
        (TURNS + GENERATION, None, "<user>1+1=?<assistant>"),
        (TURNS + GENERATION, "Think.", "<system>Think.<user>1+1=?<assistant>"),
        (None, None, "1+1=?\n"),
        (None, "Think.", "Think.\n1+1=?\n"),
    ],
)
def test_a_prompt_is_the_template_with_the_turn_of_the_model_open(
    chat_template, system_prompt, text
):
    tokenizer = tokenizer_with(chat_template)
    config = PromptsConfig(system_prompt=system_prompt)
    prompts = PromptSet.encode([problem("1+1=?")], tokenizer, config)
    assert prompts.token_ids == (tokenizer(text)["input_ids"],)
    assert tokenizer.decode(prompts.token_ids[0]) == text


@pytest.mark.parametrize("first", [None, "<bos>"])
def test_a_prompt_does_not_end_with_the_end_token_that_a_tokenizer_adds_to_texts(first):
    tokenizer = tokenizer_with(None)
    plain = PromptSet.encode([problem("1+1=?")], tokenizer, PromptsConfig()).token_ids[0]
    end, start = tokenizer.eos_token_id, 7
    added = {"<bos>": start, tokenizer.eos_token: end}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first or ''} $A {tokenizer.eos_token}".strip(), special_tokens=list(added.items())
    )
    assert tokenizer("1+1=?\n")["input_ids"][-1] == end
    prompts = PromptSet.encode([problem("1+1=?")], tokenizer, PromptsConfig())
    assert prompts.token_ids == ([start] * (first is not None) + plain,)


def test_prompts_that_are_too_long_are_counted_and_left_out():
    problems = [problem("x" * length) for length in (7, 8, 9, 10, 3)]
    config = PromptsConfig(max_prompt_tokens=9)
    prompts = PromptSet.encode(problems, tokenizer_with(None), config)
    assert [len(ids) for ids in prompts.token_ids] == [8, 9, 4]
    assert prompts.problems == (problems[0], problems[1], problems[4])
    assert (len(prompts), prompts.num_too_long) == (3, 2)


def test_no_prompt_that_is_short_enough_is_one_line_with_the_key():
    config = PromptsConfig(path="rows.jsonl", max_prompt_tokens=3)
    told = r"^evaluate\.data\.max_prompt_tokens=3 leaves no prompt of rows\.jsonl: .* 5 tokens$"
    with pytest.raises(ValueError, match=told):
        PromptSet.encode([problem("xxxx")], tokenizer_with(None), config, "evaluate.data")


@pytest.mark.parametrize("chat_template", [TURNS, None])
def test_a_long_question_brings_no_warning(chat_template, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tokenizer_with(chat_template)
    config = PromptsConfig(max_prompt_tokens=100)
    prompts = PromptSet.encode([problem("x" * 5000), problem("y")], tokenizer, config)
    assert prompts.num_too_long == 1
    assert not caplog.records


def test_a_template_that_refuses_the_system_prompt_is_one_line_with_the_key():
    tokenizer = tokenizer_with(NO_SYSTEM + TURNS)
    with pytest.raises(ValueError, match=r"^prompts\.system_prompt='Think\.': .*no system"):
        PromptSet.encode([problem("q")], tokenizer, PromptsConfig(system_prompt="Think."))


def test_a_chat_is_asked_whole_with_the_system_prompt_in_place_of_its_own() -> None:
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    chat = tuple(Message(*turn) for turn in turns)
    asked = Problem(id="1", question="d", answers=("1",), messages=chat)
    for template, system_prompt, text in (
        (TURNS + GENERATION, None, "<system>a<user>b<assistant>c<user>d<assistant>"),
        (TURNS + GENERATION, "x", "<system>x<user>b<assistant>c<user>d<assistant>"),
        (None, None, "a\nb\nc\nd\n"),
    ):
        tokenizer = tokenizer_with(template)
        config = DataConfig(system_prompt=system_prompt)
        [ids] = PromptSet.encode([asked], tokenizer, config).token_ids
        assert tokenizer.decode(ids) == text


def test_arguments_reach_the_chat_template() -> None:
    tokenizer = tokenizer_with(THINKING)
    for given, text in (
        ({}, "1<think>"),
        ({"enable_thinking": False}, "1"),
        ({"mark": 3}, "1<think>3"),
    ):
        [ids] = PromptSet.encode(
            [problem("1")], tokenizer, DataConfig(chat_template_args=given)
        ).token_ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("template", "given", "told"),
    [
        (THINKING, "enable_thinkin", "has no such variable; did you mean enable_thinking? it has: "
                                     "enable_thinking, mark"),
        (THINKING, "messages", "has no such variable; it has: enable_thinking, mark"),
        (THINKING, "tools", "has no such variable; it has: enable_thinking, mark"),
        (TURNS, "enable_thinking", "has no such variable; it has: none"),
        (None, "enable_thinking", "the model has no chat template; leave them out"),
    ],
)  # fmt: skip
def test_an_argument_that_the_chat_template_would_pass_over_is_one_line(
    template, given, told
) -> None:
    config = DataConfig(chat_template_args={given: True})
    with pytest.raises(
        ValueError, match=rf"^evaluate\.data\.chat_template_args\W.*{re.escape(told)}"
    ):
        PromptSet.encode([problem("1")], tokenizer_with(template), config, "evaluate.data")


def test_a_chat_that_the_template_refuses_is_one_line_with_the_file() -> None:
    told = Problem(
        id="1",
        question="q",
        answers=("1",),
        messages=(Message("system", "x"), Message("user", "q")),
    )
    with pytest.raises(
        ValueError, match=r"^prompts\.path=a\.jsonl: .*refuses these messages \(no system"
    ):
        PromptSet.encode([told], tokenizer_with(NO_SYSTEM + TURNS), DataConfig(path="a.jsonl"))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (256,)),
        ({}, (256,)),
        ({"eos_token_id": 7}, (256, 7)),
        ({"eos_token_id": [7, 256, 9]}, (256, 7, 9)),
    ],
)
def test_end_tokens_are_those_of_tokenizer_and_generation_config(tmp_path, generation, expected):
    make_tokenizer().save_pretrained(tmp_path)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert tokenizer.eos_token_id == 256
    assert end_token_ids(str(tmp_path), tokenizer) == expected


def test_a_corrupt_generation_config_and_a_model_without_end_token_are_one_line(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        end_token_ids(str(tmp_path), tokenizer)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        end_token_ids(str(tmp_path), tokenizer)


def test_a_folder_without_a_tokenizer_is_one_line_with_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"^model\.path=.*: no tokenizer \(.*\)$"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


def test_a_model_id_that_cannot_be_looked_up_is_told_from_a_folder_without_a_tokenizer(
    without_hub,
):
    with pytest.raises(Unreachable, match=r"^model\.path=someone/model: HF_HUB_OFFLINE is set"):
        load_tokenizer("someone/model", trust_remote_code=False)


def test_a_relative_model_path_is_found_here_first_and_then_beside_the_package(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    relative = os.path.join("treerpo_ray", "quickstart")
    assert resolve_model_path(relative) == str(PROJECT / relative)
    (tmp_path / relative).mkdir(parents=True)
    assert resolve_model_path(relative) == str(tmp_path / relative)
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)


def test_an_id_of_the_hub_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("Qwen/Qwen2.5-Math-1.5B") == "Qwen/Qwen2.5-Math-1.5B"


@pytest.mark.parametrize("path", ["", "./model", "/no/such/model", "~/no_such_model", "a/b/c"])
def test_a_model_folder_that_is_missing_is_one_line_with_the_key(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.path=.*no such folder"):
        resolve_model_path(path)


def test_a_file_is_no_model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model_path("model")


@pytest.mark.parametrize("text", ["\n", "a", "="])
def test_a_delimiter_of_one_token_is_its_id(text):
    tokenizer = make_tokenizer()
    token = one_token(tokenizer, text)
    assert tokenizer.decode([token]) == text


@pytest.mark.parametrize(("text", "size"), [("", 0), ("\n\n", 2), ("ab", 2), ("\u00e9", 2)])
def test_a_delimiter_of_more_or_less_than_one_token_is_one_line_with_the_key(text, size):
    told = f"tree.delimiter={text!r} is {size} tokens for this tokenizer; it must be one"
    with pytest.raises(ValueError) as caught:
        one_token(make_tokenizer(), text)
    assert str(caught.value) == told
