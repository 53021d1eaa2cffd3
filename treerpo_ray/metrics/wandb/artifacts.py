"""Artifacts: evaluations and checkpoints of a run on W&B, and the model that it began with.

A checkpoint has twelve bytes a parameter (90 GB with 7B) and lies in the run folder already: its
artifact holds the digests of its files and refers to its place, and no other byte of it is sent.
A run folder keeps the newest few alone, so those are told of that are there when a session ends.
The scores of an evaluation are sent, its samples are referred to. All are outputs of the run, so
that W&B's graph leads from the model through the run to each, and their metadata name the learner
step. The model is an input where W&B is online: its client takes none offline.
"""

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from treerpo_ray.errors import one_line
from treerpo_ray.run_folder.checkpoints import LIST_FILE, Checkpoints, name_of
from treerpo_ray.run_folder.files import MODEL_FOLDER, WHOLE_MODEL, RunFolder

if TYPE_CHECKING:
    import wandb


log = logging.getLogger(__name__)

MAX_NAME = 100
SCORES = ("step", "version", "data", "num_problems", "num_samples", "temperature", "top_p",
          "max_tokens", "verifier", "seed", "pass_at_1", "ci95_low", "ci95_high", "reward",
          "length", "cut_off_share", "errored_share")  # fmt: skip
"""What W&B shows of an evaluation."""


class Artifacts:
    """The artifacts of a run, each once; W&B itself makes no version of one that it has.

    What fails of them is logged: it stops no metrics.

    Args:
        folder: The run folder.
        name: Of the run.
        model: What it began with, as `model.path` names it.
        keep: Checkpoints that it keeps.
        run: That of W&B.
    """

    def __init__(
        self, *, folder: RunFolder, name: str, model: str, keep: int, run: "wandb.Run"
    ) -> None:
        self._folder, self._name, self._model_path, self._run = folder, name, model, run
        self._checkpoints = Checkpoints(folder, keep)
        self._done: set[str] = set()

    def use_start(self) -> None:
        """The model that the run began with, as its input."""
        if not self._run.offline:
            self._try("the model", lambda: self._run.use_artifact(self._start()))

    def log_evaluations(self) -> None:
        """Those whose files are there."""
        found: list[str] = []
        self._try("evaluations", lambda: found.extend(self._folder.glob("eval/step=*.json")))
        for file in found:
            self._log(file, partial(self._evaluation, file))

    def log_checkpoints(self) -> None:
        """Those that the run folder keeps, and the model at its end."""
        steps: list[int] = []
        self._try("checkpoints", lambda: steps.extend(self._checkpoints.steps()))
        for step in steps:
            self._log(name_of(step), partial(self._checkpoint, step))
        self._log(MODEL_FOLDER, self._model)

    def _log(self, place: str, make: "Callable[[], tuple[wandb.Artifact, str] | None]") -> None:
        """Log what `make` makes of a place, with its alias, unless that is done."""

        def log_it() -> None:
            if made := make():
                artifact, alias = made
                self._run.log_artifact(artifact, aliases=["latest", alias])
                self._done.add(place)

        if place not in self._done:
            self._try(place, log_it)

    def _try(self, what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # of a disk, a store or W&B
            log.info("W&B has no artifact of %s: %s", what, one_line(error))

    def _named(self, kind: str, metadata: dict[str, object]) -> "wandb.Artifact":
        import wandb

        name = _plain(self._name)[:MAX_NAME]
        return wandb.Artifact(f"{name}-{kind}", type=kind, metadata=metadata)

    def _start(self) -> "wandb.Artifact":
        import wandb

        path = self._model_path
        name = _plain(path).strip("_")[-MAX_NAME:]
        model = wandb.Artifact(name, type="model", metadata={"path": path})
        with model.new_file("path.txt") as file:
            file.write(path)
        return model

    def _evaluation(self, file: str) -> "tuple[wandb.Artifact, str]":
        content = self._folder.read_text(file)
        result: dict[str, object] = json.loads(content)
        found = {name: result[name] for name in SCORES if result.get(name) is not None}
        artifact = self._named("evaluation", {**found, "place": self._folder.uri(file)})
        with artifact.new_file("scores.json") as written:
            written.write(content)
        self._refer(artifact, file.replace(".json", ".parquet"), "samples.parquet")
        return artifact, f"step-{found['step']}"

    def _checkpoint(self, step: int) -> "tuple[wandb.Artifact, str]":
        place = name_of(step)
        metadata = {"step": step, "place": self._folder.uri(place)}
        artifact = self._named("checkpoint", metadata)
        with artifact.new_file(LIST_FILE) as written:
            written.write(self._folder.read_text(f"{place}/{LIST_FILE}"))
        self._refer(artifact, place, "checkpoint")
        return artifact, f"step-{step}"

    def _model(self) -> "tuple[wandb.Artifact, str] | None":
        if not self._folder.exists(WHOLE_MODEL):
            return None
        artifact = self._named("model", {"place": self._folder.uri(MODEL_FOLDER)})
        self._refer(artifact, MODEL_FOLDER, "model")
        return artifact, "trained"

    def _refer(self, artifact: "wandb.Artifact", place: str, name: str) -> None:
        """A reference to a file or folder; of a store whose client is not installed the place in
        the metadata is all."""
        uri = self._folder.uri(place)
        what = f"{place} by reference"
        self._try(what, lambda: artifact.add_reference(uri, name=name, checksum=False))


def _plain(name: str) -> str:
    """A name of the characters that W&B takes."""
    return re.sub(r"[^\w.-]+", "_", name)
