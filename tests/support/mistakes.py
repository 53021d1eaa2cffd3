"""Mistakes of users, as they are told."""

import pytest

from treerpo_ray.config.files import load


def mistake(*arguments: str) -> str:
    """The message about a mistake in a configuration; it must be one line."""
    with pytest.raises(ValueError) as caught:
        load(list(arguments))
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
