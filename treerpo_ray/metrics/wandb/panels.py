"""Panels: how the metrics of a run are named and drawn on W&B.

W&B makes a section of what stands before the slash and a panel of each name. It has no place for a
unit but the name, where metrics of a run folder have theirs in the documentation: there names are
keys that files of all versions share, so that the unit is added here.
"""

from typing import TYPE_CHECKING

from treerpo_ray.metrics.rows import Row

if TYPE_CHECKING:
    import wandb

TOKENS = "tokens/total"
"""Sampled tokens of the run until a row."""
BY_TOKENS = ("eval", "reward")
"""Areas of metrics that are drawn over TOKENS; the others are over learner steps."""
UNITS = {
    "eval/length": "tokens",
    "length/mean": "tokens",
    "length/right_mean": "tokens",
    "loss/entropy": "nats",
    "loss/kl": "nats",
    "mismatch/kl": "nats",
    "mismatch/max": "nats",
    "mismatch/mean": "nats",
    "staleness/max": "steps",
    "staleness/mean": "steps",
}
"""Of metrics whose names have none: nats are those of a token, steps those of the learner."""
HIDDEN = (
    *("step", "time", "version"),
    *("eval/num_problems", "eval/num_samples", "eval/temperature", "eval/top_p"),
)
"""What gets no panel of its own: axes, and what is the same in every row."""


def shown(row: Row) -> Row:
    """A row under the names that W&B shows.

    >>> shown({"step": 1, "length/mean": 40.0})
    {'step': 1, 'length/mean_tokens': 40.0}
    """
    return {
        f"{name}_{UNITS[name]}" if name in UNITS else name: value for name, value in row.items()
    }


def define(run: "wandb.Run", names: set[str], defined: set[str]) -> None:
    """Say how metrics of these names are drawn, but those in `defined`, to which they are added."""
    for name in sorted(names):
        area, slash, _ = name.partition("/")
        axis = TOKENS if area in BY_TOKENS else "step"
        if slash and (pattern := f"{area}/*") not in defined:
            run.define_metric(pattern, step_metric=axis)
            defined.add(pattern)
        if name in HIDDEN and name not in defined:
            run.define_metric(name, step_metric=axis if slash else None, hidden=True)
            defined.add(name)
