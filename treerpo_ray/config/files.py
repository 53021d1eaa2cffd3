"""Configuration files: merged left to right, then `section.key=value` overrides; and back."""

import difflib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import is_dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TypeVar, cast, get_origin, get_type_hints

import yaml
from omegaconf import Container, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from treerpo_ray.config.config import Config
from treerpo_ray.config.data import INHERITED, PROJECT, DataConfig
from treerpo_ray.config.identity import Flat, flatten, is_free, name_from
from treerpo_ray.config.keys import is_text, kind_in_words, kind_of, known_keys, text_of
from treerpo_ray.errors import one_line
from treerpo_ray.user_code import read_source, split_function

T = TypeVar("T")

MOVED_MODULES = {
    "treerpo_ray.math_answer": "treerpo_ray.verifier.math_answer",
    "treerpo_ray.boxed_answer": "treerpo_ray.verifier.boxed_answer",
}
"""Modules that configurations of earlier versions name, and where they are now."""
PAST_KEYS: Flat = {"gate.revisit": 0.0}
"""Settings of earlier versions that are no longer there, with the value at which they did nothing:
that is read as if it were not said, and no other is."""
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast where libyaml is there."""
BENCHMARKS = "evaluate.benchmarks"
SHAPE_KEYS = ("num_children", "step_tokens")
JOB_FOLDER = re.compile(r"(?:^|(?<=\"))/[^\"]*?/working_dir_files/_ray_pkg_\w+/")
"""Where Ray unpacks the working folder of a job, which has another name for each job."""
REFERENCE = re.compile(r"(\\*)\$\{")
"""What OmegaConf takes for the beginning of a reference, with the backslashes before it."""
PACKAGE = "treerpo_ray"
"""Modules that are the same wherever this version runs."""
USER_CODE = {
    "verifier": ("verifier.check",),
    "learner": ("learner.advantage", "learner.prune"),
}
"""Sections with the beginnings of the keys that name code of the user's."""


def with_moved_modules(value: T) -> T:
    """A configuration as YAML gives it, each module that has moved under its present name."""
    if isinstance(value, dict):
        return cast(T, {key: with_moved_modules(part) for key, part in value.items()})
    if isinstance(value, list):
        return cast(T, [with_moved_modules(part) for part in value])
    return cast(T, MOVED_MODULES.get(value, value)) if isinstance(value, str) else value


def _without_past_keys(content: object) -> object:
    """A configuration as YAML gives it, without those PAST_KEYS that do nothing."""
    for key, value in PAST_KEYS.items():
        section, _, name = key.partition(".")
        part = content.get(section) if isinstance(content, dict) else None
        if isinstance(part, dict) and name in part and part[name] == value:
            del part[name]
    return content


def lost_settings(kept: Flat) -> list[str]:
    """What an earlier version's configuration had switched on that is no longer there, one phrase
    each.

    >>> lost_settings({"gate.revisit": 0.5})
    ['gate.revisit is no longer there (was 0.5)']
    """
    return [
        f"{key} is no longer there (was {kept[key]})"
        for key, value in PAST_KEYS.items()
        if kept.get(key, value) != value
    ]


def load(arguments: list[str]) -> Config:
    """Configuration from YAML files (merged left to right) and `section.key=value` overrides.

    Without `run.name` the run is named after those of them that make it what it is.

    Raises:
        ValueError: a file is missing, a key is unknown or a value is impossible; one line that
            names it and the fix.
    """
    try:
        return _load(arguments)
    except ValueError as error:
        raise ValueError(one_line(error)) from error


def _load(arguments: list[str]) -> Config:
    merged, naming, given = deepcopy(_defaults()), list[str](), set[str]()
    renewed, is_one_check = set[str](), False
    steps_of = dict[int, list[int]]()  # last given, by number of depths
    for argument in arguments:
        try:
            part = _part(argument)
            content = OmegaConf.to_container(part)
            if not isinstance(content, dict):
                raise TypeError("a list")
            keys = [key for key, _ in flatten(cast(dict[str, object], content))]
            merged = OmegaConf.unsafe_merge(merged, part)  # in place: neither is used any more
            renewed = {each for each in USER_CODE if _without_source(each, keys)} | (
                renewed - {key.partition(".sources")[0] for key in keys}
            )
            if "tree.step_tokens" in keys:
                steps = OmegaConf.select(merged, "tree.step_tokens")
                steps_of[len(steps)] = list(steps)
            elif "tree.num_children" in keys:
                merged = _share_out_answer(merged, steps_of, "tree.entropy_window" in keys)
            given |= set(keys)
            has_checks = any(key.startswith("verifier.checks") for key in keys)
            is_one_check = not has_checks and ("verifier.check" in keys or is_one_check)
            naming += [argument] if not all(map(is_free, keys)) else []
        except OmegaConfBaseException as error:
            raise ValueError(f"{argument}: {_explain(error, argument)}") from error
        except TypeError as error:
            raise ValueError(f"{argument}: a list stands where keys belong") from error
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError) as e:
            # OmegaConf and YAML were not made for just any text.
            raise ValueError(f"{argument}: cannot be read: {type(e).__name__}: {e}") from e
    merged = _inherit(merged, given)
    if naming and "run.name" not in given:
        merged = OmegaConf.unsafe_merge(
            merged, {"run": {"name": name_from(naming, known_keys(Config))}}
        )
    try:
        config = cast(Config, OmegaConf.to_object(merged))
        if is_one_check:  # it was named behind several, in whose place it is
            config = replace(config, verifier=replace(config.verifier, checks={}))
        return _with_sources(config, renewed)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from error


def _inherit(merged: Container, given: set[str]) -> Container:
    """Take what other data sets do not give themselves from `prompts`."""
    own = {name: _as_it_stands(OmegaConf.select(merged, f"prompts.{name}")) for name in INHERITED}

    def taken(section: str) -> dict[str, object]:
        return {
            name: value
            for name, value in own.items()
            if not any(f"{key}.".startswith(f"{section}.{name}.") for key in given)
        }

    mix, benchmarks = (OmegaConf.select(merged, key) for key in ("prompts.mix", BENCHMARKS))
    evaluate = {
        "data": taken("evaluate.data"),
        "benchmarks": {name: taken(f"{BENCHMARKS}.{name}") for name in benchmarks or ()},
    }
    prompts = {"mix": {name: taken(f"prompts.mix.{name}") for name in mix or ()}}
    return OmegaConf.unsafe_merge(merged, {"prompts": prompts, "evaluate": evaluate})


def _without_source(section: str, keys: list[str]) -> bool:
    """Whether a file or override names code of the user's anew, and does not bring its source."""
    is_named = any(key.startswith(USER_CODE[section]) for key in keys)
    return is_named and not any(key.startswith(f"{section}.sources") for key in keys)


def _with_sources(config: Config, renewed: set[str]) -> Config:
    """The configuration with the source of each file and module of the user's that it names.

    It is read, but in sections that hold it already, as in the configuration of a run, and are not
    `renewed` by what came behind.

    Raises:
        ValueError: there is no such file; one line with the key.
    """
    verifier, learner = config.verifier, config.learner
    known = {"verifier": verifier.sources, "learner": learner.sources}
    known |= {section: {} for section in renewed}
    forms = {"advantage": learner.advantage, "prune": learner.prune}
    own = {
        f"learner.{key}={name}": split_function(name)[0]
        for key, name in forms.items()
        if not isinstance(name, StrEnum)
    }
    key = "verifier.checks" if verifier.checks else "verifier.check"
    checks = {f"{key}={name}": name for name in verifier.weights}
    return replace(
        config,
        verifier=replace(verifier, sources=_sources(checks, known["verifier"])),
        learner=replace(learner, sources=_sources(own, known["learner"])),
    )


def _sources(named: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for setting, name in named.items():
        if name.startswith(f"{PACKAGE}."):
            continue
        try:
            source = known.get(name) or read_source(name)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        found |= {} if source is None else {name: source}
    return found


def _share_out_answer(
    merged: Container, steps_of: Mapping[int, list[int]], has_window: bool
) -> Container:
    """Keep the length of an answer where the number of depths has changed: the steps that were last
    given for as many depths, if they sum to it, else equal ones. Where an entropy window comes with
    the branches, the last step makes good what it may take of others."""
    counts, lengths = (OmegaConf.select(merged, f"tree.{key}") for key in SHAPE_KEYS)
    if not counts:
        return merged
    total, number, steps = sum(lengths), len(counts), list(lengths)
    if number != len(lengths):
        steps = [total // number + (depth < total % number) for depth in range(number)]
        if sum(earlier := steps_of.get(number, [])) == total:
            steps = list(earlier)
    if has_window:
        steps[-1] += OmegaConf.select(merged, "tree.entropy_window") * (number - 1)
    return OmegaConf.unsafe_merge(merged, {"tree": {"step_tokens": steps}})


@cache
def _defaults() -> Container:
    """The configuration before anything is said; what is merged into is a copy of it."""
    return OmegaConf.structured(Config)


def to_yaml(config: Config) -> str:
    """The resolved configuration, in a form that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat_settings(text: str) -> Flat:
    """Values of a configuration in YAML by their whole key, modules under their present names."""
    return dict(flatten(with_moved_modules(yaml.load(text, YAML)), whole=_mapping_keys()))


def placeless(settings: Flat) -> Flat:
    """Settings whose paths do not tell which job, home or working folder they were found from."""
    return {str(_placeless(key)): _placeless(value, key) for key, value in settings.items()}


def _placeless(value: object, key: str = "") -> object:
    if isinstance(value, Mapping):
        return {str(_placeless(name)): _placeless(each, name) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    if key.rpartition(".")[2] == "path":
        paths = DataConfig(path=value).paths  # whole, each of them
        value = paths[0] if len(paths) == 1 else json.dumps(paths)
    return JOB_FOLDER.sub("", value)


def _beside(argument: str) -> str:
    """Which files the project has where one of its own was looked for, for a message."""
    folder = (PROJECT / argument).parent
    if not folder.is_relative_to(PROJECT / "conf"):
        return ""
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    return f"; {folder.relative_to(PROJECT)} has {names}" if names else ""


def _part(argument: str) -> Container:
    if argument.endswith((".yaml", ".yml")):
        places = (Path(argument), PROJECT / argument)  # else one of the project's own
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise ValueError(
                f"{argument}: no such configuration file in {Path.cwd()}{_beside(argument)}"
            )
        try:
            return _in_present_names(OmegaConf.to_container(OmegaConf.load(path)))
        except (YAMLError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{argument}: not YAML: {' '.join(str(error).split())}") from error
    if "=" not in argument:
        raise ValueError(f"{argument}: neither a .yaml file nor an override section.key=value")
    key, _, value = argument.partition("=")
    if is_text(key) and (text := text_of(key, value)) is not None:
        return _in_present_names(_nested(key, text))
    try:
        return _in_present_names(OmegaConf.to_container(OmegaConf.from_dotlist([argument])))
    except YAMLError as error:
        if kind_of(key) is None:  # who merges it tells
            return _in_present_names(_nested(key, value))
        raise ValueError(
            f"{argument}: {key} takes {kind_in_words(key)}, and this is none"
        ) from error


def _nested(key: str, value: object) -> object:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _in_present_names(content: object) -> Container:
    content = with_moved_modules(_without_past_keys(_as_it_stands(content)))
    return cast(Container, OmegaConf.create(cast(dict[str, object], _with_joined_paths(content))))


def _as_it_stands(value: T) -> T:
    """A configuration in which no text refers to another key, as `${...}` would for OmegaConf."""
    if isinstance(value, dict):
        return cast(T, {key: _as_it_stands(part) for key, part in value.items()})
    if isinstance(value, list):
        return cast(T, [_as_it_stands(part) for part in value])
    return cast(T, REFERENCE.sub(r"\1\1\\${", value) if isinstance(value, str) else value)


def _with_joined_paths(value: T, section: str = "") -> T:
    """A configuration as YAML gives it, each list of paths of a data set as one text (JSON)."""
    if not isinstance(value, dict):
        return value
    joined: dict[str, object] = {}
    for key, part in value.items():
        is_list = isinstance(part, list) and bool(part) and all(isinstance(p, str) for p in part)
        if key == "path" and is_list and section.startswith(("prompts", "evaluate")):
            joined[key] = json.dumps(part, ensure_ascii=False)
        else:
            joined[key] = _with_joined_paths(part, f"{section}.{key}" if section else f"{key}")
    return cast(T, joined)


def _explain(error: OmegaConfBaseException, argument: str = "") -> str:
    """One line: the key, what is wrong with it, and the nearest keys if it is unknown."""
    key = str(error.full_key or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        given = argument.partition("=")[0]
        if given.startswith(f"{key}."):  # the error names the section that is unknown
            key = given
        if key in PAST_KEYS:
            return (
                f"{key} is a setting of an earlier version; this one can only do without, which is "
                f"{key}={PAST_KEYS[key]}"
            )
        known = known_keys(Config)
        near = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists them all"
        return f"unknown key {key}{hint}"
    reason = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "an entry")
    return f"{key}: {reason}" if key and key != argument.partition("=")[0] else reason


@cache
def _mapping_keys(section: type = Config, prefix: str = "") -> frozenset[str]:
    """Keys whose values are mappings with names of the user's own, such as `engine.resources`."""
    keys: set[str] = set()
    for name, kind in get_type_hints(section).items():
        if get_origin(kind) is dict:
            keys.add(prefix + name)
        elif isinstance(kind, type) and is_dataclass(kind):
            keys |= _mapping_keys(kind, f"{prefix}{name}.")
    return frozenset(keys)
