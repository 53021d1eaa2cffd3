"""Placement: what each stage of a run asks of Ray, and whether the nodes of a cluster have it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
    if not _fit_together(processes, nodes, iter(range(MOST_TRIES))):
        asked = ", ".join(f"{s.count} x {s.key}={s.resources}" for s in starting if s.count)
        raise ValueError(
            f"the nodes of the cluster have enough in all, but each process needs a node that has "
            f"all of what it asks for, and there is no way to place {asked}"
        )


MOST_TRIES = 10_000
"""Placements that are tried before a run is let start in the hope that Ray finds one."""


def _fit_together(processes: Sequence[Stage], nodes: Sequence[Node], tries: Iterator[int]) -> bool:
    """Whether there is a node for each process; true, too, if that takes too long to find out."""
    if not processes:
        return True
    stage, *rest = processes
    seen: list[Node] = []
    for index, node in enumerate(nodes):
        if node in seen or not fits(stage, node):
            continue
        seen.append(node)  # one like it was tried
        if next(tries, None) is None:
            return True
        taken = stage.resources
        left = {name: has - taken.get(name, 0.0) for name, has in node.resources.items()}
        if _fit_together(
            rest, [*nodes[:index], Node(left, node.labels), *nodes[index + 1 :]], tries
        ):
            return True
    return False
