"""Console: what a run shows while it runs. All of it goes to stderr; stdout is for results.

`output` has the one that a command line asks for. Colours are left out where NO_COLOR is set.

What names a process or a node to Ray and the system (ids) stands in the logs alone.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from treerpo_ray.errors import without_ids
from treerpo_ray.metrics.fork_lines import fork_lines
from treerpo_ray.metrics.step_table import MISSING, StepTable, duration

if TYPE_CHECKING:  # the first line should not wait for what these import
    from treerpo_ray.metrics.events import Event
    from treerpo_ray.metrics.rows import Row
    from treerpo_ray.run_folder.files import Scalar

HEADER_EVERY = 20
"""Lines after which the names of the columns are repeated."""
INDENT = 12
"""Where the text of a plan's line begins, behind its title."""
IDS = {"pid", "core", "node"}
"""Fields of events that are ids."""
ROUTINE = {
    *("engine_serving", "engine_draining", "engine_left", "learner_started"),
    *("shape_chosen", "write_done"),
}
"""Kinds of events that are no warning."""
SENTENCES = {
    "waiting": "waiting for {what}, for {seconds} s so far",
    "engine_serving": "engine {engine} serves, {seconds} s after its start",
    "engine_lost": "engine lost: engine {engine}: {reason}",
    "engine_draining": "engine draining: engine {engine} finishes {trees} trees: {reason}",
    "engine_left": "engine left: engine {engine}: {reason}",
    "learner_started": "learner started: step {step}, {workers} worker(s)",
    "learner_lost": "learner lost: step {step}, failure {failures}: {cause}",
    "write_failed": "write failed: {what}: {reason}",
    "write_waits": "write waits: {what}: {reason}",
    "write_done": "write done: {what}, after {seconds:.0f} s",
    "checkpoint_passed_over": "checkpoint passed over: step {step}: {fault}",
    "check_failed": "check failed: {reason}",
    "shape_chosen": "shape chosen: {what}",
    "wandb_offline": "W&B goes on offline: {reason}",
    "wandb_stopped": "W&B gets no more: {reason}",
}
"""What is told of an event, by its kind; of another one, or one that lacks a field, all fields."""


class _Terminal(rich.console.Console):
    """Standard error; where nobody reads it any more, the run goes on unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class Console:
    """Terminal of a run, or of an evaluation without one; plain lines where stderr is no terminal.

    Args:
        console: Where to; standard error if not given.
        clock: Seconds since any time.
        is_quiet: Whether warnings are all that is shown.
    """

    def __init__(
        self,
        *,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_quiet: bool = False,
    ) -> None:
        self._is_quiet = is_quiet
        self._live: tuple[Progress, TaskID] | None = None
        """The bar of `training`."""
        self._growing = 0
        """Learner step that it shows."""
        self._console = console or _Terminal(file=sys.stderr, highlight=False)
        self._clock, self._started_at = clock, clock()
        self._first: Row | None = None
        self._num_lines = 0
        self._last_evaluation_s = 0.0
        self._sampling = ""
        self._stage: tuple[str, float] | None = None
        self._table: StepTable | None = None

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        return self._console.width

    def expect_steps(self, table: StepTable) -> None:
        """Show learner steps, as the run has them that begins."""
        self._table = table

    def expect_evaluation(self, seconds: float) -> None:
        """Count an evaluation of that length into the time left."""
        self._last_evaluation_s = seconds

    def print_step(self, row: "Row") -> None:
        """One line for a learner step, one for the place to fork that needs the fewest tokens, and
        one or two for the evaluation that the row holds."""
        if "eval/pass_at_1" in row:
            self._print_evaluation(row)
        if "reward/mean" not in row:
            return
        assert self._table is not None  # only runs have steps
        if self._num_lines % HEADER_EVERY == 0:
            self._print(f"{self._table.titles} {'time':>6} {'left':>6}", style="bold")
        self._num_lines += 1
        elapsed, left = duration(self._clock() - self._started_at), self._time_left(row)
        self._print(f"{self._table.line(row)} {elapsed:>6} {left:>6}")
        if forks := fork_lines(row):
            self.note(f"        {min(forks, key=lambda fork: fork.token_share)}")

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
        """A line for something out of the ordinary; the run's log has its ids."""
        if event.kind == "learner_started":
            self.end_stage()
        if event.kind == "unhealthy":
            self.warn(finding_text(event.fields))
            return
        text = without_ids(sentence(event))
        if "\n" not in text:  # a traceback stays as it is
            text = self._wrapped(text)
        self._print(text, style="yellow", is_urgent=event.kind not in ROUTINE)

    def note(self, text: str) -> None:
        """Prose: on a terminal it is wrapped between words, in a file it is one line."""
        self._print(self._wrapped(text), style="cyan")

    def warn(self, text: str) -> None:
        """Prose that a quiet console shows, too."""
        self._print(self._wrapped(text), style="yellow", is_urgent=True)

    def print_plan(self, lines: Sequence[str]) -> None:
        """Lines with a title of INDENT columns; a quiet console shows what is unusual alone."""
        for line in lines:
            is_urgent = line[:INDENT].strip() == "unusual"
            self._print(self._wrapped(line, " " * INDENT), is_urgent=is_urgent)

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
        if self._live is not None:
            bar, task = self._live
            bar.update(task, description="training")

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        """A stage of the start of unknown length; one that fails is not said to be done."""
        with self.progress(description, None):
            yield

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Progress of long work of `total` parts, or of unknown length; yields its `advance`."""
        start = self._clock()
        if self._is_quiet:
            yield lambda num_parts: None
            return
        if self._console.is_terminal:
            bar = _progress_bar(self._console)
            with bar:
                task = bar.add_task(description, total=total)
                yield lambda num_parts: bar.advance(task, num_parts)
        else:
            self._print(f"{description} ...")
            yield self._quarters(description, total)
        self._print(f"{description}: done in {duration(self._clock() - start)}")

    @contextmanager
    def training(self) -> Iterator[None]:
        """On a terminal, a bar below all that is printed meanwhile: the stage that was begun, then
        the trees of the learner step, as `show_growth` tells."""
        if self._is_quiet or not self._console.is_terminal:
            yield
            return
        with _progress_bar(self._console) as bar:
            begun = self._stage[0] if self._stage else "training"
            self._live = bar, bar.add_task(begun, total=None)
            try:
                yield
            finally:
                self._live, self._growing = None, 0

    @property
    def is_live(self) -> bool:
        """Whether it shows the growth of trees."""
        return self._live is not None

    def show_growth(self, step: int, num_finished: int) -> None:
        """So many trees of a learner step are finished."""
        if self._live is None or (not num_finished and step != self._growing):
            return  # the bar has something to show once there is a tree
        assert self._table is not None  # only runs have steps
        bar, task = self._live
        if step != self._growing:
            total = self._table.trees_per_step
            bar.reset(task, total=total, description=f"trees of step {step}")
            self._growing = step
        bar.update(task, completed=num_finished)

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
        assert self._table is not None
        if self._first is None or row["step"] <= self._first["step"]:
            self._first = row
            return MISSING
        pace = (row["time"] - self._first["time"]) / (row["step"] - self._first["step"])
        return duration(pace * self._table.steps_left(row) + self._last_evaluation_s)

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

    def _print(self, text: str, style: str | None = None, *, is_urgent: bool = False) -> None:
        if self._is_quiet and not is_urgent:
            return
        # As it is: in prompts and model text brackets are no markup, and `:train:` is no picture.
        # A log keeps long lines whole.
        self._console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)


def sentence(event: "Event") -> str:
    """What is told of an event, without the fields that are ids."""
    shown = {name: value for name, value in event.fields.items() if name not in IDS}
    with suppress(KeyError):
        return SENTENCES[event.kind].format_map(shown)
    details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    return f"{event.kind.replace('_', ' ')}: {details}"


def finding_text(fields: "Mapping[str, Scalar]") -> str:
    """What the event of a `Finding` says, as a sentence."""
    step, what, remedy = fields["step"], fields["what"], fields["remedy"]
    if not fields["key"]:
        return f"warning at step {step}: {what}; {remedy}"
    value, limit = float(fields["value"] or 0), float(fields["limit"] or 0)
    side = "below" if value < limit else "above"
    return (
        f"warning at step {step}: {what}: {fields['metric']} is {value:.3g}, {side} "
        f"{fields['key']}={limit:g}; {remedy}"
    )


class _Counts(MofNCompleteColumn):
    """Parts that are done of all; nothing where their number is not known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text()


def _progress_bar(console: rich.console.Console) -> Progress:
    # What libraries print goes above the bar, unless it goes elsewhere than the console, to a log.
    is_shown = sys.stderr is console.file
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        _Counts(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=is_shown,
        redirect_stderr=is_shown,
    )
