"""Placement: what each stage of a run asks of Ray, and whether the nodes of a cluster have it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import NamedTuple, Self

from treerpo_ray.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the processes of a stage ask of Ray, each of them on one node."""

    key: str
    count: int
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


def stages(config: Config, num_engines: int, *, trains: bool = True) -> list[Stage]:
    """Every stage that reserves something, in the order in which Ray is asked for it."""
    engine, learner = config.engine, config.learner
    found = [
        Stage(
            key="engine.resources",
            count=num_engines,
            resources=engine.resources,
            labels=engine.labels,
        )
    ]
    if trains:
        found += [
            Stage(key="learner.resources", count=learner.num_workers, resources=learner.resources),
            # The task that reads, scores and streams the trees.
            Stage(key="verifier.resources", count=1, resources=config.verifier.resources),
        ]
    return found


def needed_resources(config: Config, num_engines: int, *, trains: bool = True) -> dict[str, float]:
    """Sum of what so many engines reserve and, if the job trains, learner workers and stream."""
    return total(stages(config, num_engines, trains=trains))


def total(asking: Sequence[Stage]) -> dict[str, float]:
    """Sum of what all processes of some stages reserve."""
    needed: dict[str, float] = {}
    for stage in asking:
        for name, amount in stage.resources.items():
            needed[name] = needed.get(name, 0.0) + stage.count * amount
    return needed


def missing_resources(needed: dict[str, float], available: dict[str, float]) -> dict[str, float]:
    """How much of each resource is lacking."""
    short = {name: amount - available.get(name, 0.0) for name, amount in needed.items()}
    return {name: round(amount, 3) for name, amount in short.items() if amount > 1e-9}


class Node(NamedTuple):
    """What a node has."""

    resources: dict[str, float]
    labels: dict[str, str]


def fits(stage: Stage, node: Node) -> bool:
    """Whether a process of a stage may be on a node that has nothing else to do."""
    return stage.labels.items() <= node.labels.items() and not missing_resources(
        stage.resources, node.resources
    )


def check_places(starting: Sequence[Stage], nodes: Sequence[Node]) -> None:
    """Check that each process of each stage has a node, beside all others.

    Raises:
        ValueError: one has not; names the key.
    """
    for stage in starting:
        if stage.count and not any(fits(stage, node) for node in nodes):
            where = f" with the labels {stage.labels} (engine.labels)" if stage.labels else ""
            raise ValueError(
                f"{stage.key}={stage.resources}: no node{where} has all of that at once"
            )
    processes = [stage for stage in starting for _ in range(stage.count)]
    free = [_Free.of(node) for node in nodes]
    if not _fit_together(processes, free, iter(range(MOST_TRIES))):
        asked = ", ".join(f"{s.count} x {s.key}={s.resources}" for s in starting if s.count)
        raise ValueError(
            f"the nodes of the cluster have enough in all, but each process needs a node that has "
            f"all of what it asks for, and for a part of a GPU one GPU that has it free; there is "
            f"no way to place {asked}"
        )


MOST_TRIES = 10_000
"""Placements that are tried before a run is let start in the hope that Ray finds one."""


class _Free(NamedTuple):
    """What a node has left."""

    resources: dict[str, float]
    """All but GPUs."""
    gpus: tuple[float, ...]
    """Of each GPU, least first."""
    labels: dict[str, str]

    @classmethod
    def of(cls, node: Node) -> Self:
        """A node that has nothing to do."""
        resources = dict(node.resources)
        gpus = (1.0,) * int(resources.pop("GPU", 0.0))
        return cls(resources, gpus, node.labels)

    def after(self, stage: Stage) -> Self | None:
        """What is left beside a process of a stage; None if it has no place."""
        asked = dict(stage.resources)
        gpus = _gpus_after(self.gpus, asked.pop("GPU", 0.0))
        node = Node(self.resources, self.labels)
        if gpus is None or not fits(replace(stage, resources=asked), node):
            return None
        left = {name: has - asked.get(name, 0.0) for name, has in self.resources.items()}
        return self._replace(resources=left, gpus=gpus)


def _gpus_after(gpus: tuple[float, ...], asked: float) -> tuple[float, ...] | None:
    """What is left of each GPU, as Ray hands them out: parts of a GPU are of a single one, of
    those with enough of it the one that has least; above that GPUs are whole."""
    if not asked:
        return gpus
    share, count = (asked, 1) if asked < 1 else (1.0, ceil(asked))
    enough = [index for index, has in enumerate(gpus) if has >= share - 1e-9][:count]
    if len(enough) < count:
        return None
    return tuple(sorted(has - share * (index in enough) for index, has in enumerate(gpus)))


def _fit_together(processes: Sequence[Stage], nodes: Sequence[_Free], tries: Iterator[int]) -> bool:
    """Whether there is a node for each process; true, too, if that takes too long to find out."""
    if not processes:
        return True
    stage, *rest = processes
    seen: list[_Free] = []
    for index, node in enumerate(nodes):
        if node in seen or (left := node.after(stage)) is None:
            continue
        seen.append(node)  # one like it was tried
        if next(tries, None) is None:
            return True
        if _fit_together(rest, [*nodes[:index], left, *nodes[index + 1 :]], tries):
            return True
    return False
