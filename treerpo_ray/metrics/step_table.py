"""Step table: what the console shows of each learner step of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # the first line should not wait for what these import
    from treerpo_ray.config import Config
    from treerpo_ray.metrics.rows import Row

MISSING = "-"


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


def duration(seconds: float) -> str:
    """Time in at most six characters, up to 99 hours."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """The table of a run's learner steps, and where it ends."""

    columns: tuple[Column, ...]
    num_steps: int
    max_sampled_tokens: int | None
    """As of `run`: what else ends it."""
    trees_per_step: int

    @classmethod
    def of(cls, config: "Config") -> Self:
        """Of a run."""
        return cls(
            columns=_columns(config),
            num_steps=config.run.num_steps,
            max_sampled_tokens=config.run.max_sampled_tokens,
            trees_per_step=config.gate.trees_per_step,
        )

    @property
    def step_width(self) -> int:
        """Characters of the first column."""
        return max(4, len(f"{self.num_steps}") * 2 + 1)

    @property
    def titles(self) -> str:
        """The head, but for the times."""
        titles = " ".join(f"{column.title:>{column.width}}" for column in self.columns)
        return f"{'step':>{self.step_width}} {titles}"

    def line(self, row: "Row") -> str:
        """That of a step, but for the times."""
        step = f"{row['step']:.0f}/{self.num_steps}"
        return f"{step:>{self.step_width}} {' '.join(each.cell(row) for each in self.columns)}"

    def steps_left(self, row: "Row") -> float:
        """Learner steps after that of a row, of which each samples as many tokens as those so
        far."""
        steps = max(0.0, self.num_steps - row["step"])
        if self.max_sampled_tokens and row.get("tokens/total"):
            tokens_left = max(0.0, self.max_sampled_tokens - row["tokens/total"])
            steps = min(steps, tokens_left / row["tokens/total"] * row["step"])
        return steps


def _columns(config: "Config") -> tuple[Column, ...]:
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
    return tuple(column for column in found if not left_out.get(column.title))
