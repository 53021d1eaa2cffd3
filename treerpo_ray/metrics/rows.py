"""Rows: the metrics of a run as they were written, and as the last resume left them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from treerpo_ray.run_folder.files import RunFolder, Scalar

if TYPE_CHECKING:
    from treerpo_ray.config.sections import RunConfig

Row = dict[str, float]
"""Metrics of one step by their name `area/name`, and the `step`."""
METRICS_FILE = "metrics.jsonl"
BY_SET = "reward/by_set/"
"""What stands before the name of a data set in that of its mean reward, where several are mixed."""


def latest_rows(folder: RunFolder) -> list[Row]:
    """The rows of a run folder by increasing step, one a step, as the last resume left them."""
    return latest(written_rows(folder))


def written_rows(folder: RunFolder) -> list[Row]:
    """The rows of a run folder as they were written."""
    return parse_rows(folder.read_lines(METRICS_FILE))


def latest(written: Sequence[Row]) -> list[Row]:
    """Rows as they were written, without those that a resume replaced.

    Rows of one step are merged. A row of an earlier step than the one before it tells of a
    resume: what came after that step belongs to a timeline that was rolled back.
    """
    rows: list[Row] = []
    for row in written:
        if rows and row["step"] < rows[-1]["step"]:
            rows = [kept for kept in rows if kept["step"] <= row["step"]]
        if rows and row["step"] == rows[-1]["step"]:
            rows[-1] = rows[-1] | row
        else:
            rows.append(row)
    return rows


def num_redone(written: Sequence[Row]) -> int:
    """How many learner steps a resume has done once more, by the rows as they were written."""
    newest, count = 0.0, 0
    for row in written:
        if "reward/mean" in row:
            count += row["step"] <= newest
            newest = max(newest, row["step"])
    return count


def last_step(run: "RunConfig", rows: Sequence[Row]) -> int:
    """The learner step that ends a run, as far as the rows of those that are done tell.

    It is `run.num_steps`, or before it the one that reached `run.max_sampled_tokens`.
    """
    limit, total = run.max_sampled_tokens, 0.0
    for row in rows:
        total += row.get("tokens/sampled", 0.0)
        if limit is not None and total >= limit:
            return int(row["step"])
    return run.num_steps


def parse_rows(lines: list[dict[str, Scalar]]) -> list[Row]:
    """Rows of the lines that stand for them; what is no number is NaN."""
    return [
        {name: math.nan if value is None else float(value) for name, value in line.items()}
        for line in lines
    ]
