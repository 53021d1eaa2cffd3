"""Identity: the settings that make a run what it is, and the name it has where none is given."""

import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from treerpo_ray.user_code import unpack

FREE = (
    *("run.name", "run.root", "run.num_steps", "run.max_sampled_tokens", "run.stall_timeout_s"),
    *("engine.", "sync.", "checkpoint.", "metrics.", "health."),
    *("verifier.num_workers", "verifier.timeout_s", "verifier.memory_mib", "verifier.resources"),
    *("verifier.max_error_share",),
    *("evaluate.every", "evaluate.interim_samples", "evaluate.benchmarks"),
    *("learner.num_workers", "learner.min_workers", "learner.resources", "learner.cpu_threads"),
    *("learner.max_failures", "learner.token_budget", "learner.gradient_checkpointing"),
    *("learner.gpu_memory_gib", "learner.shard", "learner.offload", "learner.compile"),
    *("verifier.retries", "verifier.concurrency", "verifier.env"),
)
"""Keys, and sections with a point, that may change while a run is interrupted: how long it is,
where and on what it runs, and what is kept of it. All others say what is learned or measured, and
so does the code of the user's that they name."""
SOURCES = ".sources."
"""In the keys of the user's own code."""
LONG_NAME = 71
"""Characters of a name without its checksum, which with it fits a terminal."""
LONG_PART = 24
"""Characters of a value in a name that would be long."""
MAX_NAME_BYTES = 255
"""Of a file or folder, on any disk."""

Flat = dict[str, object]
"""Values by their whole key."""


def check_file_name(key: str, name: str) -> None:
    """Check that a name in a configuration can be that of a file or folder.

    Raises:
        ValueError: it would be somewhere else, or a disk does not take it; names the key.
    """
    if name in ("", ".", "..") or set(name) & set("/\\") or not name.isprintable():
        raise ValueError(f"{key}: {name!r} cannot be the name of a file (no / and no \\ in it)")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{key}: {name[:20]}... has more than {MAX_NAME_BYTES} bytes")


def is_free(key: str) -> bool:
    """Whether a setting may change and the run still is the same."""
    return any(key == free or key.startswith(free.rstrip(".") + ".") for free in FREE)


def flatten(
    sections: Mapping[str, object], prefix: str = "", whole: Collection[str] = ()
) -> Iterator[tuple[str, object]]:
    """Key and value of each setting, as in `section.key=value`; a mapping that is empty or whose
    key is in `whole` is a value."""
    for key, value in sections.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in whole:
            yield from flatten(value, f"{prefix}{key}.", whole)
        else:
            yield f"{prefix}{key}", value


def differences(before: Flat, now: Flat) -> list[str]:
    """Settings of `now` that had another value before, one phrase each.

    >>> differences({"run.seed": 0}, {"run.seed": 1})
    ['run.seed=1 (was 0)']
    >>> differences({"engine.labels": {"role": "a"}}, {"engine.labels": {}})
    ['engine.labels.role is not set (was a)']
    """
    found = []
    for key, value in now.items():
        past = before.get(key, value)
        if not isinstance(value, Mapping) or not isinstance(past, Mapping):
            found += [f"{key}={_shown(value)} (was {_shown(past)})"] if past != value else []
            continue
        new, old = (dict(flatten(each, f"{key}.")) for each in (value, past))
        for name in dict.fromkeys([*new, *old]):
            if SOURCES in name:
                if name in new and name in old and _code(new[name]) != _code(old[name]):
                    found.append(f"{name.partition(SOURCES)[2]} has been edited")
            elif name not in new:
                found.append(f"{name} is not set (was {_shown(old[name])})")
            elif name not in old or old[name] != new[name]:
                was = _shown(old[name]) if name in old else "not set"
                found.append(f"{name}={_shown(new[name])} (was {was})")
    return found


def _code(source: object) -> str:
    """The code itself: it may have been packed by another machine."""
    return unpack(str(source))


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def name_from(arguments: Sequence[str], keys: Sequence[str]) -> str:
    """Name of a run, made of its files and of the overrides that make it another run.

    An override is named by the end of its key where no other key ends so. Where characters had to
    be left out, a checksum stands for them. A name that would be long has its files, paths without
    their folders, the beginnings of texts, as many overrides as there is room for, and a checksum.

    Args:
        arguments: Configuration files and overrides that are not all free.
        keys: All keys that there are.

    >>> name_from(["conf/quickstart.yaml", "run.seed=1"], ["run.seed", "run.root"])
    'quickstart-seed=1'
    """
    parts, short = [], []
    for argument in arguments:
        key, is_override, value = argument.partition("=")
        if is_override:
            end = key.rpartition(".")[2]
            is_alone = sum(other.rpartition(".")[2] == end for other in keys) == 1
            parts.append(f"{end if is_alone else key}={value}")
            short.append(f"{end if is_alone else _end(key)}={_shortened(value)}")
        else:
            parts.append(Path(argument).stem)
            short.append(_shortened(Path(argument).stem))
    exact = _without_brackets("-".join(parts))  # a list or a text is told by its key
    name = _cleaned(exact)
    checksum = f"-{zlib.crc32(exact.encode()):08x}"
    if len(name) <= LONG_NAME:
        return name if name == exact else name + checksum
    return _fitted([_cleaned(each) for each in short]) + checksum


def _end(key: str) -> str:
    """The end of a key that other keys have, too, with what it is of: `data.path`."""
    return ".".join(key.split(".")[-2:])


def _shortened(value: str) -> str:
    """A path by its last part, a text by its beginning, up to the last word that fits."""
    text = _without_brackets(
        value.rstrip("/").rpartition("/")[2] if _is_path(value) else value, "_"
    )
    if len(text) <= LONG_PART:
        return text
    start = text[:LONG_PART]
    return start.rpartition("_")[0] or start


def _is_path(value: str) -> bool:
    return "/" in value and not re.search(r"\s", value)


def _without_brackets(text: str, space: str = "") -> str:
    return re.sub(r"[\[\]{}'\"]", "", text).replace(" ", space)


def _cleaned(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.")


def _fitted(parts: Sequence[str]) -> str:
    """Parts from the first on, and how many more there are where not all have room."""
    for number in range(len(parts), 1, -1):
        more = f"-and_{len(parts) - number}_more" if number < len(parts) else ""
        if len(name := "-".join(parts[:number]) + more) <= LONG_NAME:
            return name
    return "-".join(parts)[:LONG_NAME]
