"""Evaluation report: the table of an evaluation, and the differences between two of them."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import pyarrow.parquet as pq
import rich.console
import rich.table

from treerpo_ray.evaluate import Evaluation
from treerpo_ray.scores import (
    Samples,
    Score,
    majority,
    paired_difference,
    pass_at,
    powers_of_two,
)
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
        ours, theirs: Folder or URI of a run or of an evaluation, or one of the files in its
            `eval/`. Of a run the newest evaluation counts.

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
    found, sizes = {}, {}
    for name in common:
        pair = read_samples(first[name]), read_samples(second[name])
        found[name], sizes[name] = compare(*pair), max(map(len, pair))
    shown = rich.table.Table(title=f"{ours} less {theirs}, paired by problem [95 %]; in points")
    names = dict.fromkeys(name for scores in found.values() for name in scores)
    for title in ("benchmark", "problems", *names):
        shown.add_column(title, justify="left" if title == "benchmark" else "right")
    for name, scores in found.items():
        size = f"{scores['pass@1'].num_problems} of {sizes[name]}"
        cells = (cell(key, scores[key]) if key in scores else "" for key in names)
        shown.add_row(name, size, *cells)
    return found, shown


def find(place: str) -> dict[str, str]:
    """Files of samples by benchmark; see `differences`."""
    fs, path = fsspec.core.url_to_fs(str(Path(place).expanduser()) if "://" not in place else place)
    if path.endswith((".json", ".parquet")):
        files = [path.rpartition(".")[0] + ".parquet"]
    else:
        files = sorted(fs.glob(f"{path}/eval/*.parquet"))
        steps = [file for file in files if _stem(file).startswith("step=")]
        files = [file for file in files if file not in steps[:-1]]
    if not files or not fs.isfile(files[0]):
        raise ValueError(f"{place}: there are no samples of an evaluation (eval/*.parquet)")
    return {_benchmark(fs, file): fs.unstrip_protocol(file) for file in files}


def _benchmark(fs: fsspec.AbstractFileSystem, file: str) -> str:
    """Name of what was evaluated: the file's, or of a training run the path of its data."""
    if not _stem(file).startswith("step="):
        return _stem(file)
    return str(json.loads(fs.cat_file(f"{file.rpartition('.')[0]}.json"))["data"])


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def compare(ours: dict[Problem, Samples], theirs: dict[Problem, Samples]) -> dict[str, Score]:
    """Paired differences by score, over the problems that both have.

    Raises:
        ValueError: they have no problem in common.
    """
    if not (common := [problem for problem in ours if problem in theirs]):
        raise ValueError("the two evaluations have no problem in common")
    fewest = min(len(side[problem].length) for side in (ours, theirs) for problem in common)
    measures: dict[str, Callable[[Samples], float]] = {"pass@1": lambda samples: samples.pass_at_1}
    for k in powers_of_two(fewest)[1:]:
        measures[f"pass@{k}"] = partial(pass_at, k=k)
    measures |= {
        "majority": majority,
        "length": lambda samples: samples.mean_length,
        "cut_off": lambda samples: samples.cut_off_share,
    }
    found = {}
    for name, value in measures.items():
        pair = (np.array([value(side[problem]) for problem in common]) for side in (ours, theirs))
        found[name] = paired_difference(*pair, seed=0)
    return found


def read_samples(path: str) -> dict[Problem, Samples]:
    """Samples of each problem in a file (path or URI) that `evaluate.save_samples` wrote."""
    fs, file = fsspec.core.url_to_fs(path)
    rows: dict[Problem, list[dict]] = {}
    for row in pq.read_table(file, filesystem=fs).to_pylist():
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
