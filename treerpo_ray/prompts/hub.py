"""Hub: Hugging Face ids, and whether it was the connection that failed or the id."""

import re

from huggingface_hub.errors import LocalEntryNotFoundError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Unreachable(ValueError):
    """An id that could not be looked up: no connection, and nothing of it in the cache."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"{key}: there is no connection to Hugging Face and its cache here does not hold it; "
            "connect, or give a local path"
        )


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an error of `transformers` or `datasets` comes from a missing connection.

    An id that does not exist is told by the Hub itself, so that it is not one of these.
    """
    while error is not None:
        if isinstance(error, ConnectionError | LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False
