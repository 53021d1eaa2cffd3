"""A run on Weights & Biases: a copy of the metrics that can neither stop nor delay the run."""

import dataclasses
import os
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from treerpo_ray.run_folder.writer import BackgroundWriter, OnFailure, Warn

if TYPE_CHECKING:
    import wandb

    from treerpo_ray.config import Config


ID_FILE = "wandb_id"
"""File in the run folder with the id under which a resumed run goes on."""


class WandbRun:
    """One W&B run, served in the background; offline unless a key is known and W&B answers, and
    never asking for a key.

    Args:
        config: The run's; it is shown on W&B.
        folder: Local folder for the offline files and the id of the run.
        last_step: Step that W&B has already; rows of earlier ones, which a resume repeats, are
            left out, so that its step axis never runs backwards.
        warn: Told, with a kind and a reason, once when W&B does not answer and the run goes on
            offline, and once when W&B gets no more rows.
        max_waiting: Rows that may wait.
        close_s: Time that W&B gets to finish when the run ends.
    """

    def __init__(
        self,
        config: "Config",
        *,
        folder: Path,
        last_step: float,
        warn: Warn,
        max_waiting: int = 1000,
        close_s: float = 60.0,
    ) -> None:
        self._config, self._folder, self._last_step = config, folder, last_step
        self._warn = warn
        self._run: wandb.Run | None = None
        self._writer = BackgroundWriter(
            lambda _, reason: warn("wandb_stopped", f"{reason}; metrics.jsonl has all rows"),
            name="wandb",
            on_failure=OnFailure.STOP,
            max_waiting=max_waiting,
            close_s=close_s,
        )
        self._writer.put("start", self._start)

    def put(self, row: dict[str, float]) -> None:
        """Hand over a row, which has a `step`; never blocks."""
        if row["step"] >= self._last_step:
            self._writer.put("row", partial(self._log, row))

    def close(self) -> None:
        """Finish the run, within a limited time."""
        self._writer.close(self._finish)

    def _log(self, row: dict[str, float]) -> None:
        assert self._run is not None
        self._run.log(row)

    def _finish(self) -> None:
        assert self._run is not None
        self._run.finish()

    def _start(self) -> None:
        import wandb

        should_send = os.environ.get("WANDB_MODE", "online") == "online"
        can_send = should_send and wandb.login(prompt=False, verify=False)
        try:
            self._run = self._init(mode="offline" if should_send and not can_send else None)
        except Exception as error:  # no connection, no such entity, a key that is refused
            if not can_send:
                raise
            wandb.teardown()  # else the id counts as in use
            self._run = self._init(mode="offline")
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(
                "wandb_offline",
                f"{reason}; `wandb sync {self._folder}/wandb/offline-run-*` sends it later",
            )
        self._run.define_metric("*", step_metric="step")

    def _init(self, mode: Literal["offline"] | None) -> "wandb.Run":
        import wandb

        id_file = self._folder / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=self._config.metrics.wandb_project,
            name=self._config.run.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(self._folder),
            config=_without_sources(dataclasses.asdict(self._config)),
            mode=mode,
            # Metadata would hold the command line of a Ray worker, and with it Ray's password.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
            ),
        )


def _without_sources(config: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """A configuration without the user's code, which is nobody's but the run folder's."""
    return {
        section: {key: value for key, value in keys.items() if key != "sources"}
        for section, keys in config.items()
    }
