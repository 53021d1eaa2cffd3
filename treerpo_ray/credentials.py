"""Credentials: found in settings, which are written into the run folder, logs and W&B as they are.

They belong into the environment, a profile or the machine's role, where every store looks for them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass

# `abfs://container@account` and its kin name a place with an at sign, without a secret.
USER = re.compile(r"(?<![\w+.-])(?!(?:abfss?|wasbs?)://[^/@:]*@)[a-z][\w+.-]*://[^/@\s]+@", re.I)
SIGNED = re.compile(r"[?&][^=&\s]*(?:key|sig|token|secret|password|credential)[^=&\s]*=", re.I)
"""A parameter of a URL that opens what it points to."""


def credential_keys(value: object, key: str = "") -> Iterator[str]:
    """Keys of what a configuration (a dataclass) holds at any depth that have a credential."""
    if isinstance(value, str):
        if USER.search(value) or SIGNED.search(value):
            yield key
        return
    inner: Iterable[tuple[object, object]] = ()
    if is_dataclass(value):
        inner = ((item.name, getattr(value, item.name)) for item in fields(value))
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for name, part in inner:
        yield from credential_keys(part, f"{key}.{name}" if key else f"{name}")
