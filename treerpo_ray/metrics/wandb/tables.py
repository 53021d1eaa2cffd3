"""Tables: answers of evaluations and trees of training, as W&B shows them; the trees also as the
viewer's page.

They are read from the run folder, into which others write them a little later than their row comes.
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treerpo_ray.algo.backup import mean_backup
from treerpo_ray.config.data import PROJECT
from treerpo_ray.errors import one_line
from treerpo_ray.records import TreeRecord
from treerpo_ray.run_folder import trees as saved_trees
from treerpo_ray.run_folder.files import RunFolder

if TYPE_CHECKING:
    import wandb


log = logging.getLogger(__name__)

MOST_SAMPLES = 64
"""Answers of an evaluation that are shown, one of each of its first problems."""
MOST_TREES = 4
"""Trees that are shown with it, those whose answers differ most."""
SAMPLES, TREES, PAGE = "eval/samples", "trees/steps", "trees/page"
SAMPLE_COLUMNS = ("problem", "question", "references", "text", "verdict", "reward",
                  "num_tokens")  # fmt: skip
LATE_ROWS = 8
"""Rows, from that of an evaluation on, with which its tables are looked for: what is not there by
then comes at the end."""
PAGE_S = 120.0
"""Time for the viewer to write a page, which takes a few seconds."""
PAGE_TREES = 2
"""Trees on a page; two of 584 steps with up to 384 tokens have 5 MB."""
MAX_PAGE_BYTES = 16 * 2**20
"""Of a page."""
TREE_COLUMNS = ("ticket", "question", "step", "parent", "depth", "tokens", "value", "advantage",
                "answer", "verdict")  # fmt: skip


MakePage = Callable[[str, Sequence[str]], str]
"""Makes a page of a run folder's trees, each `STEP:TICKET`."""


def viewer_page(place: str, refs: Sequence[str]) -> str:
    """The page that the viewer writes, in a process of its own: it stands above the metrics, and
    what it reads and holds is no burden on whoever writes them.

    Raises:
        RuntimeError: there is none; with what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trees.html"
        trees = [word for ref in refs for word in ("--tree", ref)]
        done = subprocess.run(
            [sys.executable, "-m", "treerpo_ray.viewer", place, "--html", str(file), *trees],
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=PAGE_S,
        )
        if not file.exists():
            raise RuntimeError(done.stderr.strip())
        return file.read_text(encoding="utf-8")


class Tables:
    """The tables and pages of the evaluations of a run, each once.

    Args:
        folder: The run folder.
        has_trees: Whether the run saves trees.
        make_page: Makes a page of trees.
    """

    def __init__(
        self, *, folder: RunFolder, has_trees: bool, make_page: MakePage = viewer_page
    ) -> None:
        self._folder, self._make_page = folder, make_page
        self._passed = -1.0
        """Step until which all that there is has been shown."""
        self._shown: set[str] = set()
        self._kinds = (SAMPLES, TREES, PAGE) if has_trees else (SAMPLES,)
        self._awaited, self._evaluated, self._rows_left = set(self._kinds), -1.0, LATE_ROWS
        """Kinds that are not there yet, of the evaluation at which step, and how long to look."""

    def pass_over(self, step: float) -> None:
        """What is of this step or earlier ones has been shown before."""
        self._passed = max(self._passed, step)

    def evaluated(self, step: float) -> None:
        """Look for the tables of the evaluation at `step` from now on."""
        self._awaited, self._evaluated, self._rows_left = set(self._kinds), step, LATE_ROWS

    def due(self, step: float | None) -> "dict[str, wandb.Table | wandb.Html]":
        """Tables that are there until `step`, that of a row, and were not shown; None: at the end,
        all that there are.

        The newest of each kind, if several are: a row has room for one. The folder is looked into
        only while some are awaited.
        """
        self._rows_left -= 1
        kinds = set(self._awaited if self._rows_left >= 0 else ())
        if step is None:
            kinds = set(self._kinds)
        found: dict[str, wandb.Table | wandb.Html] = {}
        newest = self._newest(float("inf") if step is None else step) if kinds else None
        if newest is None:
            return found
        makers: dict[str, Callable[[int], wandb.Table | wandb.Html]] = {
            SAMPLES: self._samples,
            TREES: self._trees,
            PAGE: self._page,
        }
        for name, make in makers.items():
            if name not in kinds or f"{name}{newest}" in self._shown:
                continue
            try:
                found[name] = make(newest)
            except Exception as error:  # of the disk, a store, Parquet; a table stops no metrics
                log.info("no table %s: %s", name, one_line(error))
                continue
            self._shown.add(f"{name}{newest}")
            if newest >= self._evaluated:
                self._awaited.discard(name)
        return found

    def _newest(self, limit: float) -> int | None:
        """Step of the newest evaluation until `limit` whose answers are there to be shown."""
        try:
            steps = [_step_of(path) for path in self._folder.glob("eval/step=*.parquet")]
        except Exception as error:  # of the disk, a store; a table stops no metrics
            log.info("no tables: %s", one_line(error))
            return None
        return max((each for each in steps if self._passed < each <= limit), default=None)

    def _samples(self, step: int) -> "wandb.Table":
        import wandb

        rows = self._folder.read_table(f"eval/step={step:06d}.parquet").to_pylist()
        first = [row for row in rows if row["sample"] == 0][:MOST_SAMPLES]
        data = [[_plain(row.get(column)) for column in SAMPLE_COLUMNS] for row in first]
        return wandb.Table(columns=["step", *SAMPLE_COLUMNS], data=[[step, *row] for row in data])

    def _trees(self, step: int) -> "wandb.Table":
        """Trees of the newest learner step until that of the evaluation.

        Raises:
            ValueError: none is saved.
        """
        import wandb

        newest, records = self._chosen(step)
        data = [row for record in records for row in self._tree_rows(record)]
        columns: list[str | int] = ["learner step", *TREE_COLUMNS]
        return wandb.Table(columns=columns, data=[[newest, *row] for row in data])

    def _page(self, step: int) -> "wandb.Html":
        """The first trees of `_trees` as the viewer shows them.

        Raises:
            ValueError: none is saved, or they are too large.
        """
        import wandb

        newest, records = self._chosen(step)
        refs = [f"{newest}:{record.ticket}" for record in records[:PAGE_TREES]]
        page = self._make_page(self._folder.place, refs)
        if (size := len(page.encode())) > MAX_PAGE_BYTES:
            raise ValueError(f"the page has {size} bytes")
        return wandb.Html(page, inject=False)

    def _chosen(self, step: int) -> tuple[int, list[TreeRecord]]:
        """The newest learner step with trees until that of the evaluation, and those to show: the
        ones whose steps differ most in value; where none do, any."""
        saved = [each for each in saved_trees.saved_steps(self._folder) if each <= max(step, 1)]
        if not saved:
            raise ValueError("no trees are saved")
        records = saved_trees.saved(self._folder, saved[-1])
        spread = [float(np.nan_to_num(mean_backup(r.tree, r.rewards).steps).std()) for r in records]
        mixed = [index for index in range(len(records)) if spread[index] > 0]
        most = sorted(mixed or range(len(records)), key=lambda i: -spread[i])[:MOST_TREES]
        return saved[-1], [records[index] for index in most]

    def _tree_rows(self, record: TreeRecord) -> list[list[Any]]:
        """A row a step, with the advantage that the learner gave it, if that is saved."""
        tree, values = record.tree, mean_backup(record.tree, record.rewards)
        training = record.training
        advantages = np.full(len(tree), np.nan) if training is None else training.advantages
        leaves = dict(
            zip(tree.leaves, zip(record.leaf_texts, record.verdicts, strict=True), strict=True)
        )
        rows = []
        for index, step in enumerate(tree.steps):
            text, verdict = leaves.get(index, ("", None))
            rows.append(
                [
                    *(record.ticket, record.question, index, step.parent, int(tree.depths[index])),
                    *(len(step.token_ids), _number(values.steps[index])),
                    *(_number(advantages[index]), text, None if verdict is None else verdict.value),
                ]
            )
        return rows


def _step_of(path: str) -> int:
    return int(path.rpartition("step=")[2].removesuffix(".parquet"))


def _plain(value: object) -> object:
    return " or ".join(map(str, value)) if isinstance(value, list) else value


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
