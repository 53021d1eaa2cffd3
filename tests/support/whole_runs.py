"""What tests of whole runs share: how they train, what they wait for, and what they look at."""

import io
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import rich.console

from treerpo_ray.config import Config, load
from treerpo_ray.driver.result import RunResult
from treerpo_ray.driver.run import train
from treerpo_ray.driver.start import contents_of
from treerpo_ray.driver.versions import AgreedVersions, versions_here
from treerpo_ray.metrics.console import Console
from treerpo_ray.metrics.events import EVENTS_FILE
from treerpo_ray.preflight.inputs import load_inputs
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder.files import RunFolder, Scalar
from treerpo_ray.stop import Stop
from treerpo_ray.study.analysis import Run
from treerpo_ray.study.audit import faults
from treerpo_ray.task import TreePoolApi

STRICT = ("gate.max_staleness=0", "sync.probe_every=1")
"""Every tree is grown by the weights that all steps before it have made."""
GONE_S = 1500.0
"""Far more than a process takes to be gone."""


def run_training(config: Config, pool: TreePoolApi | None = None) -> tuple[RunResult, str]:
    """Train in the cluster that is connected; returns what the terminal showed too. To workers its
    node is one that came later, and has what the driver has."""
    shown = io.StringIO()
    console = Console(console=rich.console.Console(file=shown, width=120))
    inputs = load_inputs(config)
    contents = contents_of(config, inputs.prompts, inputs.held_out)
    versions = AgreedVersions.of_driver(versions_here())
    return train(config, inputs, contents, console, Stop(), versions, pool), shown.getvalue()


@dataclass
class Job:
    """A training that is under way."""

    process: subprocess.Popen
    folder: Path

    def wait(self, what: str, is_so: Callable[[list[dict[str, Scalar]]], bool]) -> None:
        """Wait until the events so far say that something is so."""
        deadline = time.monotonic() + 1800
        while time.monotonic() < deadline:
            is_over = self.process.poll() is not None
            if is_so(RunFolder(str(self.folder)).read_lines(EVENTS_FILE)):
                return
            assert not is_over, f"the job ended without {what}"
            time.sleep(0.1)
        raise TimeoutError(f"no {what}")

    def wait_for(self, kind: str, count: int = 1) -> None:
        """Wait for the event that is the `count`th of its kind."""
        self.wait(
            f"{count} {kind}", lambda events: [e["kind"] for e in events].count(kind) >= count
        )

    def wait_for_workers(self, *numbers: int) -> None:
        """Wait until groups of so many workers, one after the other, have each done two steps."""

        def is_so(events: list[dict[str, Scalar]]) -> bool:
            kinds = [e["kind"] for e in events if e["kind"] in ("learner_started", "consumed")]
            sizes = [e["workers"] for e in events if e["kind"] == "learner_started"]
            return sizes == list(numbers) and kinds[-2:] == ["consumed"] * 2

        self.wait(f"groups of {numbers} workers", is_so)


def assert_promises_kept(folder: str, *overrides: str) -> None:
    """Every ticket was consumed once, by its own step and no staler than allowed; all else of a
    finished run that the audit checks holds too."""
    config = load([f"{folder}/config.yaml", *overrides])
    assert faults(config, RunFolder(folder).read_lines(EVENTS_FILE)) == []


def assert_versions_count_updates(metrics: pd.DataFrame) -> None:
    """Each step's version is the number of updates so far; a step that kept no group makes none."""
    metrics = metrics[metrics.index > 0]  # row 0 is the evaluation of the start
    updates = metrics["learner/grad_norm"].notna().cumsum()
    assert metrics["version"].tolist() == updates.tolist()


def assert_saved_trees_were_reused(run: Run) -> None:
    """Whatever was sampled for later steps when a checkpoint was written is used again."""
    events = run.events()
    saved = events[events.kind == "learner_started"]["saved_trees"].sum()
    assert (events.kind == "tree_reused").sum() == saved


def assert_no_tree_was_finished_twice(run: Run) -> None:
    """Whatever happens to engines, each tree is finished once, but for a learner that starts anew
    and has its tickets issued again."""
    events = run.events()
    group = (events.kind == "learner_started").cumsum().rename("group")
    finished = events[events.kind == "tree_finished"].join(group)
    assert not finished.duplicated(["group", "ticket"]).any()


def trees_of(run: Run) -> dict[int, TreeRecord]:
    """All trees of a run, by ticket."""
    return {record.ticket: record for step in run.tree_steps() for record in run.trees(step)}


def sampled(record: TreeRecord) -> list[list[int]]:
    """The tokens of a tree's steps."""
    return [step.token_ids.tolist() for step in record.tree.steps]


def assert_same_trees(run: Run, whole: Run) -> None:
    """Each tree has the seed and the tokens that it has in the run without a break."""
    theirs = trees_of(whole)
    for ticket, record in trees_of(run).items():
        assert record.seed == theirs[ticket].seed
        assert sampled(record) == sampled(theirs[ticket])


def wait_for_step(folder: str, step: int) -> None:
    """Wait until the metrics of learner step `step` are written."""
    while not any(row["step"] >= step for row in RunFolder(folder).read_lines("metrics.jsonl")):
        time.sleep(0.05)


def process_of(folder: str, kind: str, field: str = "pid", **fields: int) -> psutil.Process:
    """The process in the newest event of a kind."""
    events = RunFolder(folder).read_lines(EVENTS_FILE)
    found = [e[field] for e in events if e["kind"] == kind and fields.items() <= e.items()]
    return psutil.Process(found[-1])


def assert_gone(process: psutil.Process) -> None:
    """It must not go on holding memory."""
    psutil.wait_procs([process], timeout=GONE_S)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def processes_with(variable: str) -> list[str]:
    """Commands of living processes that inherited an environment variable."""
    deadline = time.monotonic() + GONE_S
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue  # it ended meanwhile
        found = [command for command in found if command]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
