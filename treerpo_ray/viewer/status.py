"""Status: how far a run is, and its curves."""

from collections.abc import Sequence
from dataclasses import dataclass

from treerpo_ray.metrics.rows import METRICS_FILE, Row
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import WHOLE_MODEL, RunFolder
from treerpo_ray.study.analysis import Run
from treerpo_ray.study.panels import Panel, panels_of
from treerpo_ray.study.sightings import evaluated_steps, evaluation_file

LOCAL_POLL_S, STORE_POLL_S = 2, 20
"""Time between two looks at a run, which in an object store cost money."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the page's head says of a run, and what tells that there is something new."""

    name: str
    folder: str
    step: int
    """Learner steps that are done."""
    num_steps: int
    is_finished: bool
    """Whether the run has exported its model, which it does at its end."""
    written_at_s: float | None
    """Unix time of the newest row of metrics; none before the first."""
    tree_steps: tuple[int, ...]
    """Learner steps whose trees are saved."""
    evaluations: tuple[int, ...]
    """Learner steps at which held-out problems were evaluated and the answers saved."""
    advantage: str
    prune: str
    prune_threshold: float
    own_code: tuple[str, ...]
    """Functions of the run's user among these, which the viewer does not run."""
    num_redone: int
    """Learner steps that a resume has done once more: their trees are others."""
    state: str
    """Changes when there is anything new."""
    poll_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Metrics by learner step, for the panels that this run has something for."""

    panels: tuple[Panel, ...]
    steps: list[int]
    series: dict[str, list[float | None]]
    """Metrics by name, one entry a step; none where a step has no such metric."""


def read_status(run: Run, folder: RunFolder, rows: Sequence[Row], num_redone: int) -> Status:
    """How far the run is, by the rows of its metrics, how many steps of them were done once more,
    and what else lies in its folder."""
    learner = run.config["learner"]
    steps = tuple(saved_trees.saved_steps(folder))
    evaluations = tuple(evaluated_steps(folder))
    # Of a step that is there already, more or other trees and answers may come.
    files = [file for step in steps[-1:] for file in saved_trees.saved_files(folder, step)]
    files += [evaluation_file(step) for step in evaluations[-1:]]
    *newest, model = [folder.state(file) for file in (METRICS_FILE, *files, WHOLE_MODEL)]
    return Status(
        name=str(run.config["run"]["name"]),
        folder=folder.place,
        step=int(rows[-1]["step"]) if rows else 0,
        num_steps=int(str(run.config["run"]["num_steps"])),
        is_finished=bool(model),
        written_at_s=rows[-1].get("time") if rows else None,
        tree_steps=steps,
        evaluations=evaluations,
        advantage=str(learner["advantage"]).lower(),
        prune=str(learner["prune"]).lower(),
        prune_threshold=float(str(learner["prune_threshold"])),
        own_code=run.own_code,
        num_redone=num_redone,
        state=str(hash((*newest, model, steps, evaluations))),
        poll_s=LOCAL_POLL_S if folder.is_local else STORE_POLL_S,
    )


def curves_of(rows: Sequence[Row]) -> Curves:
    """The curves of a run's metrics."""
    names = {name for row in rows for name in row}
    series = {name: [row.get(name) for row in rows] for name in names}
    panels = panels_of(series)
    return Curves(
        panels=panels,
        steps=[int(row["step"]) for row in rows],
        series={
            name: series.get(name, [None] * len(rows)) for panel in panels for name in panel.metrics
        },
    )
