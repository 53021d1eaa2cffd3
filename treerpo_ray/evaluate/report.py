"""Evaluation report: the table of an evaluation, and what two of them differ in."""

import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from treerpo_ray.config.files import with_moved_modules
from treerpo_ray.evaluate.evaluation import Evaluation, is_correct
from treerpo_ray.evaluate.scores import (
    Pair,
    Samples,
    Score,
    mean_over_benchmarks,
    paired,
    powers_of_two,
)
from treerpo_ray.run_folder.files import RunFolder, did_you_mean, named_folder
from treerpo_ray.verifier.verdict import Verdict

log = logging.getLogger(__name__)

IN_TOKENS = ("length", "median_length")
"""Scores that are no shares."""
COLUMNS = 3
"""Benchmarks beside each other: with their intervals they fit 80 characters."""
PAPER = ("math500", "olympiadbench", "minerva", "aime24")
"""Benchmarks of the mean that TreeRPO's paper reports (arXiv 2506.05183, table 1)."""
SETTINGS = {
    "num_samples": "evaluate.num_samples",
    "temperature": "evaluate.temperature",
    "top_p": "evaluate.top_p",
    "max_tokens": "evaluate.max_tokens",
    "verifier": "verifier.check",
    "system_prompt": "system_prompt",
    "prompt_template": "prompt_template",
    "chat_template_args": "chat_template_args",
    "stop": "model.stop",
}
"""What two evaluations must share to be compared: fields of theirs, and the settings behind."""
WITHOUT: dict[str, object] = {"prompt_template": "", "chat_template_args": {}, "stop": []}
"""Values of what evaluations of earlier versions did not have."""
ProblemKey = tuple[str, str]
"""Id and question, by which problems of two evaluations are the same."""


def with_mean(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, Score]]:
    """Scores by benchmark and name, and behind them those of the mean over the benchmarks that
    count, by a name that tells them; none if there is but one."""
    if not (names := averaged(scores)):
        return scores
    mean = mean_over_benchmarks([scores[name] for name in names])
    return scores | {f"mean of {', '.join(names)}": mean}


def averaged(names: Iterable[str]) -> tuple[str, ...]:
    """Benchmarks that a mean is over: the paper's if all are there, or else all if several are."""
    names = tuple(names)
    chosen = PAPER if set(PAPER) <= set(names) else names
    return chosen if len(chosen) > 1 else ()


def table(
    scores: dict[str, dict[str, Score]], *, model: str, verifier: str, sampling: str
) -> rich.console.Group:
    """A row a score with its interval, a column a benchmark or mean; as many tables below each
    other as they need in a terminal.

    Args:
        scores: By benchmark and name.
        model: What was evaluated, in words.
        verifier: What graded the answers.
        sampling: How all of them were sampled, in words.
    """
    title = (
        f"{model}\n{sampling}, graded by {verifier}\n"
        "value [95 % interval over problems]; shares in %, lengths in tokens"
    )
    parts: list[rich.console.RenderableType] = [title]
    names = list(scores)
    for first in range(0, len(names), COLUMNS):
        chosen = {name: scores[name] for name in names[first : first + COLUMNS]}
        parts.append(_scores_table(chosen))
    return rich.console.Group(*parts)


def _scores_table(scores: dict[str, dict[str, Score]]) -> rich.table.Table:
    shown = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, title=""
    )
    shown.add_column("")
    for name, found in scores.items():
        size = max(score.num_problems for score in found.values())
        shown.add_column(f"{name} ({size})", justify="right")
    for key in dict.fromkeys(key for found in scores.values() for key in found):
        cells = (cell(key, found[key]) if key in found else "" for found in scores.values())
        shown.add_row(key, *cells)
    return shown


def cell(name: str, score: Score, sign: str = "") -> str:
    """A score with its interval; `sign` is + for a difference."""
    value, low, high = (number(name, part, sign) for part in (score.value, score.low, score.high))
    return f"{value} [{low}, {high}]"


def number(name: str, value: float, sign: str = "") -> str:
    """A value of the score of that name: tokens, or percent."""
    shown = round(value if name in IN_TOKENS else 100 * value, 1)
    return f"{shown + 0.0:{sign}.1f}"  # never -0.0


def plain(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by benchmark and name as JSON takes them."""
    return {name: {key: _plain(s) for key, s in each.items()} for name, each in scores.items()}


def _plain(score: Score) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(score).items()}


def show(shown: rich.console.Group) -> None:
    """Print a table to stdout; names may hold whatever they like."""
    width = None if sys.stdout.isatty() else 160
    rich.console.Console(file=sys.stdout, width=width, markup=False, highlight=False).print(shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two evaluations, A and B, on the problems that both have."""

    names: tuple[str, str]
    """Of A and of B, each with the step of a run."""
    sampling: dict[str, float]
    """How all answers were sampled; empty: not recorded."""
    in_words: str
    """The same."""
    sizes: dict[str, str]
    """Problems by benchmark, in words."""
    pairs: dict[str, dict[str, Pair]]
    """By benchmark or mean of them, and by score."""

    @property
    def tables(self) -> rich.console.Group:
        """Of each benchmark or mean the numbers of A, of B, and A minus B."""
        legend = [f"{side}: {name}" for side, name in zip("AB", self.names, strict=True)]
        parts: list[rich.console.RenderableType] = ["\n".join(legend)]
        for name, pairs in self.pairs.items():
            title = [self.sizes.get(name, ""), self.in_words]
            parts += [f"\n{name}: {', '.join(filter(None, title))}", _by_side(pairs)]
        return rich.console.Group(
            *parts, "value [95 % interval over problems]; differences are paired by problem"
        )

    @property
    def fields(self) -> dict[str, object]:
        """The same as JSON takes it."""
        scores = {
            name: {
                key: {"A": _plain(p.ours), "B": _plain(p.theirs), "A-B": _plain(p.difference)}
                for key, p in each.items()
            }
            for name, each in self.pairs.items()
        }
        return {**dict(zip("AB", self.names, strict=True)), **self.sampling, "scores": scores}


def _by_side(pairs: dict[str, Pair]) -> rich.table.Table:
    """Shares above lengths, each with its units."""
    shown = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False
    )
    for heading in ("", "A, %", "B, %", "A minus B, points"):
        shown.add_column(heading, justify="right" if heading else "left")
    shares, lengths = (
        {name: each for name, each in pairs.items() if (name in IN_TOKENS) is is_length}
        for is_length in (False, True)
    )
    for name, pair in shares.items():
        shown.add_row(name, *_cells(name, pair))
    if lengths:
        shown.add_section()
        shown.add_row("", "A, tokens", "B, tokens", "A minus B, tokens", style="bold")
    for name, pair in lengths.items():
        shown.add_row(name, *_cells(name, pair))
    return shown


def _cells(name: str, pair: Pair) -> tuple[str, str, str]:
    return cell(name, pair.ours), cell(name, pair.theirs), cell(name, pair.difference, "+")


def comparison(ours: str, theirs: str) -> Comparison:
    """Compare two evaluations on the same problems.

    Args:
        ours, theirs: Folder or URI of a run or of an evaluation, its name where it lies in the
            folder of all runs, or one of the files in its `eval/`. Of a run the newest evaluation
            counts; its name says of which step that is.

    Raises:
        ValueError: there is no evaluation, the two share no benchmark or problem, or they were
            sampled or graded in different ways.
    """
    first, second = find(ours), find(theirs)
    if len(first) == len(second) == 1:  # one of each, whatever they are called
        second = dict(zip(first, second.values(), strict=True))
    if not (common := [name for name in first if name in second]):
        raise ValueError(
            f"{ours} and {theirs} share no benchmark: {', '.join(first)}; {', '.join(second)}"
        )
    found, sizes = {}, {}
    for seed, name in enumerate(common):
        check_alike(first[name], second[name])
        sides = read_samples(first[name]), read_samples(second[name])
        found[name] = compare(*sides, seed=seed)
        num_common, most = len(sides[0].keys() & sides[1].keys()), max(map(len, sides))
        sizes[name] = f"{most} problems"
        if num_common < most:
            sizes[name] = f"the {num_common} of {most} problems that both have"
    places = ((ours, first[common[0]]), (theirs, second[common[0]]))
    names = [_label(place, file) for place, file in places]
    if names[0] == names[1]:  # of one name in two places
        names = [f"{place} ({_stem(file)})" for place, file in places]
    recorded = _evaluation(first[common[0]])
    one = Evaluation.from_fields(recorded) if recorded else None
    return Comparison(
        names=(names[0], names[1]),
        sampling={} if one is None else one.sampling_fields,
        in_words="" if one is None else one.sampling,
        sizes=sizes,
        pairs=found | _mean_of_pairs(found),
    )


def _mean_of_pairs(found: dict[str, dict[str, Pair]]) -> dict[str, dict[str, Pair]]:
    """The pairs of the mean over benchmarks, by its name."""
    ours, theirs, less = (
        with_mean(
            {
                name: {key: getattr(pair, part) for key, pair in each.items()}
                for name, each in found.items()
            }
        )
        for part in ("ours", "theirs", "difference")
    )
    return {
        name: {
            key: Pair(ours=ours[name][key], theirs=theirs[name][key], difference=less[name][key])
            for key in ours[name]
        }
        for name in ours
        if name not in found
    }


def _label(place: str, file: str) -> str:
    """What is compared, with the learner step of a run that its file is of."""
    name = PurePosixPath(place.rstrip("/")).name
    if not (stem := _stem(file)).startswith("step="):
        return name
    return f"{name if not name.startswith('step=') else place} (step {int(stem[5:])})"


def find(place: str) -> dict[str, str]:
    """Files of samples by benchmark; see `comparison`."""
    named, place = place, named_folder(place)
    if place.endswith((".json", ".parquet")):
        folder, name = _split(place)
        files = [f"{_stem(name)}.parquet"]
    else:
        folder = RunFolder(place)
        files = folder.glob("eval/*.parquet")
        steps = [file for file in files if _stem(file).startswith("step=")]
        files = [file for file in files if file not in steps[:-1]]
    if not files or not folder.exists(files[0]):
        if not folder.exists():
            raise ValueError(f"{place}: there is no such run or evaluation{did_you_mean(named)}")
        raise ValueError(f"{place}: there are no samples of an evaluation (eval/*.parquet)")
    return {_benchmark(folder.uri(file)): folder.uri(file) for file in files}


def _split(file: str) -> tuple[RunFolder, str]:
    """The folder of a file (path or URI), and its name in there."""
    folder, _, name = file.rpartition("/")
    return RunFolder(folder or "."), name


def _benchmark(file: str) -> str:
    """Name of what was evaluated: the file's, or of a training run the path of its data."""
    if not _stem(file).startswith("step="):
        return _stem(file)
    return str(_evaluation(file)["data"])


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def check_alike(ours: str, theirs: str) -> None:
    """Check that two files of samples were made in the same way, and warn if it is not known.

    Raises:
        ValueError: they were not; one line with the setting and both values.
    """
    first, second = _evaluation(ours), _evaluation(theirs)
    for field, key in SETTINGS.items():
        one, other = (each.get(field, WITHOUT.get(field)) for each in (first, second))
        if one is None or other is None:
            log.warning("%s is not recorded of both %s and %s", key, ours, theirs)
        elif one != other:
            raise ValueError(f"{key} is {one!r} in {ours} and {other!r} in {theirs}")


def _evaluation(file: str) -> dict[str, Any]:
    """What is written beside a file of samples; nothing if it stands alone."""
    folder, name = _split(f"{file.removesuffix('.parquet')}.json")
    return with_moved_modules(json.loads(folder.read_bytes(name))) if folder.exists(name) else {}


def compare(
    ours: dict[ProblemKey, Samples], theirs: dict[ProblemKey, Samples], *, seed: int
) -> dict[str, Pair]:
    """Both and their differences by score, over the problems that both have.

    Raises:
        ValueError: they have no problem in common, or other numbers of samples of one.
    """
    if not (common := [problem for problem in ours if problem in theirs]):
        raise ValueError("the two evaluations have no problem in common")
    sides = [[side[problem] for problem in common] for side in (ours, theirs)]
    counts = sorted({len(samples.length) for side in sides for samples in side})
    if len(counts) > 1:
        raise ValueError(f"the two evaluations have {counts} samples of a problem")
    ks = powers_of_two(counts[0])
    return paired(*sides, pass_ks=ks, num_samples=counts[0], seed=seed)


def read_samples(path: str) -> dict[ProblemKey, Samples]:
    """Samples of each problem in a file (path or URI) that `save_samples` wrote."""
    folder, name = _split(path)
    rows: dict[ProblemKey, list[dict]] = {}
    for row in folder.read_table(name).to_pylist():
        rows.setdefault((row["problem"], row["question"]), []).append(row)
    return {problem: _samples(own) for problem, own in rows.items()}


def _samples(rows: list[dict]) -> Samples:
    verdicts = [Verdict(row["verdict"]) for row in rows]
    groups = [row["group"] for row in rows]
    has_partial = Verdict.PARTIAL in verdicts
    return Samples(
        is_correct=is_correct(verdicts),
        reward=np.array([row["reward"] for row in rows], float) if has_partial else None,
        length=np.array([row["num_tokens"] for row in rows]),
        is_cut_off=np.array([row["is_cut_off"] for row in rows]),
        group=None if None in groups else np.array(groups),
    )
