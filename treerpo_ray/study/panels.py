"""Panels: which metrics of a run are drawn together, for plots and viewer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from treerpo_ray.metrics.rows import BY_SET


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small chart of a run's curves: metrics by the label of their line."""

    title: str
    lines: dict[str, str]
    is_share: bool = False
    interval: tuple[str, str] | None = None
    """Metrics with the lower and the upper end of the 95 % interval of the only line."""
    is_off_at_zero: bool = False
    """Whether metrics that are 0 throughout tell no more than that the run has no such thing."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that are drawn."""
        return (*self.lines.values(), *(self.interval or ()))


PANELS = (
    Panel(title="reward of the leaves", lines={"mean": "reward/mean", "any": "reward/any"}),
    Panel(
        title="Pass@1 on held-out problems",
        lines={"": "eval/pass_at_1"},
        is_share=True,
        interval=("eval/ci95_low", "eval/ci95_high"),
    ),
    Panel(title="step groups kept", lines={"": "groups/kept_share"}, is_share=True),
    Panel(title="loss", lines={"total": "loss/total", "policy": "loss/policy"}),
    Panel(title="entropy of the learner (nats a token)", lines={"": "loss/entropy"}),
    Panel(title="engine against learner (nats a token)", lines={"": "mismatch/mean"}),
    Panel(title="KL to the reference (nats a token)", lines={"": "loss/kl"}, is_off_at_zero=True),
    Panel(
        title="answer length (tokens)",
        lines={"training": "length/mean", "right": "length/right_mean", "test": "eval/length"},
    ),
    Panel(
        title="staleness (steps)",
        lines={"mean": "staleness/mean", "max": "staleness/max"},
        is_off_at_zero=True,
    ),
    Panel(
        title="shares of what was sampled",
        lines={
            "trained": "tokens/trained_share",
            "cut off": "length/cut_off_share",
            "duplicates": "groups/duplicate_share",
        },
        is_share=True,
    ),
    Panel(
        title="values off the next sibling (calibration error)",
        lines={"": "values/calibration_error"},
    ),
    Panel(
        title="idle time",
        lines={
            "engines": "idle/engines_share",
            "scoring": "idle/scoring_share",
            "learner": "idle/learner_share",
        },
        is_share=True,
    ),
    Panel(title="sampled tokens a second", lines={"": "tokens/per_s"}),
)


def panels_of(metrics: Mapping[str, Iterable[float | None]]) -> tuple[Panel, ...]:
    """The panels that there is something to draw for, by the values of each metric."""

    def has_something(panel: Panel) -> bool:
        own = [metrics[name] for name in panel.lines.values() if name in metrics]
        return any(not panel.is_off_at_zero or any(values) for values in own)

    panels = (PANELS[0], *_by_set(metrics), *PANELS[1:])
    return tuple(panel for panel in panels if has_something(panel))


def _by_set(names: Iterable[str]) -> list[Panel]:
    """The panel of rewards by data set, where several are mixed."""
    sets = sorted(name.removeprefix(BY_SET) for name in names if name.startswith(BY_SET))
    lines = {name: f"{BY_SET}{name}" for name in sets}
    return [Panel(title="reward of the leaves by data set", lines=lines)] if sets else []
