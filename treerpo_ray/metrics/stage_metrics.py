"""Stage metrics: what Ray's metrics endpoint tells an operator of a run, by stage.

All of them come from the rows and events of the run log, in whose actor alone they are recorded, so
that no number is computed twice. METRICS names them; `grafana.json` draws each. Ray puts `ray_`
before a name, and `_total` behind that of a counter.

Grafana imports that file, or finds it by itself in the folder of Ray's own dashboards:

    cp treerpo_ray/metrics/grafana.json /tmp/ray/session_latest/metrics/grafana/dashboards/
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from treerpo_ray.errors import one_line
from treerpo_ray.run_folder.files import Scalar
from treerpo_ray.verifier.verdict import Verdict

log = logging.getLogger(__name__)

RUN = "run"
"""Tag of every metric: the name of the run."""
FINISHED = "finished"
"""Source of a metric: the trees that are finished and not consumed."""
NOTED = (
    *("engine_lost", "engine_left", "learner_lost", "tree_moved", "unhealthy"),
    *("write_failed", "write_waits", "check_failed", "autoscaler_failed", "fatal"),
)
"""Kinds of events that are counted."""
SECONDS = tuple(digit * 10.0**power for power in range(-1, 4) for digit in (1, 2, 5))
"""Upper bounds of the bins that times are counted in."""


class Kind(StrEnum):
    """How values become one."""

    GAUGE = "gauge"
    """The last one counts."""
    COUNTER = "counter"
    """They are added up while the run's log lives."""
    HISTOGRAM = "histogram"
    """They are counted in bins, those of SECONDS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMetric:
    """A metric and where its values come from, each with the value of its `tag`.

    What is not finite is left out, and what is 0 of a counter.
    """

    name: str
    kind: Kind = Kind.GAUGE
    description: str
    unit: str
    """As Grafana calls it."""
    tag: str = ""
    """Tag besides RUN; empty: it has none."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Value of the tag by the source: the name of a metric in `metrics.jsonl`, kind and field of an
    event (`kind.field`), or FINISHED."""
    counted: Mapping[str, str] = field(default_factory=dict)
    """Field of an event that is the value of the tag, by its kind; each such event counts 1."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Names of all tags."""
        return (RUN, self.tag) if self.tag else (RUN,)


METRICS = (
    StageMetric(
        name="treerpo_learner_step",
        description="Learner steps that are done",
        unit="none",
        sources={"step": ""},
    ),
    StageMetric(
        name="treerpo_weights_version",
        description="Version of the weights that the learner has, and that all engines have proved",
        unit="none",
        tag="stage",
        sources={"version": "learner", "published.version": "engines"},
    ),
    StageMetric(
        name="treerpo_step_seconds",
        kind=Kind.HISTOGRAM,
        description="Time of a learner step",
        unit="s",
        sources={"time/step_s": ""},
    ),
    StageMetric(
        name="treerpo_part_seconds",
        description="What the last learner step spent its time on: the wait for trees (of which "
        "scoring and hand-over are parts), the update, and what follows it",
        unit="s",
        tag="part",
        sources={
            "time/wait_s": "wait",
            "time/score_s": "scoring",
            "time/hop_s": "hand-over",
            "time/update_s": "update",
            "time/sync_s": "publishing",
        },
    ),
    StageMetric(
        name="treerpo_publish_seconds",
        kind=Kind.HISTOGRAM,
        description="Time from the packing of a version until all engines have proved it",
        unit="s",
        sources={"published.seconds": ""},
    ),
    StageMetric(
        name="treerpo_idle_share",
        description="Share of the last learner step for which a stage waited for others",
        unit="percentunit",
        tag="stage",
        sources={
            "idle/engines_share": "engines",
            "idle/scoring_share": "scoring",
            "idle/learner_share": "learner",
        },
    ),
    StageMetric(
        name="treerpo_tokens_per_second",
        description="Tokens that all engines sampled since the last learner step, over the time",
        unit="tokens/s",
        sources={"tokens/per_s": ""},
    ),
    StageMetric(
        name="treerpo_sampled_tokens",
        kind=Kind.COUNTER,
        description="Sampled tokens of the trees that were learned from",
        unit="tokens",
        sources={"tokens/sampled": ""},
    ),
    StageMetric(
        name="treerpo_trees",
        description="Trees that wait for an engine or grow on one, those of evaluations too, and "
        "those that are finished and not taken by the learner",
        unit="trees",
        tag="state",
        sources={"pool.waiting": "waiting", "pool.growing": "growing", FINISHED: "finished"},
    ),
    StageMetric(
        name="treerpo_finished_trees",
        kind=Kind.COUNTER,
        description="Trees that an engine has finished",
        unit="trees",
        tag="engine",
        counted={"tree_finished": "engine"},
    ),
    StageMetric(
        name="treerpo_consumed_trees",
        kind=Kind.COUNTER,
        description="Trees that the learner has taken and learned from",
        unit="trees",
        sources={"consumed.trees": ""},
    ),
    StageMetric(
        name="treerpo_engines",
        description="Engines of the pool",
        unit="engines",
        tag="state",
        sources={f"pool.{state}": state for state in ("serving", "starting", "draining")},
    ),
    StageMetric(
        name="treerpo_staleness_steps",
        description="Learner steps by which the trees of the last step were behind",
        unit="steps",
        tag="statistic",
        sources={"staleness/mean": "mean", "staleness/max": "max"},
    ),
    StageMetric(
        name="treerpo_prefix_hit_rate",
        description="Share of the prompt tokens of the last step that the engines had computed",
        unit="percentunit",
        sources={"engine/prefix_hit_rate": ""},
    ),
    StageMetric(
        name="treerpo_answers",
        kind=Kind.COUNTER,
        description="Answers of training trees by what the verifier made of them; errored and "
        "timed_out are its own faults",
        unit="answers",
        tag="verdict",
        sources={f"verdict/{verdict}": verdict.value for verdict in Verdict},
    ),
    StageMetric(
        name="treerpo_verdict_error_share",
        description="Share of the answers of the last learner step that the verifier errored on or "
        "was too late with",
        unit="percentunit",
        sources={"verdict/error_share": ""},
    ),
    StageMetric(
        name="treerpo_reward",
        description="Mean reward of the trees of the last learner step",
        unit="none",
        sources={"reward/mean": ""},
    ),
    StageMetric(
        name="treerpo_eval_pass_at_1",
        description="Pass@1 of the last evaluation, with its 95 % interval",
        unit="percentunit",
        tag="statistic",
        sources={"eval/pass_at_1": "mean", "eval/ci95_low": "low", "eval/ci95_high": "high"},
    ),
    StageMetric(
        name="treerpo_events",
        kind=Kind.COUNTER,
        description="What was out of the ordinary, by kind",
        unit="events",
        tag="kind",
        counted=dict.fromkeys(NOTED, "kind"),
    ),
)


Record = Callable[[float, dict[str, str]], None]
"""Records a value of a metric with its tags."""


def in_ray(metric: StageMetric) -> Record:
    """A metric of this process's Ray; recording takes microseconds and waits for nothing."""
    from ray.util import metrics  # who only reads what a run wrote needs no Ray

    described = metric.name, metric.description
    if metric.kind is Kind.COUNTER:
        return metrics.Counter(*described, tag_keys=metric.tags).inc
    if metric.kind is Kind.HISTOGRAM:
        bounds = list(SECONDS)
        return metrics.Histogram(*described, boundaries=bounds, tag_keys=metric.tags).observe
    return metrics.Gauge(*described, tag_keys=metric.tags).set


class StageMetrics:
    """Records METRICS of a run; what fails of it is logged once, and the run goes on without.

    Args:
        run: Name of the run.
        make: Makes what records a metric.
    """

    def __init__(self, *, run: str, make: Callable[[StageMetric], Record] = in_ray) -> None:
        self._run = run
        self._by_source: dict[str, tuple[StageMetric, Record]] = {}
        self._by_event: dict[str, tuple[StageMetric, Record]] = {}
        with self._unharmed():
            for metric in METRICS:
                made = metric, make(metric)
                self._by_source |= dict.fromkeys(metric.sources, made)
                self._by_event |= dict.fromkeys(metric.counted, made)

    def row(self, row: Mapping[str, float]) -> None:
        """Record what a row of `metrics.jsonl` tells."""
        for source, value in row.items():
            self.value(source, value)

    def event(self, kind: str, fields: Mapping[str, Scalar]) -> None:
        """Record what an event tells."""
        for name, value in fields.items():
            self.value(f"{kind}.{name}", value)
        if kind in self._by_event:
            metric, record = self._by_event[kind]
            tag = {**fields, "kind": kind}.get(metric.counted[kind])
            with self._unharmed():
                record(1.0, {RUN: self._run, metric.tag: str(tag)})

    def value(self, source: str, value: Scalar) -> None:
        """Record the value of a source; nothing if no metric has it."""
        if source not in self._by_source or not isinstance(value, int | float):
            return
        metric, record = self._by_source[source]
        if not math.isfinite(value) or (metric.kind is Kind.COUNTER and value <= 0):
            return
        tags = {RUN: self._run} | ({metric.tag: metric.sources[source]} if metric.tag else {})
        with self._unharmed():
            record(float(value), tags)

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever Ray runs into: the run does not need it
            log.warning("no metrics for Ray's endpoint any more: %s", one_line(error))
            self._by_source, self._by_event = {}, {}
