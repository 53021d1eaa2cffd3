"""Wire: records of the viewer as the JSON that its page reads."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import numpy as np

DIGITS = 5
"""Digits behind the point; the page shows three at most."""


def to_json(value: object) -> str:
    """JSON of dataclasses, arrays and what they are made of; NaN and infinities become null.

    It holds no `<`, so that it can stand inside a page whatever texts are in it.
    """
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    return value
