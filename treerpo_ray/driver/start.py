"""Start: one start of a run in its folder; refused where it would be another run, else recorded.

What a run folder holds, down to the headline, is of one run. A start with other settings would
mix two, or answer with the result of the other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

from treerpo_ray.config import Config
from treerpo_ray.config.files import flat_settings, lost_settings, placeless, to_yaml
from treerpo_ray.config.identity import Flat, differences, is_free
from treerpo_ray.driver.result import RunResult, finished_result
from treerpo_ray.errors import RunFailed, one_line
from treerpo_ray.metrics.rows import METRICS_FILE
from treerpo_ray.preflight.storage import check_folder
from treerpo_ray.prompts.prompt_set import PromptSet, resolve_model_path
from treerpo_ray.run_folder.checkpoints import Checkpoints
from treerpo_ray.run_folder.disk import refusal_of
from treerpo_ray.run_folder.files import CONFIG_FILE, WHOLE_MODEL, RunFolder
from treerpo_ray.run_folder.lock import check_unwritten
from treerpo_ray.user_code import unpack

MOST_SHOWN = 4
"""Settings that the message about another run names."""
STARTS = "starts"
"""Folder with the configuration of each start, the code of the user's that it names, and checksums
of what it reads."""
EDGE = 2**20
"""Bytes at either end of a file of weights that its checksum is made of, with the size: training
changes them all, and to read them all takes minutes."""


@contextmanager
def reading(folder: RunFolder) -> Iterator[None]:
    """Meanwhile a run folder is read, which its disk or its store may refuse.

    Raises:
        RunFailed: it does; one line.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # every store has its own
        if isinstance(error, OSError) or refusal_of(error, is_local=folder.is_local) is not None:
            fault = f"{type(error).__name__}: {one_line(error)}"
            raise RunFailed(f"{folder} cannot be read: {fault}") from error
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierStarts:
    """What the earlier starts of a run have left in its folder."""

    changed: list[str]
    """Settings that have changed since the last of them, which may."""
    checkpoints: list[int]
    """The learner steps that there are checkpoints of."""
    result: RunResult | None
    """None: there is work left."""


def look_at_folder(config: Config) -> EarlierStarts:
    """Look at the run folder, before all that takes longer.

    Raises:
        ValueError: the folder cannot be written, another job writes it, or it holds results of a
            run with other settings or of a longer one.
        RunFailed: it cannot be read.
    """
    check_folder(config)
    folder = RunFolder(config.folder)
    check_unwritten(folder)
    with reading(folder):
        return EarlierStarts(
            changed=_changes(config, folder),
            checkpoints=Checkpoints(folder, config.checkpoint.keep).steps(),
            result=finished_result(config),
        )


def then_and_now(kept: str, config: Config) -> tuple[Flat, Flat]:
    """Settings of a configuration that was kept as YAML, and those of this start, wherever both
    were found from."""
    # A setting that the earlier version did not have was what is its default now.
    before = flat_settings(to_yaml(Config())) | flat_settings(kept)
    return placeless(before), placeless(flat_settings(to_yaml(config)))


def _changes(config: Config, folder: RunFolder) -> list[str]:
    if not folder.exists(CONFIG_FILE):
        return []
    before, now = then_and_now(folder.read_text(CONFIG_FILE), config)
    fixed = lost_settings(before)
    fixed += differences(before, {key: value for key, value in now.items() if not is_free(key)})
    if fixed and _has_results(folder):
        more = f" and {len(fixed) - MOST_SHOWN} more" if len(fixed) > MOST_SHOWN else ""
        raise ValueError(
            f"{config.folder} holds a run with other settings: {', '.join(fixed[:MOST_SHOWN])}"
            f"{more}; give this one a name of its own, such as run.name={_free_name(config)}"
            f"{_weights(folder)}, or its settings back to go on with it"
        )
    done = Checkpoints(folder, config.checkpoint.keep).steps()
    if done and done[-1] > config.run.num_steps:
        raise ValueError(
            f"{config.folder} has done {done[-1]} learner steps, more than run.num_steps="
            f"{config.run.num_steps}; a run is made longer, not shorter"
        )
    free = {key: value for key, value in now.items() if is_free(key) and key != "run.root"}
    return fixed + differences(before, free)


def contents_of(config: Config, prompts: PromptSet, held_out: PromptSet | None) -> dict[str, str]:
    """What the settings that name data and model stand for at this start, by their keys."""
    found = {"prompts": _problems(prompts)}
    if held_out is not None:
        found["evaluate.data"] = _problems(held_out)
    folder = Path(resolve_model_path(config.model.path))
    if folder.is_dir():  # an id of Hugging Face stands for one revision
        found["model.path"] = f"weights {_checksum(_edges(folder))}"
    return found


def _problems(prompts: PromptSet) -> str:
    rows = zip(prompts.token_ids, prompts.problems, strict=True)
    texts = (json.dumps([ids, problem.answers]).encode() for ids, problem in rows)
    return f"{len(prompts):,} problems {_checksum(texts)}"


def _edges(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        yield f"{path.name} {size}".encode()
        with path.open("rb") as file:
            yield file.read(EDGE)
            file.seek(max(0, size - EDGE))
            yield file.read(EDGE)


def _checksum(parts: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def check_same_contents(config: Config, contents: Mapping[str, str]) -> None:
    """Check that data and model still are what the run in the folder was started with.

    Raises:
        ValueError: a file has been edited, or a model made anew, under the same name.
    """
    folder = RunFolder(config.folder)
    records = folder.glob(f"{STARTS}/*-contents.json")
    if not records or not _has_results(folder):
        return
    before: dict[str, str] = json.loads(folder.read_text(max(records)))
    changed = [
        f"{key} is {now} (was {before[key]})"
        for key, now in contents.items()
        if before.get(key, now) != now
    ]
    if changed:
        raise ValueError(
            f"{config.folder} holds a run of the same settings on other input: "
            f"{', '.join(changed)}; give this one a name of its own, such as run.name="
            f"{_free_name(config)}{_weights(folder)}"
        )


def record_start(config: Config, contents: Mapping[str, str]) -> None:
    """Keep the configuration, as that of the run and as that of this start, and what
    `contents_of` gave.

    Raises:
        OSError: the disk or the store refuses.
    """
    folder, content = RunFolder(config.folder), to_yaml(config).encode()
    number = len(folder.glob(f"{STARTS}/*.yaml")) + 1
    folder.publish_file(f"{STARTS}/{number:06d}.yaml", content)
    folder.publish_file(f"{STARTS}/{number:06d}-contents.json", json.dumps(contents).encode())
    folder.publish_file(CONFIG_FILE, content)
    sources = config.verifier.sources | config.learner.sources
    for place, (name, source) in enumerate(sorted(sources.items()), start=1):
        file = f"{STARTS}/{number:06d}-{place}-{PurePath(name).stem}.py"
        folder.publish_file(file, unpack(source).encode())


def _has_results(folder: RunFolder) -> bool:
    if folder.exists(METRICS_FILE) and folder.read_bytes(METRICS_FILE).strip():
        return True
    return any(map(folder.glob, ("checkpoints/*", "eval/*", "trees/*", WHOLE_MODEL)))


def _free_name(config: Config) -> str:
    number = 2
    while RunFolder(f"{config.folder}-{number}").exists():
        number += 1
    return f"{config.run.name}-{number}"


def _weights(folder: RunFolder) -> str:
    """How a run of another name starts from the weights of the one that is there."""
    found = [*folder.glob(f"checkpoints/*/{WHOLE_MODEL}"), *folder.glob(WHOLE_MODEL)]
    if not found:
        return ""
    model = found[-1].removesuffix("/config.json")
    return f" (from its weights: model.path={folder.place}/{model})"
