"""Hub: Hugging Face ids, and whether it was the connection that failed or the id."""

import os
import re
from collections.abc import Iterator
from functools import cache

from huggingface_hub import constants, get_session, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.logging import disable_propagation

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
ANSWER_S = 5.0
"""Time for the Hub to answer at all."""


NO_CONNECTION = "there is no connection to Hugging Face"
ASKED_FOR = "HF_HUB_OFFLINE is set, so that Hugging Face is not asked"


class Unreachable(ValueError):
    """An id that could not be looked up: no connection, and nothing of it in the cache."""

    def __init__(self, key: str) -> None:
        why = offline_because() or NO_CONNECTION
        remedy = "unset it" if why == ASKED_FOR else "connect"
        super().__init__(
            f"{key}: {why}, and its cache here does not hold it; {remedy}, or give a local path"
        )


@cache
def offline_because() -> str | None:
    """Why nothing is asked of the Hub, in words; None if it answers.

    It is asked once, before anything is looked up. Where it does not answer, only the cache counts
    from then on, in the processes that this one starts, too: its client and that of its data sets
    would try again for half a minute, for each file.
    """
    if is_offline_mode():
        return ASKED_FOR
    disable_propagation()  # it prints its warnings itself, and our log would print them again
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
    except Exception:  # whatever its client raises: there was no answer
        import datasets

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return NO_CONNECTION
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of `transformers` or `datasets` comes from a missing connection.

    An id that does not exist is told by the Hub itself, so that it is not one of these.
    """
    return any(isinstance(e, ConnectionError | LocalEntryNotFoundError) for e in _chain(error))


def refusal(error: BaseException) -> str | None:
    """What the Hub has against an id in one line, with what to do; None if it has nothing."""
    kinds = [each for each in _chain(error) if isinstance(each, RepositoryNotFoundError)]
    if any(isinstance(each, GatedRepoError) for each in kinds):
        return "its terms must be accepted on its page at Hugging Face, and `hf auth login` run"
    if kinds:
        return (
            "there is nothing of that name at Hugging Face, or it is private and `hf auth login` "
            "has not been run; is it written as on its page (ORG/NAME)?"
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
