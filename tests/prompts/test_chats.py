"""Chats of every spelling become messages; the answer at their end is no part of the prompt."""

import pytest

from treerpo_ray.prompts.chats import (
    Message,
    has_answer,
    is_chat,
    question_of,
    read_chat,
    split_answer,
    with_question,
    with_system,
)

USER, ASSISTANT = Message("user", "1+1="), Message("assistant", "2")
SYSTEM = Message("system", "Think.")


def chat(*pairs: tuple[object, object], keys: tuple[str, str] = ("role", "content")) -> list:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    "cell",
    [
        chat(("system", "Think."), ("user", "1+1="), ("assistant", "2")),
        chat(("system", "Think."), ("human", "1+1="), ("gpt", "2"), keys=("from", "value")),
        chat(("System", "Think."), ("User", "1+1="), ("ASSISTANT", "2")),
        chat(("system", "Think."), ("user", [{"type": "text", "text": "1+1="}]),
             ("assistant", ["", "2"])),
        [each | {"name": None, "tool_calls": None}
         for each in chat(("system", "Think."), ("user", "1+1="), ("assistant", "2"))],
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same_messages(cell: list) -> None:
    assert is_chat(cell) and has_answer(cell)
    messages = read_chat(cell)
    assert messages == (SYSTEM, USER, ASSISTANT)
    assert split_answer(messages) == ((SYSTEM, USER), "2")
    assert question_of(messages) == "1+1="


@pytest.mark.parametrize(
    "cell", [None, "q", [], ["q"], [{"role": "user"}], [{}], {"role": "user", "content": "q"}, 3]
)
def test_what_is_no_list_of_messages_is_no_chat(cell: object) -> None:
    assert not is_chat(cell) and not has_answer(cell)


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        (chat(("narrator", "x")), r"message 1 is of 'narrator'; roles are system, "),
        (chat((None, "x")), "message 1 is of None"),
        (chat(("user", "q"), ("assistant", None)), "message 2 is not text"),
        (chat(("user", [{"type": "image_url", "image_url": "x"}])), "message 1 is not text"),
        (chat(("user", [])), "message 1 is not text"),
        (chat(("user", 5)), "message 1 is not text"),
    ],
)
def test_a_message_that_cannot_be_read_is_told_with_its_number(cell: list, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_chat(cell)


def test_turns_before_the_last_question_stay_and_all_answers_behind_it_go() -> None:
    first = (Message("user", "2+2="), Message("assistant", "4"))
    assert split_answer((*first, USER)) == ((*first, USER), None)
    assert split_answer((*first, USER, Message("assistant", "1"), ASSISTANT)) == (
        (*first, USER),
        "2",
    )


@pytest.mark.parametrize("found", [(), (SYSTEM,), (ASSISTANT,), (SYSTEM, ASSISTANT)])
def test_a_chat_without_a_user_is_refused(found: tuple[Message, ...]) -> None:
    with pytest.raises(ValueError, match="without a message of a user"):
        split_answer(found)


def test_a_question_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="last message of a user has no text"):
        split_answer((USER, Message("user", " \n")))


def test_the_last_question_and_the_system_message_are_replaced() -> None:
    found = with_question((USER, ASSISTANT, USER, SYSTEM), "new")
    assert found == (USER, ASSISTANT, Message("user", "new"), SYSTEM)
    own = Message("system", "mine")
    assert with_system((SYSTEM, USER), "mine") == with_system((USER,), "mine") == (own, USER)
    assert with_system((Message("developer", "x"), USER), "mine") == (own, USER)
    assert with_system((SYSTEM, USER), None) == (SYSTEM, USER)
