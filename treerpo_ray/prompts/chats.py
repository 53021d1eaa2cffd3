"""Chats: lists of messages as data sets hold them, in the spellings that are in use.

    [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": "2"}]

The assistant's message that ends a chat is no part of the prompt: it may be the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

SPELLINGS = (("role", "content"), ("from", "value"))
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


def is_chat(cell: object) -> TypeGuard[list[dict[str, object]]]:
    """Whether a cell of a data set is a list of messages, well formed or not."""
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(each, dict) and _spelling(each) is not None for each in cell)
    )


def has_answer(cell: object) -> bool:
    """Whether a cell is a chat that ends with a message of the assistant."""
    if not is_chat(cell):
        return False
    role, _ = (cell[-1][key] for key in _spelling(cell[-1]) or ())
    return isinstance(role, str) and ROLES.get(role.lower()) == "assistant"


def read_chat(cell: Sequence[dict[str, object]]) -> tuple[Message, ...]:
    """The messages of a cell that `is_chat`.

    Raises:
        ValueError: a message has an unknown role or holds no text.
    """
    return tuple(_read_message(each, number) for number, each in enumerate(cell, start=1))


def split_answer(chat: Sequence[Message]) -> tuple[tuple[Message, ...], str | None]:
    """The chat without the assistant's messages at its end, and the last of these.

    Raises:
        ValueError: what is left has no message of a user, or the last of these has no text.
    """
    prompt, answer = list(chat), None
    while prompt and prompt[-1].role == "assistant":
        last = prompt.pop()
        answer = last.content if answer is None else answer
    asked = [message for message in prompt if message.role == "user"]
    if not asked:
        raise ValueError("has a chat without a message of a user before the answer")
    if not asked[-1].content.strip():
        raise ValueError("has a chat whose last message of a user has no text")
    return tuple(prompt), answer


def with_question(chat: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The chat with another text as its user's last message."""
    last = max(number for number, message in enumerate(chat) if message.role == "user")
    return (*chat[:last], Message("user", text), *chat[last + 1 :])


def question_of(chat: Sequence[Message]) -> str:
    """The user's last message."""
    return next(message.content for message in reversed(chat) if message.role == "user")


def with_system(chat: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The chat with that system message in place of its own; None: as it is."""
    if system_prompt is None:
        return tuple(chat)
    rest = chat[1:] if chat[0].role in ("system", "developer") else chat
    return (Message("system", system_prompt), *rest)


def _spelling(message: dict[str, object]) -> tuple[str, str] | None:
    return next((keys for keys in SPELLINGS if all(key in message for key in keys)), None)


def _read_message(message: dict[str, object], number: int) -> Message:
    spelling = _spelling(message)
    assert spelling is not None  # `is_chat`
    role, content = (message[key] for key in spelling)
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(
            f"has a chat whose message {number} is of {role!r}; roles are {', '.join(ROLES)}"
        )
    return Message(known, _text_of(content, number))


def _text_of(content: object, number: int) -> str:
    """Text of a message, which may come in parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if not found or len(found) < len(texts):
        raise ValueError(f"has a chat whose message {number} is not text; take the row out")
    return "".join(found)
