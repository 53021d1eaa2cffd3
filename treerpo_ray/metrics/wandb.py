"""A run on Weights & Biases: a copy of the metrics that can neither stop nor delay the run."""

import dataclasses
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb

    from treerpo_ray.config import Config


ID_FILE = "wandb_id"
"""File in the run folder with the id under which a resumed run goes on."""


QUEUE_ROWS = 1000
"""Rows that may wait."""


CLOSE_S = 60.0
"""Time that W&B gets to finish when the run ends."""


class WandbRun:
    """One W&B run, served by a thread; offline unless a key is known, and never asking for one.

    Args:
        config: The run's; it is shown on W&B.
        folder: Local folder for the offline files and the id of the run.
        last_step: Step that W&B has already; rows of earlier ones, which a resume repeats, are
            left out, so that its step axis never runs backwards.
        warn: Told once, with a kind and a reason, when W&B gets no more rows.
    """

    def __init__(
        self, config: "Config", folder: Path, last_step: float, warn: Callable[[str, str], None]
    ) -> None:
        self._warn = warn
        self._config, self._folder, self._last_step = config, folder, last_step
        self._rows: queue.Queue[dict[str, float] | None] = queue.Queue(QUEUE_ROWS)
        self._has_failed = False
        self._failing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, row: dict[str, float]) -> None:
        """Hand over a row, which has a `step`; never blocks."""
        if row["step"] < self._last_step or self._has_failed:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._fail("it is too slow")

    def close(self) -> None:
        """Finish the run, within a limited time."""
        with self._failing:  # the warning of a failure is out before this returns
            if self._has_failed:
                return
        deadline = time.monotonic() + CLOSE_S
        try:
            self._rows.put(None, timeout=CLOSE_S)
        except queue.Full:
            self._fail("it is too slow")
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it did not finish within {CLOSE_S:g} s")

    def _work(self) -> None:
        try:
            run = self._start()
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:  # whatever W&B runs into must not reach the run
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        with self._failing:
            if not self._has_failed:
                self._has_failed = True
                self._warn("wandb_stopped", f"{reason}; metrics.jsonl has all rows")

    def _start(self) -> "wandb.Run":
        import wandb

        id_file = self._folder / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        is_online = os.environ.get("WANDB_MODE", "online") == "online"
        has_key = not is_online or wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=self._config.metrics.wandb_project,
            name=self._config.run.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(self._folder),
            config=dataclasses.asdict(self._config),
            mode=None if has_key else "offline",
            # Metadata would hold the command line of a Ray worker, and with it Ray's password.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
            ),
        )
        run.define_metric("*", step_metric="step")
        return run
