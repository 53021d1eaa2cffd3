"""A run on Weights & Biases: a copy of the metrics that can neither stop nor delay the run.

A row has the number of its line in `metrics.jsonl` as W&B's own step, so that the parts of a run
that was resumed, each a folder of its own where they are offline, are one history once they are
synced: no row is there twice, and none is missing that was on its way when the run was killed.
"""

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from treerpo_ray.metrics.rows import Row
from treerpo_ray.metrics.wandb.artifacts import Artifacts
from treerpo_ray.metrics.wandb.offline import offline_rows
from treerpo_ray.metrics.wandb.panels import TOKENS, define, shown
from treerpo_ray.metrics.wandb.tables import Tables
from treerpo_ray.run_folder.files import RunFolder
from treerpo_ray.run_folder.writer import BackgroundWriter, OnFailure, Warn

if TYPE_CHECKING:
    import wandb

    from treerpo_ray.config import Config


ID_FILE = "wandb_id"
"""File in the run folder with the id under which a resumed run goes on."""
SENT_FILE = "wandb_rows"
"""File in the run folder with the number of each row that W&B was handed, and whether it was then
`online`, or `offline` and may have lost it."""


def group_of(name: str, seed: int) -> str:
    """What runs share that differ by their seed: the name without it.

    >>> [group_of(name, 1) for name in ("quickstart-seed=1", "mine-1-b", "mine-1", "v1", "1")]
    ['quickstart', 'mine-1-b', 'mine', 'v1', '1']
    """
    shorter = re.sub(rf"[-_](run\.)?seed[=_-]?{seed}(?=[-_]|$)|[-_]{seed}$", "", name)
    return shorter or name


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbSettings:
    """What a run on W&B is of, and under which names."""

    project: str
    name: str
    group: str
    run_folder: str
    model: str
    """Path of that which it begins with."""
    keep: int
    """Checkpoints that stay."""
    has_trees: bool
    """Whether trees are saved, of which some are shown."""
    shown: Mapping[str, object]
    """What W&B shows as the run's configuration."""

    @classmethod
    def of(cls, config: "Config", *, commit: str) -> Self | None:
        """Of a run, by sources of that version; None if it is not to be there."""
        if config.metrics.wandb_project is None:
            return None
        return cls(
            project=config.metrics.wandb_project,
            name=config.run.name,
            group=group_of(config.run.name, config.run.seed),
            run_folder=config.folder,
            model=config.model.path,
            keep=config.checkpoint.keep,
            has_trees=bool(config.metrics.save_trees_every),
            shown=_without_code(config) | {"commit": commit},
        )


class WandbRun:
    """One W&B run, served in the background; offline unless a key is known and W&B answers, and
    never asking for a key.

    Args:
        settings: What it is of.
        folder: Local folder for the offline files, the id of the run and what W&B has of it.
        rows: Those of the sessions before. What W&B does not have of them is sent; a row that
            repeats one of them after a resume is left out, so that no axis runs backwards.
        warn: Told, with a kind and a reason, once when W&B does not answer and the run goes on
            offline, and once when W&B gets no more rows.
        max_waiting: Rows that may wait.
        close_s: Time that W&B gets to finish when the run ends.
    """

    def __init__(
        self,
        *,
        settings: WandbSettings,
        folder: Path,
        rows: Sequence[Row],
        warn: Warn,
        max_waiting: int = 1000,
        close_s: float = 60.0,
    ) -> None:
        self._settings, self._folder = settings, folder
        self._run_folder = RunFolder(settings.run_folder)
        self._warn = warn
        self._run: wandb.Run | None = None
        self._artifacts: Artifacts | None = None
        self._defined: set[str] = set()
        """Names and patterns of metrics that W&B was told how to draw."""
        self._num_rows = 0
        self._last: tuple[float, dict[bool, float]] = (-1.0, {})
        """Highest step of a row, and whether those that have it are evaluations: of so many
        answers a problem."""
        self._tokens = 0.0
        self._number = 0
        """Of the row that was sent last."""
        self._tables = Tables(folder=self._run_folder, has_trees=settings.has_trees)
        self._writer = BackgroundWriter(
            warn=lambda _, reason: warn("wandb_stopped", f"{reason}; metrics.jsonl has all rows"),
            name="wandb",
            on_failure=OnFailure.STOP,
            max_waiting=max_waiting,
            close_s=close_s,
        )
        past = [self._numbered(row) for row in rows]
        self._writer.put("start", partial(self._start, past))

    def put(self, row: Row) -> None:
        """Hand over the next row, which has a `step`; never blocks. Without TOKENS it gets those of
        the row before."""
        if (numbered := self._numbered(row)) is not None:
            self._writer.put("row", partial(self._log, *numbered))

    def _numbered(self, row: Row) -> tuple[int, Row] | None:
        """The next row, complete, with its number; None if it repeats an earlier one.

        An evaluation of more answers does not: at the step where a run ends it takes the place of
        the interim one.
        """
        number, step, is_evaluation = self._num_rows, row["step"], _is_evaluation(row)
        samples = row.get("eval/num_samples", 0.0)
        self._num_rows += 1
        last, kinds = self._last
        kinds = kinds if step == last else {}
        if step < last or samples <= kinds.get(is_evaluation, -1.0):
            return None
        self._last = step, kinds | {is_evaluation: samples}
        self._tokens = row.get(TOKENS, self._tokens + row.get("tokens/sampled", 0.0))
        return number, row | {TOKENS: self._tokens}

    def _sent(self, num_rows: int) -> set[int]:
        """Numbers of the rows that W&B has; of an earlier version's run all that are written."""
        file, id_file = self._folder / SENT_FILE, self._folder / ID_FILE
        if not id_file.exists():
            return set()
        if not file.exists():
            return set(range(num_rows))
        lines = file.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        file.write_text("".join(whole))  # without a line that a crash left unfinished
        handed = [line.split() for line in whole]
        sent = {int(number) for number, mode in handed if mode == "online"}
        if any(mode == "offline" for _, mode in handed):
            found = offline_rows(self._run_folder, id_file.read_text())
            sent |= {int(row["_step"]) for row in found}
        return sent

    def close(self) -> None:
        """Finish the run, within a limited time."""
        self._writer.close(self._finish)

    def _log(self, number: int, row: Row) -> None:
        assert self._run is not None and self._artifacts is not None
        define(self._run, set(row), self._defined)
        self._number = number
        if _is_evaluation(row):
            self._tables.evaluated(row["step"])
        found = self._tables.due(row["step"])
        self._run.log(shown(row) | found, step=number)
        if found:  # an evaluation's files are there
            self._artifacts.log_evaluations()
        with (self._folder / SENT_FILE).open("a") as file:
            file.write(f"{number} {'offline' if self._run.offline else 'online'}\n")

    def _finish(self) -> None:
        assert self._run is not None and self._artifacts is not None
        if late := self._tables.due(None):
            self._run.log(late, step=self._number)
        self._artifacts.log_evaluations()
        self._artifacts.log_checkpoints()
        self._run.finish()

    def _start(self, past: list[tuple[int, Row] | None]) -> None:
        """Begin or go on with the run, and send what it does not have of the sessions before."""
        import wandb

        sent = self._sent(len(past))
        # Else what waits to be sent of artifacts would lie in the home, and not move with the run.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder / "wandb"))
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
        (self._folder / ID_FILE).write_text(self._run.id)  # in a sweep W&B's own
        self._artifacts = Artifacts(
            folder=self._run_folder,
            name=self._settings.name,
            model=self._settings.model,
            keep=self._settings.keep,
            run=self._run,
        )
        self._artifacts.use_start()
        self._run.define_metric("step", hidden=True)
        self._run.define_metric(TOKENS)
        self._defined = {"step"}
        for number, row in filter(None, past):
            if number in sent:
                self._tables.pass_over(row["step"])
            else:
                self._log(number, row)

    def _init(self, mode: Literal["offline"] | None) -> "wandb.Run":
        import wandb

        id_file = self._folder / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=self._settings.project,
            name=self._settings.name,
            group=self._settings.group,
            id=id_file.read_text(),
            resume="allow",
            dir=str(self._folder),
            config=dict(self._settings.shown),
            mode=mode,
            # Metadata would hold the command line of a Ray worker, and with it Ray's password, and
            # its own look at git that of the folder which Ray runs it in.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
            ),
        )


def _is_evaluation(row: Row) -> bool:
    return "eval/pass_at_1" in row


def _without_code(config: "Config") -> dict[str, object]:
    """A configuration without the user's code, which is nobody's but the run folder's."""
    return {
        section: {key: value for key, value in keys.items() if key != "sources"}
        for section, keys in asdict(config).items()
    }
