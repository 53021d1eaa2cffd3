"""Audit: what the events, rows and trees of a run say of its tickets, whatever died meanwhile.

A learner that starts anew at step s takes back every consumption from s on; what is left must be
each step once, in order, with the tickets that are its own.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from treerpo_ray.config import Config
from treerpo_ray.learner.adapters.lora import ADAPTER_FILE
from treerpo_ray.learner.policy import DTYPES, load_policy
from treerpo_ray.metrics.rows import Row, latest_rows
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    WHOLE_MODEL,
    RunFolder,
    Scalar,
)
from treerpo_ray.weights.manifest import DeviceDigest, HostDigest, pack_weights

Fields = Mapping[str, Scalar]
"""One event of `events.jsonl`: `time` (Unix seconds), `kind` and its own fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumedTree:
    """A tree that a learner step was trained on."""

    ticket: int
    min_version: int
    max_version: int


def standing(events: Sequence[Fields]) -> tuple[list[Fields], list[str]]:
    """The `consumed` events that no restart took back, and what is wrong with their order."""
    kept: list[Fields] = []
    faults = []
    for event in events:
        if event["kind"] == "learner_started":
            step = as_int(event["step"])
            if step > len(kept):
                faults.append(f"the learner went on at step {step} after {len(kept)} steps")
            kept = kept[:step]
        elif event["kind"] == "consumed":
            if event["step"] != len(kept):
                faults.append(f"step {event['step']} was consumed when {len(kept)} was due")
            kept.append(event)
    return kept, faults


def faults(config: Config, events: Sequence[Fields]) -> list[str]:
    """What the folder of a finished run says against it; `events` are those of its file."""
    folder = RunFolder(config.folder)
    found = check_promises(
        events,
        latest_rows(folder),
        consumed_trees(folder),
        num_steps=config.run.num_steps,
        trees_per_step=config.gate.trees_per_step,
        max_staleness=config.gate.max_staleness,
    )
    published = [event["digest"] for event in events if event["kind"] == "published"]
    if published[-1:] != [exported_digest(config)]:
        found.append("the exported model is not there or not what was published last")
    return found


def exported_digest(config: Config) -> str | None:
    """Digest of the exported model, packed as the learner packs what it publishes."""
    folder = RunFolder(config.folder)
    if not folder.exists(WHOLE_MODEL):
        return None
    with folder.local(MODEL_FOLDER) as model:
        manifest, _ = pack_weights(
            _published(config, model),
            version=0,
            dtype=DTYPES[config.model.dtype],
            chunk_bytes=config.sync.chunk_mib * 2**20,
            new_digest=HostDigest if config.sync.transport == "file" else DeviceDigest,
        )
    return manifest.digests[0]


def _published(config: Config, model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What a learner publishes of what it exports: its weights, or the adapters beside them."""
    if config.lora.rank:
        yield from sorted(load_file(model / ADAPTER_FOLDER / ADAPTER_FILE).items())
        return
    policy = load_policy(
        str(model),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
        trust_remote_code=config.model.trust_remote_code,
    )
    yield from policy.named_weights()


def consumed_trees(folder: RunFolder) -> dict[int, list[ConsumedTree]]:
    """All trees in a run folder, doubled ones too, by learner step (0 is the first).

    Every step's trees must be saved: `metrics.save_trees_every` is 1.
    """
    return {
        step - 1: [
            ConsumedTree(
                ticket=record.ticket,
                min_version=record.tree.min_version,
                max_version=record.tree.max_version,
            )
            for record in saved_trees.saved(folder, step)
        ]
        for step in saved_trees.saved_steps(folder)
    }


def check_promises(
    events: Sequence[Fields],
    rows: Sequence[Row],
    trees: Mapping[int, Sequence[ConsumedTree]],
    *,
    num_steps: int,
    trees_per_step: int,
    max_staleness: int,
) -> list[str]:
    """Everything that is wrong with a finished run; nothing if it kept all its promises.

    Args:
        events: `events.jsonl`, all sessions.
        rows: Metrics by learner step (1 is the first), as the last restart left them.
        trees: Trees that were trained on, by learner step (0 is the first).
        num_steps: Learner steps that the run was to do.
        trees_per_step: Trees that a step consumes.
        max_staleness: Versions that a tree may be behind.
    """
    consumed, faults = standing(events)
    if len(consumed) != num_steps:
        faults.append(f"{len(consumed)} steps stand, should be {num_steps}")
    if sorted(trees) != list(range(num_steps)):
        faults.append(f"trees are there of {len(trees)} steps, should be {num_steps}")
    version = 0
    for step, event in enumerate(consumed):
        found = Counter(tree.ticket for tree in trees.get(step, ()))
        own = Counter(range(step * trees_per_step, (step + 1) * trees_per_step))
        if lost := sorted(own - found):
            faults.append(f"step {step} was not trained on its tickets {lost}")
        if more := sorted((found - own).elements()):
            faults.append(f"step {step} was trained on tickets {more} too many")
        for tree in trees.get(step, ()):
            if not version - max_staleness <= tree.min_version <= tree.max_version <= version:
                faults.append(
                    f"ticket {tree.ticket} is of versions {tree.min_version} to "
                    f"{tree.max_version}, trained on at {version}"
                )
        version = as_int(event["version"])
    overlaps = max_staleness > 0
    return faults + _version_faults(events, rows, version, num_steps, overlaps=overlaps)


def _version_faults(
    events: Sequence[Fields],
    rows: Sequence[Row],
    version: int,
    num_steps: int,
    *,
    overlaps: bool,
) -> list[str]:
    """Whether learner, checkpoint and every engine ended with the same version.

    Where publishing `overlaps` with training, engines may still load what a row tells of.
    """
    faults = []
    steps = [row for row in rows if "version" in row]
    if [row["step"] for row in steps] != list(range(1, num_steps + 1)):
        faults.append(f"metrics are there of {len(steps)} steps, should be {num_steps}")
    for before, row in zip([{"version": 0.0}, *steps], steps, strict=False):
        served = {row["engine/oldest_version"], row["engine/newest_version"]}
        # Between two steps all engines may be down for a moment; in the end they must be there.
        if any(map(math.isnan, served)) and row is not steps[-1]:
            continue
        is_late = overlaps and row is not steps[-1]
        if not served <= ({row["version"], before["version"]} if is_late else {row["version"]}):
            faults.append(
                f"after step {row['step']:.0f} of version {row['version']:.0f} the engines "
                f"serve {sorted(served)}"
            )
    last = {
        kind: [event["version"] for event in events if event["kind"] == kind][-1:]
        for kind in ("published", "checkpoint")
    }
    faults += [
        f"the last {kind} has version {found}, the learner {version}"
        for kind, found in last.items()
        if found != [version]
    ]
    return faults


def as_int(value: Scalar) -> int:
    """A field of an event that is a whole number."""
    assert isinstance(value, int)
    return value


def as_float(value: Scalar) -> float:
    """A field of an event that is a number."""
    assert isinstance(value, float | int)
    return value
