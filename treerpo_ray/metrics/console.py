"""Console: what a run shows while it runs. All of it goes to stderr; stdout is for results.

What names a process or a node to Ray and the system (ids) stands in the logs alone.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from treerpo_ray.errors import without_ids

if TYPE_CHECKING:  # the first line should not wait for what these import
    from treerpo_ray.config import Config
    from treerpo_ray.metrics.run_log import Event, Row

HEADER_EVERY = 20
"""Lines after which the names of the columns are repeated."""
MISSING = "-"
INDENT = 12
"""Where the text of a plan's line begins, behind its title."""
IDS = {"pid", "core", "node"}
"""Fields of events that are ids."""


def short(count: float) -> str:
    """A count in at most five characters, such as 987, 12.3k or 1.23M.

    >>> [short(n) for n in (0, 987, 1149.4, 370_210, 999_960, 12_345_678)]
    ['0', '987', '1.15k', '370k', '1.00M', '12.3M']
    """
    size, unit = float(count), ""
    for next_unit in "kMBT":
        if size < 999.5:
            break
        size, unit = size / 1000, next_unit
    digits = 0 if not unit or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A metric of the table, right-aligned."""

    title: str
    metric: str
    form: Callable[[float], str]
    width: int

    def cell(self, row: "Row") -> str:
        """What stands in the line of a step."""
        text = self.form(row[self.metric]) if self.metric in row else MISSING
        return f"{text:>{self.width}}"


def columns(config: "Config") -> list[Column]:
    """Those that can move in a run; all of them, with step and times, take 78 characters."""
    has_kl = config.loss.kl_coef > 0
    can_be_stale = config.gate.max_staleness > 0
    prunes = config.learner.prune_threshold >= 0
    found = [
        Column(title="reward", metric="reward/mean", form="{:.3f}".format, width=6),
        Column(title="kept", metric="groups/kept_share", form="{:.0%}".format, width=4),
        Column(title="loss", metric="loss/total", form="{:+.4f}".format, width=7),
        Column(title="kl", metric="loss/kl", form="{:.4f}".format, width=6),
        Column(title="mismatch", metric="mismatch/mean", form="{:.4f}".format, width=8),
        Column(title="stale", metric="staleness/mean", form="{:.2f}".format, width=5),
        Column(title="tok/s", metric="tokens/per_s", form=short, width=5),
        Column(title="tokens", metric="tokens/total", form=short, width=6),
    ]
    left_out = {"kl": not has_kl, "stale": not can_be_stale, "kept": not prunes}
    return [column for column in found if not left_out.get(column.title)]


class _Terminal(rich.console.Console):
    """Standard error; where nobody reads it any more, the run goes on unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class Console:
    """Terminal of a run, or of an evaluation without one; plain lines where stderr is no terminal.

    Args:
        config: That of the run whose steps are shown.
        console: Where to; standard error if not given.
        clock: Seconds since any time.
    """

    def __init__(
        self,
        config: "Config | None" = None,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or _Terminal(file=sys.stderr, highlight=False)
        self._clock, self._started_at = clock, clock()
        self._first: Row | None = None
        self._num_lines = 0
        self._last_evaluation_s = 0.0
        self._sampling = ""
        self._stage: tuple[str, float] | None = None
        self.config = config

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        return self._console.width

    def expect_evaluation(self, seconds: float) -> None:
        """Count an evaluation of that length into the time left."""
        self._last_evaluation_s = seconds

    def print_step(self, row: "Row") -> None:
        """One line for a learner step, and one or two for the evaluation that the row holds."""
        if "eval/pass_at_1" in row:
            self._print_evaluation(row)
        if "reward/mean" not in row:
            return
        assert self.config is not None  # only runs have steps
        shown = columns(self.config)
        width = max(4, len(f"{self.config.run.num_steps}") * 2 + 1)
        if self._num_lines % HEADER_EVERY == 0:
            titles = " ".join(f"{column.title:>{column.width}}" for column in shown)
            self._print(f"{'step':>{width}} {titles} {'time':>6} {'left':>6}", style="bold")
        self._num_lines += 1
        cells = " ".join(column.cell(row) for column in shown)
        step = f"{row['step']:.0f}/{self.config.run.num_steps}"
        elapsed = duration(self._clock() - self._started_at)
        self._print(f"{step:>{width}} {cells} {elapsed:>6} {self._time_left(row):>6}")
        if row.get("groups/kept") == 0:
            self.note(f"step {row['step']:.0f}: no step group was kept, so there was no update")

    def _print_evaluation(self, row: "Row") -> None:
        """The score, and how it was sampled where that is not as in the line before."""
        reward = f"mean reward {row['eval/reward']:.3f}, " if "eval/reward" in row else ""
        self.note(
            f"step {row['step']:.0f}: {reward}Pass@1 {row['eval/pass_at_1']:.1%} (95 % interval "
            f"{row['eval/ci95_low']:.1%} to {row['eval/ci95_high']:.1%}), "
            f"{row['eval/length']:.1f} tokens an answer"
        )
        answers = "1 answer" if row["eval/num_samples"] == 1 else "{eval/num_samples:.0f} answers"
        sampling = f"{{eval/num_problems:.0f}} problems, {answers} each, temperature "
        sampling = (sampling + "{eval/temperature:g}, top-p {eval/top_p:g}").format_map(row)
        if sampling != self._sampling:
            self.note(f"        {sampling}")
        self._sampling = sampling

    def print_event(self, event: "Event") -> None:
        """One line for something out of the ordinary; the run's log has its ids."""
        if event.kind == "learner_started":
            self.end_stage()
        shown = {name: value for name, value in event.fields.items() if name not in IDS}
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
        self._print(without_ids(f"{event.kind.replace('_', ' ')}: {details}"), style="yellow")

    def note(self, text: str) -> None:
        """Prose: on a terminal it is wrapped between words, in a file it is one line."""
        self._print(self._wrapped(text), style="cyan")

    def print_plan(self, lines: Sequence[str]) -> None:
        """Lines with a title of INDENT columns."""
        for line in lines:
            self._print(self._wrapped(line, " " * INDENT))

    def print_command(self, purpose: str, command: str) -> None:
        """A command to copy: it is never broken by us, and has nothing before it on its line."""
        self._print(f"{purpose}:", style="cyan")
        self._print(command)

    def begin_stage(self, description: str) -> None:
        """Name what is waited for now, until `end_stage` or `learner_started`; one that was begun
        before has come to nothing."""
        self._print(f"{description} ...")
        self._stage = description, self._clock()

    def end_stage(self) -> None:
        """Say how long the stage took that was begun, if there is one."""
        if self._stage is not None:
            description, start = self._stage
            self._print(f"{description}: done in {duration(self._clock() - start)}")
        self._stage = None

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        """A stage of the start of unknown length; one that fails is not said to be done."""
        with self.progress(description, None):
            yield

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Progress of long work of `total` parts, or of unknown length; yields its `advance`."""
        start = self._clock()
        if self._console.is_terminal:
            bar = _progress_bar(self._console, total)
            with bar:
                task = bar.add_task(description, total=total)
                yield lambda num_parts: bar.advance(task, num_parts)
        else:
            self._print(f"{description} ...")
            yield self._quarters(description, total)
        self._print(f"{description}: done in {duration(self._clock() - start)}")

    def _quarters(self, description: str, total: int | None) -> Callable[[int], None]:
        """An `advance` that prints a line at each quarter of the way."""
        done = 0

        def advance(num_parts: int) -> None:
            nonlocal done
            before, done = done, done + num_parts
            if total and 4 * before // total < 4 * done // total < 4:
                self._print(f"{description}: {done}/{total}")

        return advance

    def _time_left(self, row: "Row") -> str:
        """Steps at the pace since the first row that was printed, evaluations in between too, and
        the evaluation at the end; unknown at that row, whose step took its time to begin."""
        assert self.config is not None
        if self._first is None or row["step"] <= self._first["step"]:
            self._first = row
            return MISSING
        pace = (row["time"] - self._first["time"]) / (row["step"] - self._first["step"])
        run = self.config.run
        steps = max(0.0, run.num_steps - row["step"])
        if run.max_sampled_tokens and row.get("tokens/total"):
            tokens_left = max(0.0, run.max_sampled_tokens - row["tokens/total"])
            steps = min(steps, tokens_left / row["tokens/total"] * row["step"])
        return duration(pace * steps + self._last_evaluation_s)

    def _wrapped(self, text: str, indent: str = "") -> str:
        """Text broken between words for a terminal; spaces at its start stay."""
        if not self._console.is_terminal:
            return text
        return textwrap.fill(
            text,
            self.width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )

    def _print(self, text: str, style: str | None = None) -> None:
        # As it is: in prompts and model text brackets are no markup, and `:train:` is no picture.
        # A log keeps long lines whole.
        self._console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)


def _progress_bar(console: rich.console.Console, total: int | None) -> Progress:
    counts = (MofNCompleteColumn(),) if total else ()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        *counts,
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def duration(seconds: float) -> str:
    """Time in at most six characters, up to 99 hours."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
