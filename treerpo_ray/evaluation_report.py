"""Evaluation report: the table of an evaluation, and the differences between two of them."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import rich.console
import rich.table

from treerpo_ray.evaluate import Evaluation
from treerpo_ray.scores import Samples, Score, majority, paired_difference
from treerpo_ray.verdict import Verdict

IN_TOKENS = ("length", "median_length")
"""Scores that are no shares."""
Problem = tuple[str, str]
"""Id and question, by which problems of two evaluations are the same."""


def table(evaluations: dict[str, Evaluation]) -> rich.table.Table:
    """A column a benchmark, a row a score with its interval; the last column is their mean."""
    shown = rich.table.Table(title="value [95 % interval over problems]; shares in %")
    shown.add_column("")
    for name, evaluation in evaluations.items():
        shown.add_column(f"{name} ({evaluation.num_problems})", justify="right")
    shown.add_column("mean", justify="right")
    names = dict.fromkeys(name for each in evaluations.values() for name in each.scores)
    for name in names:
        found = [each.scores.get(name) for each in evaluations.values()]
        known = [score.value for score in found if score is not None]
        mean = number(name, float(np.mean(known))) if len(known) == len(found) else ""
        shown.add_row(name, *("" if s is None else cell(name, s) for s in found), mean)
    return shown


def cell(name: str, score: Score) -> str:
    """A score with its interval."""
    value, low, high = (number(name, part) for part in (score.value, score.low, score.high))
    return f"{value} [{low}, {high}]"


def number(name: str, value: float) -> str:
    """A value of the score of that name: tokens, or percent."""
    return f"{value:.1f}" if name in IN_TOKENS else f"{100 * value:.1f}"


def show(shown: rich.table.Table) -> None:
    """Print a table to stdout."""
    rich.console.Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(shown)


def differences(ours: str, theirs: str) -> tuple[dict[str, dict[str, Score]], rich.table.Table]:
    """Paired differences, first less second, by benchmark and score, on the same problems.

    Args:
        ours, theirs: Folder of a run or of an evaluation, or one of the files in its `eval/`. Of a
            run the newest evaluation counts.

    Raises:
        ValueError: there is no evaluation, or the two share no benchmark or problem.
    """
    first, second = find(ours), find(theirs)
    if len(first) == len(second) == 1:  # one of each, whatever they are called
        second = dict(zip(first, second.values(), strict=True))
    if not (common := [name for name in first if name in second]):
        raise ValueError(
            f"{ours} and {theirs} share no benchmark: {', '.join(first)}; {', '.join(second)}"
        )
    found = {name: compare(first[name], second[name]) for name in common}
    shown = rich.table.Table(title=f"{ours} less {theirs}, paired by problem [95 %]; in points")
    for title in ("benchmark", "problems", *next(iter(found.values()))):
        shown.add_column(title, justify="left" if title == "benchmark" else "right")
    for name, scores in found.items():
        size = str(scores["pass@1"].num_problems)
        shown.add_row(name, size, *(cell(key, score) for key, score in scores.items()))
    return found, shown


def find(place: str) -> dict[str, Path]:
    """Files of samples by benchmark; see `differences`."""
    path = Path(place).expanduser()
    if path.suffix in (".json", ".parquet"):
        files = [path.with_suffix(".parquet")]
    else:
        files = sorted((path / "eval").glob("*.parquet"))
        steps = [file for file in files if file.stem.startswith("step=")]
        files = [file for file in files if file not in steps[:-1]]
    if not files or not files[0].is_file():
        raise ValueError(f"{place}: there are no samples of an evaluation (eval/*.parquet)")
    return {_benchmark(file): file for file in files}


def _benchmark(file: Path) -> str:
    """Name of what was evaluated: the file's, or of a training run the path of its data."""
    if not file.stem.startswith("step="):
        return file.stem
    return str(json.loads(file.with_suffix(".json").read_text())["data"])


def compare(ours: Path, theirs: Path) -> dict[str, Score]:
    """Paired differences of two files of samples by score.

    Raises:
        ValueError: they have no problem in common.
    """
    first, second = read_samples(ours), read_samples(theirs)
    if not (common := [problem for problem in first if problem in second]):
        raise ValueError(f"{ours} and {theirs} have no problem in common")
    found = {}
    for name, value in {
        "pass@1": lambda samples: samples.pass_at_1,
        "majority": majority,
        "length": lambda samples: float(samples.length.mean()),
        "cut_off": lambda samples: float(samples.is_cut_off.mean()),
    }.items():
        pair = (np.array([value(side[problem]) for problem in common]) for side in (first, second))
        found[name] = paired_difference(*pair, seed=0)
    return found


def read_samples(path: Path) -> dict[Problem, Samples]:
    """Samples of each problem in a file that `evaluate.save_samples` wrote."""
    rows: dict[Problem, list[dict]] = {}
    for row in pq.read_table(path).to_pylist():
        rows.setdefault((row["problem"], row["question"]), []).append(row)
    return {problem: _samples(own) for problem, own in rows.items()}


def _samples(rows: list[dict]) -> Samples:
    verdicts = [Verdict(row["verdict"]) for row in rows]
    groups = [row["group"] for row in rows]
    return Samples(
        is_correct=np.array([v.reward if v.is_reward else np.nan for v in verdicts]),
        length=np.array([row["num_tokens"] for row in rows]),
        is_cut_off=np.array([row["is_cut_off"] for row in rows]),
        group=None if None in groups else np.array(groups),
    )
