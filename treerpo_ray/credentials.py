"""Credentials: found in settings, which are written into the run folder, logs and W&B as they are.

They belong into the environment, a profile or the machine's role, where every store looks for them.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

# `abfs://container@account` and its kin name a place with an at sign, without a secret.
USER = re.compile(r"(?<![\w+.-])(?!(?:abfss?|wasbs?)://[^/@:]*@)[a-z][\w+.-]*://[^/@\s]+@", re.I)
SIGNED = re.compile(r"[?&][^=&\s]*(?:key|sig|token|secret|password|credential)[^=&\s]*=", re.I)
"""A parameter of a URL that opens what it points to."""


def credential_keys(section: object, prefix: str = "") -> Iterator[str]:
    """Keys of a configuration (a dataclass) whose value holds a credential."""
    if not is_dataclass(section):
        return
    for field in fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if isinstance(value, str) and (USER.search(value) or SIGNED.search(value)):
            yield key
        yield from credential_keys(value, f"{key}.")
