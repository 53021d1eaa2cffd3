"""Console: what a run shows while it runs. All of it goes to stderr; stdout is for results."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from treerpo_ray.metrics.run_log import Event, Row

HEADER_EVERY = 20
"""Lines after which the names of the columns are repeated."""
MISSING = "-"
COLUMNS = (
    ("reward", "reward/mean", "{:.3f}", 6),
    ("kept", "groups/kept_share", "{:.0%}", 5),
    ("loss", "loss/total", "{:+.4f}", 8),
    ("kl", "loss/kl", "{:.4f}", 7),
    ("mismatch", "mismatch/mean", "{:.4f}", 8),
    ("stale", "staleness/mean", "{:.2f}", 5),
    ("tokens/s", "tokens/per_s", "{:,.0f}", 8),
)
"""Title, metric, format and width of each column; with step and time left 79 characters wide."""


class _Terminal(rich.console.Console):
    """Standard error; where nobody reads it any more, the run goes on unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class Console:
    """Terminal of a run of `num_steps` learner steps; plain lines where stderr is no terminal."""

    def __init__(self, num_steps: int, console: rich.console.Console | None = None) -> None:
        self.num_steps = num_steps
        self._console = console or _Terminal(file=sys.stderr, highlight=False)
        self._first: Row | None = None
        self._num_lines = 0

    def print_step(self, row: Row) -> None:
        """One line for a learner step, or for the evaluation that the row holds."""
        if "eval/pass_at_1" in row:
            reward = f"mean reward {row['eval/reward']:.3f}, " if "eval/reward" in row else ""
            self.note(
                f"step {row['step']:.0f}: {reward}Pass@1 {row['eval/pass_at_1']:.1%} (95 % "
                f"interval {row['eval/ci95_low']:.1%} to {row['eval/ci95_high']:.1%}), "
                f"{row['eval/length']:.1f} tokens an answer; {row['eval/num_problems']:.0f} "
                f"problems, {row['eval/num_samples']:.0f} answers each, temperature "
                f"{row['eval/temperature']:g}, top-p {row['eval/top_p']:g}"
            )
        if "reward/mean" not in row:
            return
        if self._num_lines % HEADER_EVERY == 0:
            titles = " ".join(f"{title:>{width}}" for title, _, _, width in COLUMNS)
            self._print(f"{'step':>10} {titles} {'left':>8}", style="bold")
        self._num_lines += 1
        cells = " ".join(
            f"{form.format(row[name]) if name in row else MISSING:>{width}}"
            for _, name, form, width in COLUMNS
        )
        step = f"{row['step']:.0f}/{self.num_steps}"
        self._print(f"{step:>10} {cells} {self._time_left(row):>8}")
        if row.get("groups/kept") == 0:
            self.note(f"step {row['step']:.0f}: no step group was kept, so there was no update")

    def print_event(self, event: Event) -> None:
        """One line for something out of the ordinary."""
        details = ", ".join(f"{name} {value}" for name, value in event.fields.items())
        self._print(f"{event.kind.replace('_', ' ')}: {details}", style="yellow")

    def note(self, text: str) -> None:
        """A line of text."""
        self._print(text, style="cyan")

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Progress of long work of `total` parts, or of unknown length; yields its `advance`."""
        start = time.monotonic()
        if self._console.is_terminal:
            bar = _progress_bar(self._console, total)
            with bar:
                task = bar.add_task(description, total=total)
                yield lambda num_parts: bar.advance(task, num_parts)
        else:
            self._print(f"{description} ...")
            yield self._quarters(description, total)
        self._print(f"{description}: done in {_duration(time.monotonic() - start)}")

    def _quarters(self, description: str, total: int | None) -> Callable[[int], None]:
        """An `advance` that prints a line at each quarter of the way."""
        done = 0

        def advance(num_parts: int) -> None:
            nonlocal done
            before, done = done, done + num_parts
            if total and 4 * before // total < 4 * done // total < 4:
                self._print(f"{description}: {done}/{total}")

        return advance

    def _time_left(self, row: Row) -> str:
        """From the pace since the first row that was printed; unknown at that one."""
        if self._first is None or row["step"] <= self._first["step"]:
            self._first = row
            return MISSING
        pace = (row["time"] - self._first["time"]) / (row["step"] - self._first["step"])
        return _duration(pace * max(0.0, self.num_steps - row["step"]))

    def _print(self, text: str, style: str | None = None) -> None:
        # As it is: in prompts and model text brackets are no markup. A log keeps long lines whole.
        self._console.print(text, style=style, markup=False, soft_wrap=True)


def _progress_bar(console: rich.console.Console, total: int | None) -> Progress:
    counts = (MofNCompleteColumn(),) if total else ()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
