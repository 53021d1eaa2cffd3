"""Keys: the settings that there are, what they mean, the kind of each, and texts on the command
line."""

import ast
import inspect
import itertools
import json
from dataclasses import is_dataclass
from types import NoneType
from typing import cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from yaml import YAMLError

from treerpo_ray.config.config import Config
from treerpo_ray.config.identity import is_free


def known_keys(section: type, prefix: str = "") -> list[str]:
    """Sections and settings by their whole key."""
    keys = []
    for name, kind in get_type_hints(section).items():
        keys.append(prefix + name)
        if isinstance(kind, type) and is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def text_of(key: str, value: str) -> str | None:
    """What a text on the command line means: itself, whatever YAML would make of it, less quotes
    around all of it. None: it is no text, but null or a list of paths."""
    if value == "null" or (key.rpartition(".")[2] == "path" and value.startswith("[")):
        return None
    if not value:
        return None if is_optional(kind_of(key)) else ""
    if value[0] in "'\"":
        try:
            quoted = yaml.safe_load(value)
        except YAMLError:
            return value
        return quoted if isinstance(quoted, str) else value
    return value


def kind_of(key: str) -> object:
    """The type of a setting by its whole key, with names of the user's own; None: there is none."""
    kind: object = Config
    for name in key.split("."):
        if isinstance(kind, type) and is_dataclass(kind):
            kind = get_type_hints(kind).get(name)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
    return kind


def is_optional(kind: object) -> bool:
    """Whether null is of that type."""
    return NoneType in get_args(kind)


def is_text(key: str) -> bool:
    """Whether a setting is a text, which may be left out or not."""
    return set(get_args(kind) if is_optional(kind := kind_of(key)) else [kind]) <= {str, NoneType}


def kind_in_words(key: str) -> str:
    """What a setting takes, for messages."""
    origin = get_origin(kind_of(key))
    if origin is dict:
        return "a mapping such as '{a: 1, b: 2}'"
    return "a list such as '[4, 2]'" if origin in (list, tuple) else "a YAML value"


def describe() -> str:
    """Every section with its keys, their defaults, what they mean, and which of them may change
    when a run is started again."""
    plain = OmegaConf.to_container(OmegaConf.structured(Config), enum_to_str=True)
    defaults = cast(dict[str, dict[str, object]], plain)
    lines = []
    for section, kind in get_type_hints(Config).items():
        lines.append(f"\n{section}: {inspect.getdoc(kind)}")
        notes = _field_notes(kind)
        lines += [
            f"  {section}.{name} = {json.dumps(default)}\n      {notes[name]}"
            f"{' (A run may be resumed with another.)' * is_free(f'{section}.{name}')}"
            for name, default in defaults[section].items()
        ]
    return "\n".join(lines)


def _field_notes(kind: type) -> dict[str, str]:
    """The sentence under each field of a dataclass."""
    bases = [base for base in reversed(kind.__mro__) if is_dataclass(base)]
    body = [
        statement
        for base in bases
        for section in ast.parse(inspect.getsource(base)).body
        if isinstance(section, ast.ClassDef)
        for statement in section.body
    ]
    notes = {}
    for pair in itertools.pairwise(body):
        match pair:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(note))),
            ):
                notes[name] = inspect.cleandoc(note).replace("\n", " ")
    return notes
